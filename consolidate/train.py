"""The training loop: one optimiser step after the other, with a log, checkpoints, and a stop where
the loss diverges."""

import dataclasses
import json
import math
import os
import pathlib
import sys
import time
from concurrent import futures

import torch

from consolidate import delta


class Diverged(RuntimeError):
    """Says where the last good state is."""


@dataclasses.dataclass
class Settings:
    levels: list[int]  # indices of artifact.levels, each as often as it is to be drawn
    steps: int | None = None  # how long to train: optimiser steps,
    minutes: float | None = None  # or time; the learning rate follows whichever is nearer its end
    batch: int = 8  # windows of a step
    micro_batch: int = 2  # of one pass
    workers: int = 1  # passes side by side, each on threads of its own; all at one level
    learning_rate: float = 2e-3
    last_learning_rate: float = 0.05  # share of it at the end
    warm_up: int = 10
    clip: float = 1.0
    checkpoint_steps: int = 20
    held_out_steps: int = 20
    divergence: float = 3.0  # stops where a step's loss is so many times the running mean
    seed: int = 1


def learning_rate_at(settings: Settings, step: int, progress: float) -> float:
    """Linear warm-up, then a cosine down to the last share."""
    floor = settings.last_learning_rate
    rate = floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return settings.learning_rate * rate * min(1.0, (step + 1) / max(settings.warm_up, 1))


