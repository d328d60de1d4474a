"""Which level each micro-batch of a step runs: pure functions of the step, so a run that resumes
draws what it would have drawn."""

import random


def _generator(seed: int, *position: int) -> random.Random:
    return random.Random(":".join(map(str, (seed, *position))))


class Uniform:
    """Random permutations of the levels, one after the other (FlexRank's release)."""

    def __init__(self, levels: list[int], seed: int):
        self.levels, self.seed = levels, seed

    def draw(self, step: int, count: int, progress: float) -> list[int]:
        del progress
        drawn = []
        for position in range(step * count, (step + 1) * count):
            turn, index = divmod(position, len(self.levels))
            drawn.append(_generator(self.seed, turn).sample(self.levels, len(self.levels))[index])
        return drawn


class Sandwich:
    """The cheapest and the dearest level in every step, others between them at random."""

    def __init__(self, levels: list[int], seed: int):
        self.levels, self.seed = sorted(levels), seed

    def draw(self, step: int, count: int, progress: float) -> list[int]:
        del progress
        random_ = _generator(self.seed, step)
        ends = [self.levels[0], self.levels[-1]]
        if count == 1:
            return [random_.choice(self.levels)]
        return ends + [random_.choice(self.levels) for _ in range(count - 2)]


class Curriculum:
    """From the dearest level down: one more of them takes part as training goes on, all of them
    after two thirds of it."""

    def __init__(self, levels: list[int], seed: int):
        self.levels, self.seed = sorted(levels, reverse=True), seed

    def draw(self, step: int, count: int, progress: float) -> list[int]:
        known = 1 + int(1.5 * progress * len(self.levels))
        random_ = _generator(self.seed, step)
        return [random_.choice(self.levels[:known]) for _ in range(count)]


SAMPLERS = {"uniform": Uniform, "sandwich": Sandwich, "curriculum": Curriculum}
