#!/usr/bin/env python3
"""Writes tests/data/tokenizers: what PyPI's tokenizers and jinja2 make of text and of chats.

    python3 -m venv VENV && VENV/bin/pip install tokenizers==0.23.3 jinja2==3.1.6
    VENV/bin/python scripts/make_tokenizer_fixtures.py

The text and the tokenizers are made here, from fixed seeds: nothing is downloaded.

corpus.json          lines of text, the hand-written ones first
byte_bpe.json, sentencepiece_bpe.json, wordpiece.json
                     tokenizer.json files, trained on a part of that text
variants.json        other tokenizers as changes to those files, each with the expected ids and texts:
                     of the hand-written lines in full for some, of all as hashes
chat_templates.json  templates with conversations and the prompts they give
"""

import collections
import json
import pathlib
import random
import unicodedata

import jinja2
import jinja2.ext
import jinja2.sandbox
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

OUT = pathlib.Path(__file__).resolve().parent.parent / "tests" / "data" / "tokenizers"

# --- the text ---

TRICKY_LINES = [
    "",
    " ",
    "  ",
    "\n",
    "\t\n",
    "\r\n\r\n  x\r\n",
    "Hello, world!",
    " Hello  world",
    "I'm sure they'll say we've said it's theirs; I'D SAY YOU'RE NOT.",
    "don’t ‘quote’ “me” — or do…",
    "1234567890 12 345 6,789.01 ½ ² Ⅷ ٣٤٥ 五",
    "naïve café résumé; nai\u0308ve cafe\u0301 re\u0301sume\u0301",
    "ﬁne ﬂuﬀ ① ＡＢＣ ｶﾞ ㎏ Å",
    "İstanbul ISTANBUL ıstanbul ΣΊΣΥΦΟΣ ẞß ǅ",
    "Привет, мир! Съешь ещё этих мягких булок.",
    "Γειά σου Κόσμε",
    "שלום עולם، مرحبا بالعالم",
    "नमस्ते दुनिया क्षत्रिय",
    "สวัสดีชาวโลก",
    "你好，世界！漢字仮名交じり文。㐀𠀀豈",
    "안녕하세요 세계 각",
    "👍🏽 👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪🇫🇷 ☃️ 🤷🏾‍♀️",
    "a\u200bb\u200dc\ufeffd\u00ade\u2060f",
    "a\u00a0b\u3000c\u2028d\u2029e\u0085f\u180eg\u1680h",
    "Z̵̧̛̺a̴̢͝l̶̰̈́g̵̜͝o̷̟͐",
    "\x01\x02\x7f \ufffd \ue000 \U000f0000 \U0010ffff \ufffe \u0378",
    "def f(x):\n    return {\"a\": [x, -1e-9], 'b': x ** 2}  # ok?\n",
    "for (int i = 0; i < n; ++i) { a[i] += b[i]->c; }\t\t// …\n\n\n",
    "https://example.org/a_b?q=%20&x=1#frag user@example.org",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "<s>text</s> <s> </s><|endoftext|>end[CLS]x[SEP] [MASK] [UNK]",
    "<0x0A><0xE2><0x82>▁under▁score ▁ Ġĉ ##ing ing##",
    "keep  <keep>  both  <left>  sides  <right>  x<word>y <word> <word>.",
    "LOWER lower <NORM> <norm> ｎｏｒｍ",
    "x" * 120 + " " + "ab" * 60,
    "!!!???...,,,;;; ( ) [ ] { } 's ' t n't 'M do not I 've",
    "        indented\n\tand\r\n \t mixed \n",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaa bbbbbbbb 00000000",
    "ᄀ가각힣 e\u0301\u0323 \u0344 ཱི ྱ",
    "𝒜𝔅ℂ 𝟙𝟚𝟛 🄰 ﷺ ﬃ ǆ",
]

