"""What training minimises. Losses over a vocabulary are computed with their gradients, a few rows
at a time, so that the logits of a whole batch are never held."""

import torch
from torch import nn
from torch.nn import functional as F

CHUNK_ROWS = 256


def divergence(student: torch.Tensor, teacher: torch.Tensor):
    """sum over rows of KL(teacher || student) of logits [rows, vocabulary], and its gradient by
    `student`."""
    log_student = torch.log_softmax(student, -1)
    log_teacher = torch.log_softmax(teacher, -1)
    probability = log_teacher.exp()
    loss = (probability * log_teacher.sub_(log_student)).sum()
    return loss.item(), log_student.exp_().sub_(probability)


def cross_entropy(student: torch.Tensor, targets: torch.Tensor):
    """sum over rows of -log p(target), and its gradient by `student`."""
    log_student = torch.log_softmax(student, -1)
    loss = -log_student.gather(-1, targets.unsqueeze(-1)).sum()
    grad = log_student.exp_()
    grad.scatter_add_(-1, targets.unsqueeze(-1), grad.new_full((len(targets), 1), -1.0))
    return loss.item(), grad


def backward_through_head(model, rows: torch.Tensor, loss_of, weight: float) -> float:
    """Runs the head on hidden `rows` [rows, hidden] at the model's level, chunk by chunk, and the
    backward pass of weight x the mean of `loss_of(logits, chunk)`, a slice of rows. The mean."""
    leaf = rows.detach().requires_grad_()
    total = 0.0
    for begin in range(0, len(rows), CHUNK_ROWS):
        chunk = slice(begin, begin + CHUNK_ROWS)
        with model.precision():
            logits = model.head(leaf[chunk]).float()
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

    def step(self, model, level: int, batches, share: float, run) -> list[float]:
        """Adds `share` of the gradient of each batch's loss at a level; the losses. `run` maps a
        function over lists, side by side where it likes."""
        model.set_level(level)

        def learn(batch):
            with torch.no_grad():
                taught = self.teacher.hidden(batch.tokens).flatten(0, 1)

            def loss_of(logits, chunk):
                with model.precision():
                    return divergence(logits, self.teacher.head(taught[chunk]).float())

            rows = model.hidden(batch.tokens).flatten(0, 1)
            return backward_through_head(model, rows, loss_of, share)

        return list(run(learn, batches))


class NestedSubspaces:
    """Next-token losses of an anchor, the dearest level, and of a sampled one, each weighed by a
    learned variance: e^-s CE + s (methods: Nested Subspace Networks). The loss is their mean CE."""

    def __init__(self, teacher, levels: list[int]):
        self.anchor = max(levels)
        self.log_variances = nn.Parameter(torch.zeros(len(teacher.artifact.levels)))

    def parameters(self) -> list[nn.Parameter]:
        return [self.log_variances]

    def step(self, model, level: int, batches, share: float, run) -> list[float]:
        totals = [0.0] * len(batches)
        grad = torch.zeros_like(self.log_variances)
        pair = [self.anchor] if level == self.anchor else [self.anchor, level]
        for at in pair:
            weight = torch.exp(-self.log_variances[at]).item()
            model.set_level(at)

            def learn(batch, weight=weight):
                targets = batch.tokens[:, 1:].flatten()
                rows = model.hidden(batch.tokens)[:, :-1].flatten(0, 1)
                return backward_through_head(
                    model,
                    rows,
                    lambda logits, chunk: cross_entropy(logits, targets[chunk]),
                    weight * share,
                )

            for i, loss in enumerate(run(learn, batches)):
                grad[at] += share * (1 - weight * loss)
                totals[i] += loss / len(pair)
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

    def step(self, model, level: int, batches, share: float, run) -> list[float]:
        model.set_level(level)

        def learn(batch):
            with torch.no_grad():
                taught = self.teacher.embeddings(batch.tokens, batch.mask)
            loss = 1 - (model.embeddings(batch.tokens, batch.mask) * taught).sum(-1).mean()
            (share * loss).backward()
            return loss.item()

        return list(run(learn, batches))
