"""Text that the full level of a language model writes itself, many windows side by side."""

import math
import os
import pathlib
import sys

import jinja2
import torch
import transformers
from transformers.cache_utils import Cache, DynamicLayer

from consolidate import prompts
from consolidate.data import DataError, Windows, load_tokenizer

PROMPT_TOKENS = 4  # that a window takes from a given text
TEMPERATURES = (0.6, 1.0)  # of windows, evenly between: from plain prose to odd words
WINDOWS_ON_CPU = 16  # side by side
MOST_WINDOWS = 4096  # the same on a GPU whose memory holds more


class _RoomyLayer(DynamicLayer):
    """A layer of the cache with room for all tokens from the first on, where its parent copies all
    it holds for every token."""

    def __init__(self, room: int):
        super().__init__()
        self._room, self._filled = room, 0

    def update(self, key_states, value_states, *args, **kwargs):
        del args, kwargs
        states = (key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            # Under autocast rotated keys are fp32, though attention takes them as it takes values.
            dtype = value_states.dtype
            self._stores = [
                torch.empty(*s.shape[:2], self._room, s.shape[3], dtype=dtype, device=s.device)
                for s in states
            ]
        begin, self._filled = self._filled, self._filled + key_states.shape[2]
        for store, new in zip(self._stores, states):
            store[:, :, begin : self._filled] = new
        self.keys, self.values = (store[:, :, : self._filled] for store in self._stores)
        return self.keys, self.values


class _Follow(transformers.LogitsProcessor):
    """Keeps each row to what it begins with as far as that goes, and to its temperature."""

    def __init__(self, begins: list[list[int]], device):
        tokens = torch.full((len(begins), max(map(len, begins))), -1)
        for row, begin in zip(tokens, begins):
            row[: len(begin)] = torch.tensor(begin)
        self._tokens = tokens.to(device)
        pairs = torch.arange(len(begins), device=device) // 2  # one of each kind
        low, high = TEMPERATURES
        self._temperatures = (low + (high - low) * pairs / max(1, pairs[-1])).unsqueeze(1)

    def __call__(self, input_ids, scores):
        at = input_ids.shape[1]
        scores = scores / self._temperatures
        if at >= self._tokens.shape[1]:
            return scores
        given = self._tokens[:, at, None]
        only = torch.full_like(scores, -math.inf).scatter_(1, given.clamp(min=0), 0.0)
        return torch.where(given >= 0, only, scores)


def questions(directory, count: int, seed: int) -> list[list[int]]:
    """Prompts that ask for text (prompts.messages) by the chat template in an artifact's directory,
    up to where the answer begins; none where there is no template. DataError where it fails."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
        if tokenizer.chat_template is None:
            return []
        texts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": message}], tokenize=False, add_generation_prompt=True
            )
            for message in prompts.messages(count, seed)
        ]
    except (ImportError, ValueError, jinja2.TemplateError) as error:
        raise DataError(f"{directory}: its tokenizer's chat template: {error}") from None
    encodings = load_tokenizer(directory).encode_batch(texts, add_special_tokens=False)
    return [encoding.ids for encoding in encodings]


def _begins(model, starts: Windows, count: int, seed: int) -> list[list[int]]:
    """What `count` windows begin with: the first words of one of `starts` and a question, by turns;
    words alone where the model answers none, or a question would fill half of the window."""
    begins = starts.batch(0, count).tokens[:, :PROMPT_TOKENS].tolist()
    asked = questions(model.artifact.directory, count // 2, seed)
    fitting = {
        2 * pair + 1: question
        for pair, question in enumerate(asked)
        if len(question) < starts.length // 2
    }
    for number, question in fitting.items():
        begins[number] = question
    print(
        f"sampling {count} windows of {starts.length} tokens: {len(fitting)} answer a question",
        file=sys.stderr,
    )
    return begins


def _windows_at_once(model, length: int) -> int:
    """On a GPU, what half of its free memory holds."""
    if model.device.type == "cpu":
        return WINDOWS_ON_CPU
    config = model.model.config
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    with model.precision():
        item = 2 if torch.is_autocast_enabled(model.device.type) else 4
    cached = length * config.num_hidden_layers * 2 * heads * width * item
    logits = 4 * 4 * config.vocab_size  # four copies in fp32 where one is chosen
    free, _ = torch.cuda.mem_get_info(model.device)
    return max(2, min(MOST_WINDOWS, free // 2 // (cached + logits)))


def _write(model, begins: list[list[int]], length: int) -> list[list[int]]:
    """The tokens of windows of `length` that begin so."""
    known = torch.tensor([b[: min(map(len, begins))] for b in begins], device=model.device)
    cache = Cache([_RoomyLayer(length) for _ in range(model.model.config.num_hidden_layers)])
    with model.precision():
        written = model.model.generate(
            known,
            attention_mask=torch.ones_like(known),
            do_sample=True,
            temperature=1.0,  # _Follow has it
            top_k=0,
            top_p=1.0,
            max_length=length,
            pad_token_id=0,
            use_cache=True,
            past_key_values=cache,
            logits_processor=transformers.LogitsProcessorList([_Follow(begins, model.device)]),
        )
    return written.tolist()


@torch.no_grad()
def sample_text(model, starts: Windows, tokens: int, path, batch=None, seed=1):
    """Writes about `tokens` tokens of text that the full level makes up, in windows of the length
    of `starts`, `batch` (even) of them at a time, by way of PATH.partial. Half of the windows go on
    from first words of `starts`, the others answer questions; every second answer stands there
    without its question, as other prose does."""
    if starts.length <= PROMPT_TOKENS:
        raise DataError(f"windows of {starts.length} tokens: expected more than {PROMPT_TOKENS}")
    tokenizer = load_tokenizer(model.artifact.directory)
    count = math.ceil(tokens / starts.length)
    batch = (batch or _windows_at_once(model, starts.length)) // 2 * 2
    begins = _begins(model, starts, count, seed)
    torch.manual_seed(seed)
    model.set_level(model.full_level)
    model.model.generation_config.eos_token_id = None  # what follows the end of a text is text too
    pieces = []
    for first in range(0, count, batch):
        own = begins[first : first + batch]
        for number, ids in enumerate(_write(model, own, starts.length), first):
            begin = begins[number]
            is_answer = len(begin) > PROMPT_TOKENS
            without = len(begin) if is_answer and number % 4 == 3 else 0
            pieces.append(tokenizer.decode(ids[without:], skip_special_tokens=False))
    partial = f"{path}.partial"
    pathlib.Path(partial).write_text("\n\n".join(pieces), encoding="utf-8")
    os.replace(partial, path)