WORDS = {
    "latin": "the of and to in a is that it was for on are with as they be at one have this from "
    "water river stone light winter morning garden letter number people question answer window "
    "running walked slowly unhappiness internationalization rebuild cannot shouldn't it's we're "
    "Monday Paris Anna Über Größe façade señor ação Żółw Ångström København İzmir".split(),
    "cyrillic": "и в не на что он как это по из река камень свет зима утро сад письмо вопрос "
    "окно медленно перестройка Москва Анна".split(),
    "greek": "και το να είναι της με για ποτάμι πέτρα φως χειμώνας πρωί κήπος ερώτηση".split(),
    "hebrew_arabic": "של את על נהר אבן אור חורף בוקר من في على نهر حجر ضوء شتاء صباح حديقة".split(),
    "indic": "और का में है नदी पत्थर रोशनी सर्दी सुबह প্রশ্ন உலகம் ప్రపంచం".split(),
    "cjk": "的 是 在 河流 石头 光 冬天 早晨 花园 問題 です ます ありがとう カタカナ 사람 질문 대답".split(),
    "thai": "แม่น้ำ หิน แสง ฤดูหนาว ตอนเช้า สวน".split(),
    "code": "int x = 0; if (a == b) { return; } self.value += 1 import os print(\"%d\\n\", i) "
    "std::vector<float> => -> != && || /* */ // # $HOME ${x} `cmd` <div> </div> &amp; 0xFF 3.14 "
    "1e-5 snake_case camelCase SCREAMING_CASE __init__ @property".split(),
    "emoji": "😀 😂 ❤️ 👍 👍🏿 👩‍💻 🧑‍🚀 👨‍👩‍👧 🏴‍☠️ 🇯🇵 1️⃣ ☕ ✅ → ∑ √ ≈ € £ ™".split(),
    "special": ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<s>", "</s>", "[CLS]", "[MASK]",
                "<keep>", "<left>", "<right>", "<word>", "<NORM>", "<0x41>", "▁", "##x"],
}
SPACES = [" "] * 12 + ["  ", "    ", "\n", "\n\n", "\t", "\r\n", " \n ", "\u00a0", "\u3000", "", ""]
COMBINING_MARKS = "\u0300\u0301\u0303\u0308\u0323\u0327\u093f\u0e34\u20dd"


def random_character(rng):
    """Any character that Unicode 3.2 assigned: no library's tables are older."""
    while True:
        code_point = rng.choice([
            rng.randrange(0x20, 0x7f), rng.randrange(0x80, 0x600), rng.randrange(0x600, 0x2000),
            rng.randrange(0x2000, 0x3400), rng.randrange(0x3400, 0xfffe),
            rng.randrange(0x10000, 0x30000)
        ])
        if unicodedata.ucd_3_2_0.category(chr(code_point)) not in ("Cn", "Cs", "Co"):
            return chr(code_point)


def random_word(rng, script):
    kind = rng.random()
    if kind < 0.06:
        return "".join(random_character(rng) for _ in range(rng.randrange(1, 7)))
    if kind < 0.10:
        return str(rng.randrange(10**rng.randrange(1, 12)))
    word = rng.choice(WORDS[script])
    if kind < 0.14:
        return word + rng.choice(COMBINING_MARKS) * rng.randrange(1, 4)
    if kind < 0.20:
        return word.upper()
    if kind < 0.32:
        return word + rng.choice(list(".,;:!?)…。،'\"-"))
    return word


def random_line(rng):
    scripts = rng.choices(list(WORDS), weights=[30, 8, 5, 6, 6, 8, 4, 14, 5, 5], k=3)
    words = []
    for _ in range(rng.randrange(3, 45)):
        words += [random_word(rng, rng.choice(scripts)), rng.choice(SPACES)]
    return "".join(words)


def make_corpus():
    rng = random.Random(20240229)
    lines = list(TRICKY_LINES)
    size = 0
    while size < 190_000:
        lines.append(random_line(rng))
        size += len(lines[-1].encode())
    return lines


# --- the tokenizers ---

GPT2_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LLAMA3_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
                r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN_SPLIT = LLAMA3_SPLIT.replace("{1,3}", "")


