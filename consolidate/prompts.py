"""What a model is asked when it is to write text of its own: every kind of writing below, of every
subject."""

import random

KINDS = (
    "Write a short story about {}.",
    "Write the opening of a novel that begins with {}.",
    "Tell a bedtime story for a small child about {}.",
    "Write a fable with a moral about {}.",
    "Write a story for young children about {}.",
    "Tell a story in simple words in which a child learns something about {}.",
    "Write a story about a family and {}, with what they say to each other.",
    "Write a story about an animal that has to do with {}.",
    "Write a dialogue between two friends about {}.",
    "Write a scene of a play in which a family quarrels over {}.",
    "Write a diary entry about {}.",
    "Write a letter to an old friend about {}.",
    "Write a polite e-mail to a colleague about {}.",
    "Write a speech about {}.",
    "Write a poem about {}.",
    "Write the lyrics of a song about {}.",
    "Write a joke about {} and say why it is funny.",
    "Write a riddle about {} and its answer.",
    "Describe {} to somebody who has never seen it.",
    "Explain {} to a child of ten.",
    "Explain {} to a student, step by step.",
    "Write an encyclopaedia article about {}.",
    "Summarise the history of {}.",
    "Write a newspaper report about {}.",
    "Write an interview with an expert on {}.",
    "Write a review of a book about {}.",
    "Write an essay for and against {}.",
    "What do people get wrong about {}?",
    "Give me ten facts about {}.",
    "List questions for a quiz about {}, with answers.",
    "Give advice to somebody who worries about {}.",
    "Plan a lesson about {}.",
    "Write instructions for a beginner about {}.",
    "Write an advertisement that has to do with {}.",
    "Compare {} with something quite different.",
    "Imagine the world without {}. What would change?",
    "Write a travel guide's page about {}.",
    "Write a memory of a grandparent about {}.",
    "Argue in three paragraphs that {} matters.",
    "Write a word problem in arithmetic about {} and solve it.",
    "Write captions of one sentence for ten photographs that show {}.",
    "Write ten headlines about {}.",
    "Write a question about {} as somebody would ask it in a forum, and three answers.",
)

SUBJECTS = (
    "a lost dog", "a clever cat", "the sea", "a storm at night", "an old house", "a new school",
    "a long train journey", "a broken toy", "a birthday party", "the moon", "a garden in spring",
    "a river", "snow", "a small bird", "a lion and a mouse", "a king and a farmer", "a brave girl",
    "a shy boy", "two sisters", "a kind neighbour", "a bad dream", "a secret", "a treasure map",
    "a magic tree", "a talking stone", "honesty", "friendship", "courage", "fear of the dark",
    "forgiveness", "patience", "being alone", "growing old", "losing a job", "a first day at work",
    "moving to another city", "a wedding", "a funeral", "learning to swim", "riding a bicycle",
    "cooking soup", "baking bread", "a picnic", "a market", "fishing", "bees", "elephants",
    "whales", "wolves", "butterflies", "horses", "dinosaurs", "volcanoes", "earthquakes",
    "rainbows", "the seasons", "mountains", "deserts", "forests", "islands", "the stars", "the sun",
    "comets", "gravity", "electricity", "magnets", "light", "sound", "water", "fire", "ice",
    "the heart", "sleep", "memory", "vaccines", "bacteria", "vitamins", "exercise", "mathematics",
    "fractions", "prime numbers", "probability", "triangles", "music", "the piano", "painting",
    "theatre", "photography", "films", "football", "chess", "running", "dancing", "clocks",
    "bridges", "ships", "aeroplanes", "trains", "cars", "bicycles", "robots", "computers",
    "the internet", "programming", "artificial intelligence", "telephones", "books", "libraries",
    "newspapers", "languages", "translation", "writing", "dictionaries", "money", "banks", "trade",
    "taxes", "a small business", "farming", "coffee", "tea", "rice", "chocolate", "cheese",
    "apples", "ancient Rome", "ancient Egypt", "the Vikings", "the Middle Ages", "castles",
    "the French Revolution", "the Industrial Revolution", "a great explorer", "an unknown inventor",
    "a famous battle", "a forgotten queen", "democracy", "laws", "courts", "elections", "cities",
    "villages", "borders", "oil", "solar power", "recycling", "climate", "plastic", "hospitals",
    "teachers", "doctors", "pilots", "soldiers", "sailors", "detectives", "thieves", "ghosts",
    "dragons", "pirates", "witches", "time travel", "a distant planet", "the future", "happiness",
    "dreams", "justice", "beauty", "silence", "colours", "numbers", "maps", "letters", "gifts",
    "holidays", "winter", "summer", "a quiet evening", "a noisy street", "a mistake", "a promise",
    "a lucky day",
)  # fmt: skip


def messages(count: int, seed: int) -> list[str]:
    """`count` of them, no two alike while there are enough."""
    every = [(kind, subject) for kind in KINDS for subject in SUBJECTS]
    order = []
    generator = random.Random(seed)
    while len(order) < count:
        order += generator.sample(every, len(every))
    return [kind.format(subject) for kind, subject in order[:count]]
