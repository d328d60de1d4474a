"""Text as batches of tokens: windows for a language model, sentences for an encoder. A batch is a
function of its number, so that a run that resumes reads on where it stopped with no state saved."""

import dataclasses
import functools
import pathlib
import random

import tokenizers
import torch

HELD_OUT_SHARE = 0.05
EVALUATION_BATCH = 4
PIECE = 1 << 20  # characters of a text that are encoded at a time


class DataError(ValueError):
    """Names the text and what is wrong with it."""


@dataclasses.dataclass(frozen=True)
class Batch:
    tokens: torch.Tensor  # [batch, length]
    mask: torch.Tensor | None = None  # the same; 0 is padding

    def to(self, device) -> "Batch":
        return Batch(self.tokens.to(device), None if self.mask is None else self.mask.to(device))


def load_tokenizer(directory) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer.from_file(str(pathlib.Path(directory) / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _read(path) -> str:
    try:
        text = pathlib.Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: {error}") from None
    return text


def _encode(text: str, tokenizer) -> torch.Tensor:
    """The tokens of a text, piece by piece between lines: pieces are encoded side by side, and a
    long text as one would take time by its square."""
    lines = text.splitlines(keepends=True)
    pieces, size = [[]], 0
    for line in lines:
        if size + len(line) > PIECE and pieces[-1]:
            pieces.append([])
            size = 0
        pieces[-1].append(line)
        size += len(line)
    encodings = tokenizer.encode_batch(["".join(p) for p in pieces], add_special_tokens=False)
    return torch.tensor([token for encoding in encodings for token in encoding.ids])


class _Texts:
    """Several texts as lists of items, which take turns; the last twentieth of each is held out."""

    def __init__(self, seed: int):
        self.seed = seed

    @functools.lru_cache(maxsize=64)
    def _order(self, text: int, epoch: int, count: int) -> list[int]:
        return random.Random(f"{self.seed}:{text}:{epoch}").sample(range(count), count)


class Windows(_Texts):
    """Windows of `length` tokens, at another offset in every epoch."""

    def __init__(self, paths, tokenizer, length: int, seed: int):
        super().__init__(seed)
        self.length, self._tokenizer = length, tokenizer
        self.texts, self._held_out = [], {}
        encoded = {}  # a text may be named several times
        for path in paths:
            if path not in encoded:
                encoded[path] = _encode(_read(path), tokenizer)
            tokens = encoded[path]
            cut = len(tokens) - max(int(HELD_OUT_SHARE * len(tokens)), length)
            if cut < 2 * length:
                raise DataError(
                    f"{path}: {len(tokens)} tokens; expected at least {3 * length}: two windows of "
                    f"{length} to train on and one held out"
                )
            self.texts.append(tokens[:cut])
            self._held_out[str(path)] = tokens[cut:]

    def _window(self, text: int, index: int) -> torch.Tensor:
        tokens = self.texts[text]
        per_epoch = (len(tokens) - self.length) // self.length
        epoch, place = divmod(index, per_epoch)
        begin = random.Random(f"{self.seed}:{text}:{epoch}").randrange(self.length)
        begin += self._order(text, epoch, per_epoch)[place] * self.length
        return tokens[begin : begin + self.length]

    def batch(self, number: int, size: int) -> Batch:
        """Batch `number` of `size` windows."""
        windows = []
        for position in range(number * size, (number + 1) * size):
            index, text = divmod(position, len(self.texts))
            windows.append(self._window(text, index))
        return Batch(torch.stack(windows))

    def held_out(self, count: int) -> dict[str, list[Batch]]:
        """At most `count` windows of each text's held-out part, evenly spread."""
        chosen = {}
        for path, tokens in self._held_out.items():
            windows = tokens[: len(tokens) // self.length * self.length].view(-1, self.length)
            windows = windows[:: max(1, len(windows) // count)][:count]
            chosen[path] = [Batch(part) for part in windows.split(EVALUATION_BATCH)]
        return chosen

    def held_out_text(self) -> str:
        """What is held out, of all texts."""
        return "\n".join(self._tokenizer.decode(t.tolist()) for t in self._held_out.values())


class Sentences(_Texts):
    """Lines with an encoder's special tokens, cut to `length`."""

    def __init__(self, paths, tokenizer, length: int, seed: int):
        super().__init__(seed)
        self.length = length
        self.texts, self._held_out = [], {}
        self._held_out_lines = []
        tokenizer.enable_truncation(length)
        self._padding = tokenizer.token_to_id("[PAD]") or 0
        for path in paths:
            lines = [line for line in _read(path).splitlines() if line.strip()]
            ids = [encoding.ids for encoding in tokenizer.encode_batch(lines)]
            cut = len(ids) - max(int(HELD_OUT_SHARE * len(ids)), 3)
            self._held_out_lines += lines[cut:]
            if cut < 3:
                raise DataError(f"{path}: {len(ids)} lines; expected at least 6")
            self.texts.append(ids[:cut])
            self._held_out[str(path)] = ids[cut:]

    def _batch_of(self, lines: list[list[int]]) -> Batch:
        length = max(map(len, lines))
        tokens = torch.full((len(lines), length), self._padding)
        mask = torch.zeros(len(lines), length, dtype=torch.long)
        for i, ids in enumerate(lines):
            tokens[i, : len(ids)] = torch.tensor(ids)
            mask[i, : len(ids)] = 1
        return Batch(tokens, mask)

    def batch(self, number: int, size: int) -> Batch:
        """Batch `number` of `size` lines."""
        lines = []
        for position in range(number * size, (number + 1) * size):
            index, text = divmod(position, len(self.texts))
            epoch, place = divmod(index, len(self.texts[text]))
            order = self._order(text, epoch, len(self.texts[text]))
            lines.append(self.texts[text][order[place]])
        return self._batch_of(lines)

    def held_out(self, count: int) -> dict[str, list[Batch]]:
        """At most `count` neighbouring lines of each text's held-out part, in batches of 16."""
        return {
            path: [
                self._batch_of(lines[i : i + 16]) for i in range(0, min(count, len(lines)) - 1, 16)
            ]
            for path, lines in self._held_out.items()
        }

    def held_out_text(self) -> str:
        """What is held out, of all texts."""
        return "\n".join(self._held_out_lines)