def frequent_characters(lines, count, replaced=""):
    """The alphabet of a training, chosen here since the trainers break ties at random."""
    frequencies = collections.Counter(c for line in lines for c in line if not c.isspace())
    return sorted(frequencies, key=lambda c: (-frequencies[c], c))[:count] + list(replaced)


def train_byte_bpe(lines):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        lines,
        trainers.BpeTrainer(vocab_size=1100, special_tokens=GPT2_SPECIAL, show_progress=False,
                            initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return json.loads(tokenizer.to_str())


def train_sentencepiece_bpe(lines):
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.train_from_iterator(
        lines,
        trainers.BpeTrainer(vocab_size=1000, special_tokens=["<unk>", "<s>", "</s>"] + byte_tokens,
                            initial_alphabet=frequent_characters(lines, 220, "▁"),
                            limit_alphabet=221, show_progress=False))
    spec = json.loads(tokenizer.to_str())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["id"] < 3]
    spec["pre_tokenizer"] = None
    spec["normalizer"] = {"type": "Sequence", "normalizers": [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]}
    spec["decoder"] = {"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"}, {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0}]}
    spec["post_processor"] = template_post_processor("<s>", 1)
    return spec


def make_wordpiece(lines):
    """Frequent characters and parts of words: the trainer's ids differ from run to run."""
    normalizer = normalizers.BertNormalizer()
    pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    pieces = collections.Counter()
    for line in lines:
        for word, _ in pre_tokenizer.pre_tokenize_str(normalizer.normalize_str(line)):
            for begin in range(len(word)):
                for end in range(begin + 1, min(len(word), begin + 8) + 1):
                    pieces[("##" if begin > 0 else "") + word[begin:end]] += 1
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    frequent = sorted(pieces, key=lambda piece: (-pieces[piece] * len(piece), piece))[:1200]
    vocabulary = {token: id for id, token in enumerate(special + frequent)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(special)
    spec = json.loads(tokenizer.to_str())
    spec["post_processor"] = template_post_processor("[CLS]", 2, "[SEP]", 3)
    return spec


def template_post_processor(before, before_id, after=None, after_id=None):
    single = [{"SpecialToken": {"id": before, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    special = {before: {"id": before, "ids": [before_id], "tokens": [before]}}
    if after is not None:
        single.append({"SpecialToken": {"id": after, "type_id": 0}})
        special[after] = {"id": after, "ids": [after_id], "tokens": [after]}
    return {"type": "TemplateProcessing", "single": single,
            "pair": single + [{"Sequence": {"id": "B", "type_id": 1}}], "special_tokens": special}


def with_string_merges(spec):
    spec["model"]["merges"] = [" ".join(pair) for pair in spec["model"]["merges"]]
    return spec


def added(first_id, *tokens):
    return [{"id": first_id + i, "special": True, "single_word": False, "lstrip": False,
             "rstrip": False, "normalized": False, **token} for i, token in enumerate(tokens)]


def sequence(kind, *parts):
    return {"type": "Sequence", kind: list(parts)}


def split(pattern, behavior, invert=False):
    return {"type": "Split", "pattern": pattern, "behavior": behavior, "invert": invert}


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
              "use_regex": False}
GPT2_BYTE_LEVEL = {**BYTE_LEVEL, "use_regex": True}


def make_variants(specs):
    """(name, base, changes to it, whether all lines are checked)"""
    byte_size = len(specs["byte_bpe"]["model"]["vocab"])
    piece_size = len(specs["sentencepiece_bpe"]["model"]["vocab"])
    word_size = len(specs["wordpiece"]["model"]["vocab"])
    byte_added = specs["byte_bpe"]["added_tokens"] + added(
        byte_size, {"content": "<keep>", "lstrip": True, "rstrip": True},
        {"content": "<left>", "lstrip": True, "special": False}, {"content": "<right>", "rstrip": True},
        {"content": "<word>", "single_word": True, "special": False},
        {"content": "<NORM>", "normalized": True, "special": False},
        {"content": "<s>"}, {"content": "</s>"}, {"content": "<|im_", "special": False})
    variants = [
        ("gpt2", "byte_bpe", {}, True),
        ("smollm", "byte_bpe", {"pre_tokenizer": sequence(
            "pretokenizers", {"type": "Digits", "individual_digits": True}, GPT2_BYTE_LEVEL)}, True),
        ("llama3", "byte_bpe", {
            "added_tokens": byte_added, "model": {"ignore_merges": True},
            "pre_tokenizer": sequence("pretokenizers", split({"Regex": LLAMA3_SPLIT}, "Isolated"),
                                      BYTE_LEVEL),
            "post_processor": sequence("processors", BYTE_LEVEL,
                                       template_post_processor("<s>", byte_size + 5))}, True),
        ("qwen", "byte_bpe", {
            "normalizer": {"type": "NFC"}, "added_tokens": byte_added,
            "pre_tokenizer": sequence("pretokenizers", split({"Regex": QWEN_SPLIT}, "Isolated"),
                                      BYTE_LEVEL)}, True),
        ("roberta", "byte_bpe", {
            "pre_tokenizer": {**GPT2_BYTE_LEVEL, "add_prefix_space": True},
            "post_processor": {"type": "RobertaProcessing", "cls": ["<s>", 0], "sep": ["</s>", 2],
                               "trim_offsets": True, "add_prefix_space": True}}, False),
        ("byte_level_normalizer", "byte_bpe", {
            "normalizer": sequence("normalizers", {"type": "NFKC"}, {"type": "ByteLevel"}),
            "pre_tokenizer": None}, False),
        ("llama2", "sentencepiece_bpe", {}, True),
        ("mistral", "sentencepiece_bpe", {
            "normalizer": None,
            "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first",
                              "split": False},
            "added_tokens": specs["sentencepiece_bpe"]["added_tokens"] + added(
                piece_size, {"content": "<keep>", "lstrip": True, "rstrip": True},
                {"content": "<word>", "single_word": True, "special": False})}, True),
        ("gemma", "sentencepiece_bpe", {
            "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            "pre_tokenizer": split({"String": " "}, "MergedWithPrevious"),
            "decoder": sequence("decoders",
                                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                                {"type": "ByteFallback"}, {"type": "Fuse"})}, False),
        ("metaspace_without_bytes", "sentencepiece_bpe", {
            "model": {"byte_fallback": False}, "normalizer": None,
            "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always",
                              "split": True},
            "decoder": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always",
                        "split": True}}, False),
        ("unknown_not_fused", "sentencepiece_bpe", {
            "model": {"byte_fallback": False, "fuse_unk": False}, "normalizer": None,
            "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never",
                              "split": True},
            "decoder": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never",
                        "split": True}}, False),
        ("bert", "wordpiece", {}, True),
        ("bert_cased", "wordpiece", {
            "normalizer": {"type": "BertNormalizer", "clean_text": False, "strip_accents": None,
                           "handle_chinese_chars": False, "lowercase": False},
            "model": {"max_input_chars_per_word": 20},
            "post_processor": {"type": "BertProcessing", "cls": ["[CLS]", 2], "sep": ["[SEP]", 3]},
            "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": False}}, False),
        ("normalizers", "wordpiece", {
            "normalizer": sequence(
                "normalizers", {"type": "NFKD"}, {"type": "StripAccents"}, {"type": "Lowercase"},
                {"type": "Replace", "pattern": {"Regex": r"\d+"}, "content": "0"},
                {"type": "Strip", "strip_left": True, "strip_right": True}),
            "added_tokens": specs["wordpiece"]["added_tokens"] + added(
                word_size, {"content": "<norm>", "normalized": True, "special": False}),
            "pre_tokenizer": {"type": "Whitespace"}, "decoder": None}, False),
        ("nfd", "wordpiece", {"normalizer": {"type": "NFD"},
                              "pre_tokenizer": {"type": "WhitespaceSplit"}}, False),
        ("punctuation", "wordpiece", {
            "pre_tokenizer": sequence(
                "pretokenizers", {"type": "WhitespaceSplit"},
                {"type": "Punctuation", "behavior": "Contiguous"},
                {"type": "Digits", "individual_digits": False})}, False),
        ("word_suffix", "sentencepiece_bpe", {
            "model": {"end_of_word_suffix": "</s>", "byte_fallback": False},
            "normalizer": None, "post_processor": None, "pre_tokenizer": {"type": "Whitespace"},
            "decoder": {"type": "BPEDecoder", "suffix": "</s>"}}, False),
    ]
    for behavior in ("Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous"):
        for invert in (False, True):
            pattern = {"Regex": r"\w{1,3}|[aeiou.]"} if invert else {"String": "a"}
            variants.append((f"split_{behavior}_{'inverted' if invert else 'string'}", "byte_bpe", {
                "pre_tokenizer": sequence("pretokenizers", split(pattern, behavior, invert),
                                          BYTE_LEVEL)}, False))
    return variants


