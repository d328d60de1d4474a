"""What training minimises. Losses over a vocabulary are computed with their gradients, a few rows
at a time, so that the logits of a whole batch are never held."""

import functools

import torch
from torch import nn
from torch.nn import functional as F

CHUNK_ROWS = {"cpu": 256, "cuda": 8192}


def _log_softmax(logits: torch.Tensor) -> torch.Tensor:
    """In fp32 at least."""
    return torch.log_softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))


def divergence(student: torch.Tensor, teacher: torch.Tensor):
    """sum over rows of KL(teacher || student) of logits [rows, vocabulary], and its gradient by
    `student`."""
    log_student = _log_softmax(student)
    log_teacher = _log_softmax(teacher)
    probability = log_teacher.exp()
    loss = (probability * (log_teacher - log_student)).sum()
    return loss, (log_student.exp() - probability).to(student.dtype)


def cross_entropy(student: torch.Tensor, targets: torch.Tensor):
    """sum over rows of -log p(target), and its gradient by `student`."""
    log_student = _log_softmax(student)
    loss = -log_student.gather(-1, targets.unsqueeze(-1)).sum()
    index = torch.arange(student.shape[-1], device=student.device)
    is_target = index == targets.unsqueeze(-1)
    return loss, (log_student.exp() - is_target.to(log_student.dtype)).to(student.dtype)


@functools.cache
def _fused(function):
    return torch.compile(function, dynamic=False)


def on_device(function, tensor: torch.Tensor):
    """`function` with its passes over the logits fused, where the device rather than compiling
    takes the time."""
    return _fused(function) if tensor.device.type == "cuda" else function


def backward_through_head(model, rows: torch.Tensor, loss_of, weight) -> torch.Tensor:
    """Runs the head on hidden `rows` [rows, hidden] at the model's level, chunk by chunk, and the
    backward pass of weight x the mean of `loss_of(logits, chunk)`, a slice of rows. The mean."""
    leaf = rows.detach().requires_grad_()
    total = 0.0
    size = CHUNK_ROWS[rows.device.type]
    for begin in range(0, len(rows), size):
        chunk = slice(begin, begin + size)
        with model.precision():
            logits = model.head(leaf[chunk])
        with torch.no_grad():
            loss, grad = loss_of(logits, chunk)
        logits.backward(grad.mul_(weight / len(rows)))
        total += loss
    rows.backward(leaf.grad)
    return total / len(rows)


class FlexRank:
    """KL to the full level at one sampled level, T = 1 (methods: FlexRank, 3)."""

    def __init__(self, teacher, levels: list[int]):
        del levels
        self.teacher = teacher

    def parameters(self) -> list[nn.Parameter]:
        return []

    def step(self, model, level: int, batches, share: float, run) -> list[torch.Tensor]:
        """Adds `share` of the gradient of each batch's loss at a level; the losses. `run` maps a
        function over lists, side by side where it likes."""
        model.set_level(level)

        def learn(batch):
            with torch.no_grad():
                taught = self.teacher.hidden(batch.tokens).flatten(0, 1)

            def loss_of(logits, chunk):
                with model.precision():
                    expected = self.teacher.head(taught[chunk])
                return on_device(divergence, logits)(logits, expected)

            rows = model.hidden(batch.tokens).flatten(0, 1)
            return backward_through_head(model, rows, loss_of, share)

        losses = list(run(learn, batches))
        model.spread_gradients()
        return losses


class NestedSubspaces:
    """Next-token losses of an anchor, the dearest level, and of a sampled one, each weighed by a
    learned variance: e^-s CE + s (methods: Nested Subspace Networks). The loss is their mean CE."""

    def __init__(self, teacher, levels: list[int]):
        self.anchor = max(levels)
        self.log_variances = nn.Parameter(torch.zeros(len(teacher.artifact.levels)))

    def parameters(self) -> list[nn.Parameter]:
        return [self.log_variances]

    def step(self, model, level: int, batches, share: float, run) -> list[torch.Tensor]:
        totals = [0.0] * len(batches)
        grad = torch.zeros_like(self.log_variances)
        pair = [self.anchor] if level == self.anchor else [self.anchor, level]
        for at in pair:
            weight = torch.exp(-self.log_variances[at].detach()).to(model.device)
            model.set_level(at)

            def learn(batch, weight=weight):
                targets = batch.tokens[:, 1:].flatten()
                rows = model.hidden(batch.tokens)[:, :-1].flatten(0, 1)
                return backward_through_head(
                    model,
                    rows,
                    lambda logits, chunk: on_device(cross_entropy, logits)(logits, targets[chunk]),
                    weight * share,
                )

            for i, loss in enumerate(run(learn, batches)):
                grad[at] += share * (1 - weight * loss).cpu()
                totals[i] += loss / len(pair)
            model.spread_gradients()
        held = self.log_variances.grad
        self.log_variances.grad = grad if held is None else held + grad
        return totals


class Embeddings:
    """1 - cosine to the full level's sentence embeddings, at one sampled level of an encoder."""

    def __init__(self, teacher, levels: list[int]):
        del levels
        self.teacher = teacher

    def parameters(self) -> list[nn.Parameter]:
        return []

    def step(self, model, level: int, batches, share: float, run) -> list[torch.Tensor]:
        model.set_level(level)

        def learn(batch):
            with torch.no_grad():
                taught = self.teacher.embeddings(batch.tokens, batch.mask)
            loss = 1 - (model.embeddings(batch.tokens, batch.mask) * taught).sum(-1).mean()
            (share * loss).backward()
            return loss.detach()

        losses = list(run(learn, batches))
        model.spread_gradients()
        return losses