class Trainer:
    """Trains the parameters of `model` that require gradients. `directory` holds what a run leaves:
    checkpoint.pt (replaced as a whole) and log.jsonl. `judge` may be None: nothing is held out.
    `start` says what the parameters began with, for a run that resumes."""

    def __init__(
        self, model, text, objective, sampler, judge, settings: Settings, directory, start=""
    ):
        self.model, self.text, self.objective = model, text, objective
        self.sampler, self.judge, self.settings = sampler, judge, settings
        self.directory = pathlib.Path(directory)
        self.start = start
        self.directory.mkdir(parents=True, exist_ok=True)
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimiser = torch.optim.AdamW(
            list(self.parameters.values()) + objective.parameters(),
            lr=0.0,
            betas=(0.9, 0.95),
            weight_decay=0.0,
            fused=model.device.type == "cuda",
        )
        self.step = 0
        self.elapsed = 0.0  # seconds, of earlier runs too
        self.mean_losses = {}  # running, by level
        self._started = time.monotonic()
        self._workers = futures.ThreadPoolExecutor(
            settings.workers,
            initializer=torch.set_num_threads,
            initargs=(max(1, torch.get_num_threads() // settings.workers),),
        )

    @property
    def checkpoint_path(self):
        return self.directory / "checkpoint.pt"

    def progress(self) -> float:
        shares = [0.0]
        if self.settings.steps:
            shares.append(self.step / self.settings.steps)
        if self.settings.minutes:
            seconds = self.elapsed + time.monotonic() - self._started
            shares.append(seconds / (60 * self.settings.minutes))
        return max(shares)

    def save(self):
        state = {
            "step": self.step,
            "elapsed": self.elapsed + time.monotonic() - self._started,
            "mean_losses": self.mean_losses,
            "settings": dataclasses.asdict(self.settings),
            "start": self.start,
            "source_sha256": self.model.artifact.sha256,
            "parameters": {name: p.detach() for name, p in self.parameters.items()},
            "objective": [p.detach() for p in self.objective.parameters()],
            "optimiser": self.optimiser.state_dict(),
        }
        partial = self.checkpoint_path.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, self.checkpoint_path)

    def resume(self) -> bool:
        """Goes on from the checkpoint; whether there is one."""
        if not self.checkpoint_path.exists():
            return False
        state = torch.load(self.checkpoint_path, weights_only=True)
        if state["source_sha256"] != self.model.artifact.sha256:
            raise ValueError(f"{self.checkpoint_path}: is of another checkpoint's artifact")
        if state.get("start", "") != self.start:
            raise ValueError(
                f"{self.checkpoint_path}: its run started from another delta, or from none; "
                "expected the same --start, or another --work"
            )
        shapes = {name: value.shape for name, value in state["parameters"].items()}
        if shapes != {name: p.shape for name, p in self.parameters.items()}:
            raise ValueError(f"{self.checkpoint_path}: holds other parameters than train now")
        with torch.no_grad():
            for name, value in state["parameters"].items():
                self.parameters[name].copy_(value)
            for parameter, value in zip(self.objective.parameters(), state["objective"]):
                parameter.copy_(value)
        self.optimiser.load_state_dict(state["optimiser"])
        self.step, self.elapsed = state["step"], state["elapsed"]
        self.mean_losses = state.get("mean_losses", {})
        print(f"going on at step {self.step}", file=sys.stderr)
        return True

    def log(self, **entry):
        with open(self.directory / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def _batch(self, number: int):
        return self.text.batch(number, self.settings.micro_batch).to(self.model.device)

    def _pass(self, level: int, first: int, share: float) -> torch.Tensor:
        """The mean loss at a level of a batch for each worker, from number `first` on."""
        batches = [self._batch(number) for number in range(first, first + self.settings.workers)]
        losses = self.objective.step(self.model, level, batches, share, self._workers.map)
        return sum(losses) / len(losses)

    def _check(self, levels: list[int], losses: list[float], norm: float):
        """Diverged where a loss is not finite, or far above the running mean of its level."""
        for level, loss in zip(levels, losses):
            mean = self.mean_losses.get(level, loss)
            if (
                math.isfinite(loss)
                and math.isfinite(norm)
                and (self.step < self.settings.warm_up or loss <= self.settings.divergence * mean)
            ):
                continue
            self.log(step=self.step, levels=levels, losses=losses, norm=norm, diverged=True)
            kept = self.checkpoint_path
            raise Diverged(
                f"step {self.step}: loss {loss:.4g} of level {level}, running mean {mean:.4g}, norm "
                f"of the gradient {norm:.4g}: the loss diverges; stopped"
                + (
                    f", the last good state is {kept}"
                    if kept.exists()
                    else " before the first checkpoint"
                )
            )

    def _one_step(self) -> dict:
        settings = self.settings
        began = time.monotonic()
        progress = self.progress()
        rate = learning_rate_at(settings, self.step, progress)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        count = settings.batch // settings.micro_batch
        rounds = count // settings.workers
        levels = self.sampler.draw(self.step, rounds, progress)
        losses = []
        for turn, level in enumerate(levels):
            first = self.step * count + turn * settings.workers
            losses.append(self._pass(level, first, 1 / count))
        norm = torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), settings.clip).item()
        losses = [loss.item() for loss in losses]  # the step's only wait for the device is here
        self._check(levels, losses, norm)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        for level, loss in zip(levels, losses):
            mean = self.mean_losses.get(level, loss)
            self.mean_losses[level] = 0.9 * mean + 0.1 * loss
        self.step += 1
        tokens = settings.batch * self.text.length
        return {
            "step": self.step,
            "loss": sum(losses) / rounds,
            "levels": levels,
            "losses": losses,
            "norm": norm,
            "rate": rate,
            "progress": progress,
            "tokens_per_second": tokens / (time.monotonic() - began),
        }

    def start_terms(self, batches: int):
        """Starts the terms where the loss falls most, by the gradients of a few batches. With an
        input's second moment S = L L^T and G the gradient by the layer's weight, V is Q^T L^-1,
        Q the first right singular vectors of G L^-T: of all inputs z = V x of one variance those
        with the steepest loss (LoRA-GA, in the inputs' metric). z is scaled to the layer's outputs,
        so that a step changes every layer alike. U stays 0, so the model does not change."""
        terms = [nested for nested in self.model.nested if nested.delta_rank > 0]
        for nested in terms:
            nested.gather_gradients()
        for number, level in enumerate(self.sampler.draw(0, batches, 1.0)):
            self.objective.step(self.model, level, [self._batch(number)], 1.0, map)
        self.optimiser.zero_grad(set_to_none=True)
        for nested in terms:
            nested.start_delta()

    def run(self):
        """Trains to the end. Diverged where the loss does; the checkpoint is then the last good
        state."""
        settings = self.settings
        torch.manual_seed(settings.seed)
        if self.judge is not None:
            self._held_out()
        while self.progress() < 1:
            entry = self._one_step()
            self.log(**entry)
            print(
                f"step {entry['step']}: loss {entry['loss']:.4f}, "
                f"{100 * entry['progress']:.0f} %, {entry['tokens_per_second']:.0f} tokens/s",
                file=sys.stderr,
                flush=True,
            )
            if self.step % settings.checkpoint_steps == 0:
                self.save()
            if self.judge is not None and self.step % settings.held_out_steps == 0:
                self._held_out()
        self.save()
        if self.judge is not None:
            self._held_out()

    def _held_out(self):
        qualities = self.judge.qualities(self.model, sorted(set(self.settings.levels)))
        self.log(step=self.step, held_out=qualities)
        for path, by_level in qualities.items():
            shown = ", ".join(
                f"{self.model.artifact.levels[level].relative_flops:.2f}: {quality:.4f}"
                for level, quality in by_level.items()
            )
            print(f"  held out, {pathlib.Path(path).name}: {shown}", file=sys.stderr, flush=True)


def export_delta(model, levels: list[int], path):
    """Writes the trained term of every layer, and the levels that have them, as a delta file."""
    terms = {
        nested.layer.name: (nested.delta_a, nested.delta_bt)
        for nested in model.nested
        if nested.delta_rank > 0
    }
    delta.save(path, model.artifact, levels, terms)


def export_factors(model, levels: list[int], path):
    """Writes the trained prefix factors of every layer, as far as `levels` run them, as a delta
    file whose terms are all that these levels run."""
    terms = {}
    for i, nested in enumerate(model.nested):
        rank = max(model.artifact.levels[level].ranks[i] for level in levels)  # dense: 0
        terms[nested.layer.name] = (nested.prefix_a[:rank], nested.prefix_bt[:rank])
    delta.save(path, model.artifact, levels, terms, keeps_components=True)