# --- what is expected ---

NUM_LINES_OF_SMALL_VARIANTS = 150
NUM_RANDOM_SEQUENCES = 60


def fnv1a(*parts):
    value = 0xcbf29ce484222325
    for byte in b"\xff".join(parts):
        value = (value ^ byte) * 0x100000001b3 & 0xffffffffffffffff
    return f"{value >> 40:06x}"


def bytes_of_ids(ids):
    return b"".join(id.to_bytes(4, "little") for id in ids)


def random_ids(seed, size):
    """A generator that the test has too: a linear congruence modulo 2^31."""
    ids = []
    for _ in range(24):
        seed = (seed * 1103515245 + 12345) % 2**31
        ids.append((seed >> 8) % size)
    return ids


def expectations(spec, lines, checks_all):
    tokenizer = Tokenizer.from_str(json.dumps(spec))

    def encode(line, with_special):
        return tokenizer.encode(line, add_special_tokens=with_special).ids

    def decode(ids, skips_special):
        return tokenizer.decode(ids, skip_special_tokens=skips_special)

    explicit = [{"ids": encode(line, True), "text": decode(encode(line, True), True)}
                for line in TRICKY_LINES] if checks_all else []
    hashes = []
    for line in lines if checks_all else lines[:NUM_LINES_OF_SMALL_VARIANTS]:
        ids = encode(line, False)
        hashes.append(fnv1a(bytes_of_ids(ids), decode(ids, True).encode(),
                            decode(ids, False).encode()))
    size = max(tokenizer.get_vocab().values()) + 1
    random_hashes = [fnv1a(decode(random_ids(seed, size), True).encode())
                     for seed in range(NUM_RANDOM_SEQUENCES)]
    return {"size": size, "explicit": explicit, "hashes": "".join(hashes),
            "random_hashes": "".join(random_hashes)}


