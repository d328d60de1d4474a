"""The quality of levels on held-out text, by the definitions of docs/architecture.md, in the
arithmetic of training. What is reported of an artifact, `nestor evaluate` measures."""

import math

import torch
from torch.nn import functional as F

from consolidate.objectives import CHUNK_ROWS


@torch.no_grad()
def mean_loss(model, batches) -> float:
    """Mean -log p of tokens at the model's level, the first of each window unscored."""
    total, count = 0.0, 0
    for batch in batches:
        rows = model.hidden(batch.tokens)[:, :-1].flatten(0, 1)
        targets = batch.tokens[:, 1:].flatten()
        size = CHUNK_ROWS[rows.device.type]
        for begin in range(0, len(rows), size):
            chunk = slice(begin, begin + size)
            with model.precision():
                logits = model.head(rows[chunk])
            total += F.cross_entropy(logits.float(), targets[chunk], reduction="sum").item()
        count += len(targets)
    return total / count


@torch.no_grad()
def similarities(model, batches) -> torch.Tensor:
    """Cosines of each sentence with the next one of its batch."""
    cosines = []
    for batch in batches:
        embeddings = model.embeddings(batch.tokens, batch.mask)
        cosines.append((embeddings[1:] * embeddings[:-1]).sum(-1))
    return torch.cat(cosines)


def spearman(a: torch.Tensor, b: torch.Tensor) -> float:
    """Rank correlation; ties in the order in which they stand."""
    ranks = torch.stack([values.argsort().argsort().double() for values in (a, b)])
    return torch.corrcoef(ranks)[0, 1].item()


class Judge:
    """Quality of levels on held-out batches by text; the full level's part is measured once."""

    def __init__(self, teacher, held_out: dict):
        self.teacher, self.held_out = teacher, held_out
        self._full = {}

    def _measure(self, model, name: str):
        measure = similarities if model.is_encoder else mean_loss
        return measure(model, self.held_out[name])

    def qualities(self, model, levels) -> dict[str, dict[int, float]]:
        """By text and level: perplexity(full) / perplexity(level); of an encoder Spearman to the
        full level's own similarities."""
        with torch.compiler.set_stance("force_eager"):  # windows here are of other shapes
            return self._qualities(model, levels)

    def _qualities(self, model, levels) -> dict[str, dict[int, float]]:
        found = {}
        for name in self.held_out:
            if name not in self._full:
                self._full[name] = self._measure(self.teacher, name)
            found[name] = {}
            for level in levels:
                model.set_level(level)
                measured = self._measure(model, name)
                found[name][level] = (
                    spearman(measured, self._full[name])
                    if model.is_encoder
                    else math.exp(self._full[name] - measured)
                )
        return found