def changed(spec, changes):
    result = dict(spec)
    for key, value in changes.items():
        result[key] = {**spec["model"], **value} if key == "model" else value
    return result


# --- chat templates ---

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}")
LLAMA2_STYLE = (
    "{% if messages[0]['role'] == 'system' %}{% set turns = messages[1:] %}"
    "{% set system = messages[0]['content'] %}{% else %}{% set turns = messages %}"
    "{% set system = false %}{% endif %}{% for turn in turns %}"
    "{% if (turn['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system != false %}"
    "{% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + turn['content'] %}"
    "{% else %}{% set content = turn['content'] %}{% endif %}{% if turn['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif turn['role'] == 'assistant' %}"
    "{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}")
LLAMA3_STYLE = """{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined and false %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}

{#- The system message goes first. #}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {{- message.tool_calls[0].function.arguments | tojson }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
MISTRAL_STYLE = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace(index=0) %}
{%- for message in loop_messages %}
    {%- if not (message.role == "tool" or (message.tool_calls is defined and message.tool_calls is not none)) %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("conversation roles must alternate user/assistant") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported, but got " ~ message.role) }}
    {%- endif %}
{%- endfor %}
{{- "|" ~ user_messages|length }}
"""
REASONING_STYLE = """{%- set ns = namespace(last_query=messages|length - 1, found=false) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if not ns.found and message.role == "user" and message.content is string and not(message.content.startswith('<tool>') and message.content.endswith('</tool>')) %}
        {%- set ns.found = true %}
        {%- set ns.last_query = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if message.role == "assistant" %}
        {%- set reasoning = '' %}
        {%- if '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query and (loop.last or reasoning) %}
            {{- '<|im_start|>assistant\\n<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' + content }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + content }}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""

CONVERSATIONS = [
    [("user", "Hi")],
    [("system", " Be brief. "), ("user", "What is 2 + 2?")],
    [("user", " One\n"), ("assistant", " Two "), ("user", "Three – 三")],
    [("system", "S"), ("user", "A"), ("assistant", "<think>\nhm\n</think>\n\nB"), ("user", "C"),
     ("assistant", "<think>why\n</think>D")],
    [("assistant", "first"), ("user", "second")],
    [("user", "a"), ("user", "b")],
]

# Pieces of the language, each rendered with the third conversation.
SNIPPETS = [
    "a\n{% if true %}\nb\n{% endif %}\nc\n",
    "  {% if true %}  x  {% endif %}  \n  y",
    "x  {%- if true -%}  y  {%- endif -%}  z",
    "x {%+ if true %} y {% endif +%}\n z",
    "  {{ 1 }}  \n  {{- 2 -}}  \n 3",
    "a {# note #}\n  {#- other -#}  b\n\n",
    "a\r\n{% set x = 1 %}\r\n{{ x }}\r",
    "{{ '{%' }}{{ \"}}\" }}{{ {'a': {'b': 1}}['a']['b'] }}",
    "{% for m in messages %}{{ loop.index }}/{{ loop.length }}{{ loop.first }}{{ loop.last }} {% endfor %}",
    "{% for m in messages %}{{ loop.revindex }}{{ loop.revindex0 }}{{ loop.previtem.role if loop.previtem is defined }}{{ loop.nextitem.role if not loop.last }};{% endfor %}",
    "{% for m in messages if m.role == 'user' %}{{ loop.index0 }}{{ m.content }}{% else %}none{% endfor %}",
    "{% for m in messages if m.role == 'nobody' %}x{% else %}none{% endfor %}",
    "{% for m in messages %}{% if loop.index == 2 %}{% continue %}{% endif %}{{ m.role }}{% if m.role == 'x' %}{% break %}{% endif %}{% endfor %}",
    "{% for i in range(5) %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}{{ range(2, 8, 3)|join('-') }}",
    "{% for k, v in {'a': 1, 'b': 2}.items() %}{{ k }}={{ v }};{% endfor %}{{ {'a': 1}.get('b', 'c') }}{{ {'a': 1}.get('z') }}",
    "{% for k, v in messages[0]|items %}{{ k }}{{ v }}{% endfor %}{{ messages[0].keys()|list|length }}",
    "{% set x = 1 %}{% for i in [1, 2] %}{% set x = x + i %}{{ x }}{% endfor %}{{ x }}",
    "{% set ns = namespace(x=1) %}{% for i in [1, 2] %}{% set ns.x = ns.x + i %}{% set ns.y = i %}{% endfor %}{{ ns.x }}{{ ns.y }}",
    "{% set x %}a{{ 1 + 1 }}b{% endset %}{{ x|upper }}{{ x|length }}",
    "{% set a, b = 1, 'x' %}{{ a }}{{ b }}{% set (c, d) = (3, 4) %}{{ c * d }}",
    "{{ 7 // 2 }} {{ -7 // 2 }} {{ 7 % 3 }} {{ -7 % 3 }} {{ 7 % -3 }} {{ 2 + 3 * 4 - 1 }} {{ (2 + 3) * 4 }} {{ -3 + 1 }}",
    "{{ 'ab' * 3 }}{{ 'a' ~ 1 ~ none ~ true }}{{ 'a' 'b' }}{{ [1] + [2, 3] == [1, 2, 3] }}",
    "{{ 1 < 2 <= 2 < 3 }}{{ 1 < 2 < 2 }}{{ 'a' < 'b' }}{{ 'Z' > 'a' }}{{ 1 == true }}{{ '1' == 1 }}{{ none == none }}",
    "{{ 'a' in 'cat' }}{{ 'x' not in 'cat' }}{{ 2 in [1, 2] }}{{ 'role' in messages[0] }}{{ 'a' in missing }}",
    "{{ not true or true and false }}{{ (not false) and 'x' or 'y' }}{{ '' or 'z' }}{{ 0 and 1 }}",
    "{{ 'a' if 1 else 'b' }}{{ 'a' if 0 else 'b' if 0 else 'c' }}{{ 'x' if false }}",
    "{{ missing }}{{ missing is defined }}{{ messages[0].missing is undefined }}{{ messages[9] is defined }}{{ tools is none }}{{ tools is not none }}",
    "{{ 'x' is string }}{{ 1 is string }}{{ messages is sequence }}{{ messages[0] is mapping }}{{ 'a' is iterable }}{{ 3 is number }}{{ true is integer }}{{ true is boolean }}",
    "{{ 3 is odd }}{{ 3 is even }}{{ 9 is divisibleby 3 }}{{ 9 is divisibleby(2) }}{{ 1 is eq 1 }}{{ 'a' is in ['a'] }}{{ not 1 is ne(1) }}",
    "{{ 'abcde'[1] }}{{ 'abcde'[-1] }}{{ 'abcde'[1:3] }}{{ 'abcde'[::-1] }}{{ 'abcde'[:-2] }}{{ 'abcde'[::2] }}{{ 'añ語😀'[2:] }}",
    "{{ messages[-1].role }}{{ messages[:2]|length }}{{ messages[5:]|length }}{{ messages[::-1][0].content }}{{ messages[1:]|first|tojson }}",
    "{{ '  x '|trim }}|{{ 'xxaxx'.strip('x') }}|{{ '  a'.lstrip() }}|{{ 'b  '.rstrip() }}|{{ ' \\n\\t\\u00a0x' | trim }}",
    "{{ 'a,b,,c'.split(',')|join('+') }}|{{ ' a  b '.split()|join('+') }}|{{ 'a b c'.split(' ', 1)[1] }}|{{ 'abc'.split('x')|length }}",
    "{{ 'straße'.upper() }}{{ 'ÀÉ'.lower() }}{{ 'hello world'.title() }}{{ 'hELLO'.capitalize() }}{{ 'ab'|upper }}{{ 'AB'|lower }}{{ 'hello'|capitalize }}",
    "{{ 'abc'.startswith('ab') }}{{ 'abc'.endswith('bc') }}{{ 'aXbX'.replace('X', '-') }}{{ 'aa'|replace('a', 'b') }}",
    "{{ 'añ語😀'|length }}{{ [1, 2]|length }}{{ messages|count }}{{ missing|length }}{{ {}|length }}",
    "{{ missing|default('d') }}{{ ''|default('e') }}{{ ''|default('f', true) }}{{ none|d('g') }}{{ missing|default }}",
    "{{ [3, 1, 2]|join(', ') }}{{ 'abc'|join('.') }}{{ [1, 2]|first }}{{ [1, 2]|last }}{{ 'abc'|list|last }}{{ messages|join('/', attribute='role') }}",
    "{{ messages|map(attribute='role')|join(',') }}{{ ['a', 'b']|map('upper')|join }}{{ messages|rejectattr('role', 'equalto', 'user')|list|length }}{{ messages|selectattr('content')|list|length }}",
    "{{ {'a': [1, none, true], 'b': {'c': 'é\"\\n'}}|tojson }}{{ []|tojson }}{{ {}|tojson }}{{ 'x'|tojson }}",
    "{{ {'a': [1, {'b': []}], 'c': {}}|tojson(indent=2) }}",
    "{{ 5|string + 'x' }}{{ '12'|int + 1 }}{{ 'x'|int }}{{ 'a'|safe }}",
    "{{ 'a\\tb\\\\c\\'d\\x41\\u00e9' }}{{ \"q'q\" }}{{ '\\d' }}",
    "{% macro greet(name, mark='!') %}Hi {{ name }}{{ mark }}{% endmacro %}{{ greet('A') }}{{ greet(name='B', mark='?') }}{% for m in messages %}{{ greet(m.role) }}{% endfor %}",
    "{% macro m(x) %}{% if x > 0 %}{{ x }}{{ m(x - 1) }}{% endif %}{% endmacro %}{{ m(3)|length }}{{ m(2) }}",
    "{% generation %}a{% endgeneration %}b",
    "{{ (1, 2)[1] }}{{ ()|length }}{{ (1)|string }}{{ [1, 2,][0] }}{{ messages.0.role }}",
    "{{ dict(a=1).a }}{{ loop is defined }}{{ True }}{{ False }}{{ None }}",
    "{{ - 2 * 3 }}{{ 'a' + 'b'|upper }}{{ 1 + 2|string|length }}{{ 'x'|upper == 'X' }}{{ not 'x' is string }}",
    "{{ messages[0]['missing']['deeper'] }}",
    "{{ missing.attribute }}",
    "{{ 'a' + 1 }}",
    "{{ 1 // 0 }}",
    "{{ raise_exception('no ' ~ messages|length) }}",
    "{% for x in 5 %}{% endfor %}",
    "{{ missing() }}",
    "{% if %}{% endif %}",
    "{% for m in messages %}",
    "{{ 'open }}",
    "{{ 1 + }}",
    "{% endif %}",
    "{{ (1 }}",
    "{# open",
    "{% else %}",
]


def chat_environment():
    """As transformers sets it up."""

    class Generation(jinja2.ext.Extension):
        tags = {"generation"}

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message):
        raise jinja2.exceptions.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                          sort_keys=sort_keys)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    return environment


def render(environment, template, conversation, adds_generation_prompt):
    messages = [{"role": role, "content": content} for role, content in conversation]
    try:
        text = environment.from_string(template).render(
            messages=messages, add_generation_prompt=adds_generation_prompt, bos_token="<bos>",
            eos_token="<eos>", tools=None, documents=None)
    except Exception as error:  # whatever a template does wrong
        return {"error": str(error)}
    return {"text": text}


def make_chat_cases():
    environment = chat_environment()
    fixtures = []
    templates = {"chatml": CHATML, "llama2": LLAMA2_STYLE, "llama3": LLAMA3_STYLE,
                 "mistral": MISTRAL_STYLE, "reasoning": REASONING_STYLE}
    for name, template in templates.items():
        cases = [{"messages": conversation, "add_generation_prompt": adds_generation_prompt,
                  **render(environment, template, conversation, adds_generation_prompt)}
                 for conversation in CONVERSATIONS for adds_generation_prompt in (False, True)]
        fixtures.append({"name": name, "template": template, "cases": cases})
    for i, snippet in enumerate(SNIPPETS):
        case = {"messages": CONVERSATIONS[2], "add_generation_prompt": False,
                **render(environment, snippet, CONVERSATIONS[2], False)}
        fixtures.append({"name": f"snippet {i}", "template": snippet, "cases": [case]})
    return fixtures


def write(name, value):
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    (OUT / name).write_bytes(text.encode() + b"\n")
    print(f"{name}: {len(text.encode())} bytes")


def main():
    OUT.mkdir(parents=True, exist_ok=True)
    lines = make_corpus()
    write("corpus.json", lines)
    training_lines = lines[len(TRICKY_LINES):400]
    specs = {"byte_bpe": with_string_merges(train_byte_bpe(training_lines)),
             "sentencepiece_bpe": train_sentencepiece_bpe(training_lines),
             "wordpiece": make_wordpiece(training_lines)}
    for name, spec in specs.items():
        write(f"{name}.json", spec)
    write("variants.json", [
        {"name": name, "base": base, "changes": changes,
         **expectations(changed(specs[base], changes), lines, checks_all)}
        for name, base, changes, checks_all in make_variants(specs)])
    write("chat_templates.json", make_chat_cases())


if __name__ == "__main__":
    main()
