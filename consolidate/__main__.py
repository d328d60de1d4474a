"""Trains the nested levels of an artifact against its full level (docs/ladders.md)."""

import argparse
import ctypes
import hashlib
import os
import pathlib
import shutil
import sys

import torch
from safetensors import SafetensorError

from consolidate import delta, evaluate
from consolidate.artifact import Artifact, ArtifactError
from consolidate.data import DataError, Sentences, Windows, load_tokenizer
from consolidate.nested import NestedModel
from consolidate.objectives import Embeddings, FlexRank, NestedSubspaces
from consolidate.profiles import SAMPLERS
from consolidate.quality import Judge
from consolidate.sampling import sample_text
from consolidate.train import Diverged, Settings, Trainer, export_delta, export_factors

OBJECTIVES = {"flexrank": FlexRank, "nsn": NestedSubspaces, "embeddings": Embeddings}
# Of what trains; a term starts at zero and has far to go.
LEARNING_RATES = {"delta": 2e-3, "factors": 3e-4, "all": 3e-4}
NEAR = 0.03  # of relative FLOPs, for a level to be meant


class UsageError(ValueError):
    """Says which option is wrong."""


def parse(arguments):
    parser = argparse.ArgumentParser(
        prog="nestor-consolidate",
        description=__doc__,
        epilog="example: nestor-consolidate models/smollm2-135m-instruct.nested --text prose.txt "
        "--train delta --minutes 60 --out smollm2.delta.safetensors",
    )
    add = parser.add_argument
    add("artifact", help="directory that nestor compress wrote")
    add(
        "--text",
        action="append",
        required=True,
        help="plain text to train on, of an encoder one sentence a line; repeatable, texts take "
        "turns; the last twentieth of each is held out",
    )
    add(
        "--out",
        required=True,
        help="what to write: a delta file, or an artifact; of --train factors a delta file where "
        "it ends in .safetensors, which then holds all that the prefix ladder runs",
    )
    add(
        "--work",
        help="directory of checkpoint, log and sampled text (default: OUT.training); a "
        "run that finds a checkpoint there goes on with it",
    )
    add(
        "--objective",
        choices=sorted(OBJECTIVES),
        help="flexrank: KL to the full level; nsn: next tokens at an anchor and a sampled level, "
        "weighed by learned variances; embeddings: cosine to the full level's, of an encoder "
        "(default: flexrank, of an encoder embeddings)",
    )
    add(
        "--train",
        choices=("delta", "factors", "all"),
        default="delta",
        help="a low-rank term of every layer that all prefix levels share; the factors; or those "
        "with norms and biases",
    )
    add("--sampler", choices=sorted(SAMPLERS), default="uniform", help="of levels")
    add(
        "--levels",
        help="relative FLOPs of the levels to train, each as often as it is to be "
        "drawn, such as 0.9,0.8,0.8 (default: the whole prefix ladder)",
    )
    add(
        "--self-sample",
        type=int,
        default=0,
        metavar="TOKENS",
        help="text that the full level writes itself, from first words of the texts on and in "
        "answer to questions; one more to train on",
    )
    add(
        "--delta-bytes",
        type=float,
        default=7.7e6,
        help="most that the terms may take; 4 bytes a calibration token come on top",
    )
    add(
        "--start-batches",
        type=int,
        default=4,
        help="micro-batches whose gradients choose where terms start; 0: at random",
    )
    add(
        "--start",
        metavar="DELTA",
        help="goes on from this delta: its terms, whose size then counts, or its factors",
    )
    add("--steps", type=int, help="of the optimiser (default: --minutes alone counts)")
    add("--minutes", type=float, help="of time, pauses included")
    add("--batch", type=int, default=8, help="windows or sentences of a step")
    add("--micro-batch", type=int, default=2, help="of one pass")
    add(
        "--workers",
        type=int,
        default=1,
        help="passes side by side, which share the threads: on a busy machine they wait less",
    )
    add("--length", type=int, default=256, help="tokens of a window, most tokens of a sentence")
    add("--learning-rate", type=float, help="(default: 2e-3 for a delta, else 3e-4)")
    add("--warm-up", type=int, default=10, help="steps")
    add("--checkpoint-steps", type=int, default=20)
    add(
        "--checkpoint-activations",
        action="store_true",
        help="compute blocks anew in the backward pass: less memory, a third more work",
    )
    add("--held-out-steps", type=int, default=20, help="between measurements; 0: none")
    add("--held-out", type=int, default=6, help="windows or sentences of each text measured")
    on_gpu = torch.cuda.is_available()
    add("--device", default="cuda" if on_gpu else "cpu")
    add(
        "--compose",
        action=argparse.BooleanOptionalAction,
        default=on_gpu,
        help="make one matrix of each layer in every pass, for passes of thousands of tokens "
        "(default: on a GPU)",
    )
    add(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=on_gpu,
        help="compile the model's blocks, with --compose (default: on a GPU)",
    )
    add("--threads", type=int, default=os.cpu_count())
    add("--seed", type=int, default=1)
    add(
        "--export-only",
        action="store_true",
        help="write OUT from the last checkpoint and train no further",
    )
    add("--nestor", default="build/bin/nestor", help="measures an artifact that was written")
    add("--evaluation", help="text to measure it on (default: what is held out)")
    add("--evaluation-tokens", type=int, default=8192)
    add("--source", help="the checkpoint, for quality_vs_source")
    options = parser.parse_args(arguments)
    check(options)
    return options


def check(options):
    if options.steps is None and options.minutes is None and not options.export_only:
        raise UsageError("--steps or --minutes: one of them says how long to train")
    for name in (
        "steps",
        "minutes",
        "batch",
        "micro_batch",
        "workers",
        "length",
        "learning_rate",
        "checkpoint_steps",
        "threads",
        "delta_bytes",
    ):
        value = getattr(options, name)
        if value is not None and value <= 0:
            raise UsageError(f"--{name.replace('_', '-')}: must be positive; was {value}")
    if options.batch % (options.micro_batch * options.workers) != 0:
        raise UsageError(
            f"--batch: {options.batch} is no multiple of --micro-batch x --workers, "
            f"{options.micro_batch} x {options.workers}"
        )
    if options.train == "all" and writes_delta(options):
        raise UsageError(
            f"--out: {options.out}: a delta holds no norms and biases, which --train all trains"
        )
    if not writes_delta(options) and shutil.which(options.nestor) is None:
        raise UsageError(f"--nestor: {options.nestor} is no program; it measures what is written")
    if options.start is not None and not pathlib.Path(options.start).is_file():
        raise UsageError(f"--start: {options.start}: no such file")
    if pathlib.Path(options.out).is_dir():
        raise UsageError(f"--out: {options.out} exists already")


def writes_delta(options) -> bool:
    return options.train == "delta" or options.out.endswith(".safetensors")


def ladder_of(artifact: Artifact) -> list[int]:
    ladder = [i for i, level in enumerate(artifact.levels) if level.ladder == "prefix"]
    if not ladder:
        raise ArtifactError(f"{artifact.directory}: has no prefix ladder to train")
    return ladder


def levels_named(artifact: Artifact, text: str | None) -> list[int]:
    """Indices of the prefix levels at the given relative FLOPs."""
    ladder = ladder_of(artifact)
    if text is None:
        return ladder
    chosen = []
    for word in text.split(","):
        try:
            share = float(word)
        except ValueError:
            raise UsageError(f"--levels: expected numbers and commas; was {text!r}") from None
        nearest = min(ladder, key=lambda i: abs(artifact.levels[i].relative_flops - share))
        if abs(artifact.levels[nearest].relative_flops - share) > NEAR:
            has = ", ".join(f"{artifact.levels[i].relative_flops:.3f}" for i in ladder)
            raise UsageError(f"--levels: {share} is the FLOPs of no prefix level; there are {has}")
        chosen.append(nearest)
    return chosen


def read_start(model: NestedModel, options) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """What the delta to go on from holds, by layer name."""
    try:
        started = delta.load(options.start, model.artifact)
        stated = delta.calibration(options.start)
    except SafetensorError as error:
        raise ArtifactError(f"{options.start}: {error}") from error
    holds_terms = bool(stated)
    if holds_terms != (options.train == "delta"):
        holds, train = "factors, or terms that state no calibration", "factors"
        if holds_terms:
            holds, train = "terms", "delta"
        raise UsageError(f"--start: {options.start} holds {holds}; expected --train {train}")
    if holds_terms:
        own = model.artifact.calibration()
        if any(not torch.equal(own[name], tensor) for name, tensor in stated.items()):
            raise UsageError(
                f"--start: {options.start} was trained beside factors of another calibration than "
                f"{model.artifact.directory}: expected one that nestor compress made with "
                f"--delta {options.start} --gar-levels later"
            )
    return started


@torch.no_grad()
def start_from(model: NestedModel, options, levels: list[int]):
    """Puts what a delta holds where it trains."""
    started = read_start(model, options)
    generator = torch.Generator().manual_seed(options.seed)
    for i, nested in enumerate(model.nested):
        ranks = [model.artifact.levels[level].ranks[i] for level in levels]
        ranks = [rank for rank in ranks if rank > 0] or [0]
        a, bt = started.get(nested.layer.name, ((), ()))
        # Terms go before what else a level runs; factors are all that it runs.
        fits = len(a) <= min(ranks) if options.train == "delta" else len(a) == max(ranks)
        if not fits:
            raise UsageError(
                f"--start: {options.start}: {len(a)} components for {nested.layer.name}, which "
                f"runs {min(ranks)} to {max(ranks)} in {model.artifact.directory}"
            )
        if len(a) == 0:
            continue
        if options.train == "delta":
            nested.add_delta(len(a), generator)
            nested.delta_a.copy_(a)
            nested.delta_bt.copy_(bt)
        else:
            nested.prefix_a[: len(a)] = a.to(nested.prefix_a.device)
            nested.prefix_bt[: len(bt)] = bt.to(nested.prefix_bt.device)


def choose_parameters(model: NestedModel, options, levels: list[int]):
    if options.start is not None:
        start_from(model, options, ladder_of(model.artifact))
    if options.train == "delta":
        model.artifact.calibration()  # which the file will need
        if options.start is not None:
            return
        ladder = ladder_of(model.artifact)
        ranks = delta.largest_ranks(model.artifact, ladder, int(options.delta_bytes))
        size = delta.size_of(model.artifact, ranks)
        if size == 0:
            raise UsageError(f"--delta-bytes: {options.delta_bytes:.0f} bytes hold no term")
        print(f"terms of up to {max(ranks)} components: {size / 1e6:.2f} MB", file=sys.stderr)
        generator = torch.Generator().manual_seed(options.seed)
        for nested, rank in zip(model.nested, ranks):
            if rank > 0:
                nested.add_delta(rank, generator)
        return
    model.train_factors(levels)
    if options.train == "all":
        model.train_vectors()


def hash_of(path: str | None) -> str:
    """The SHA-256 of a file; empty for none."""
    return "" if path is None else hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()


def read_text(model: NestedModel, options, work: pathlib.Path):
    tokenizer = load_tokenizer(model.artifact.directory)
    if model.is_encoder:
        if options.self_sample > 0:
            raise UsageError("--self-sample: an encoder cannot sample text")
        return Sentences(options.text, tokenizer, options.length, options.seed)
    texts = list(options.text)
    if options.self_sample > 0:
        path = work / "self_sampled.txt"
        if not path.exists():
            starts = Windows(texts, tokenizer, options.length, options.seed)
            sample_text(model, starts, options.self_sample, path, seed=options.seed)
        texts.append(path)
    return Windows(texts, tokenizer, options.length, options.seed)


def objective_of(model: NestedModel, options, teacher, levels):
    name = options.objective or ("embeddings" if model.is_encoder else "flexrank")
    if (name == "embeddings") != model.is_encoder:
        raise UsageError(
            f"--objective: {name} is not for "
            + ("an encoder" if model.is_encoder else "a language model")
        )
    return OBJECTIVES[name](teacher, levels)


def write(trainer: Trainer, options):
    model = trainer.model
    # Which compress may measure a delta on.
    held_out = trainer.directory / "held_out.txt"
    held_out.write_text(trainer.text.held_out_text(), encoding="utf-8")
    if writes_delta(options):
        export = export_delta if options.train == "delta" else export_factors
        export(model, ladder_of(model.artifact), options.out)
        size = pathlib.Path(options.out).stat().st_size
        print(
            f"{options.out}: {size / 1e6:.2f} MB, trained for {trainer.step} steps; "
            f"apply it with nestor compress --ladder prefix --delta {options.out}",
            file=sys.stderr,
        )
        return
    evaluation = options.evaluation or held_out
    # Its stated qualities are those of the old factors until it is measured, so it has another
    # name till then.
    unmeasured = f"{options.out}.unmeasured"
    shutil.rmtree(unmeasured, ignore_errors=True)
    model.write(unmeasured)
    levels = evaluate.measure(
        options.nestor, unmeasured, evaluation, options.evaluation_tokens, options.source
    )
    os.replace(unmeasured, options.out)
    for level in levels:
        print(f"{level['form']} {level['relative_flops']:.3f}: quality {level['quality']:.4f}")


def keep_memory():
    """Lets glibc keep what is freed. A pass's tensors are large and come again with the next one;
    pages given back and taken anew cost a CPU up to a tenth of its time (docs/benchmarks.md)."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return
    # M_TRIM_THRESHOLD, M_MMAP_MAX and M_ARENA_MAX of malloc.h: never trims, maps nothing apart, and
    # has one arena, since others hold 64 MB at most.
    for option, value in ((-1, -1), (-4, 0), (-8, 1)):
        if libc.mallopt(option, value) == 0:
            print(f"mallopt({option}, {value}) has no effect", file=sys.stderr)


def run(options) -> int:
    torch.set_num_threads(options.threads)
    if torch.device(options.device).type == "cuda":
        # Matrices that are composed in fp32 go on in bf16.
        torch.set_float32_matmul_precision("high")
    else:
        keep_memory()
    model = NestedModel(Artifact(options.artifact)).to(options.device)
    levels = levels_named(model.artifact, options.levels)
    work = pathlib.Path(options.work or f"{options.out}.training")
    work.mkdir(parents=True, exist_ok=True)
    text = read_text(model, options, work)
    choose_parameters(model, options, levels)
    teacher = model.teacher()
    settings = Settings(
        levels=levels,
        steps=options.steps,
        minutes=options.minutes,
        batch=options.batch,
        micro_batch=options.micro_batch,
        workers=options.workers,
        learning_rate=options.learning_rate or LEARNING_RATES[options.train],
        warm_up=options.warm_up,
        checkpoint_steps=options.checkpoint_steps,
        held_out_steps=options.held_out_steps,
        seed=options.seed,
    )
    judge = None
    if options.held_out_steps > 0:
        held_out = text.held_out(options.held_out)
        judge = Judge(
            teacher,
            {
                name: [batch.to(model.device) for batch in batches]
                for name, batches in held_out.items()
            },
        )
    if options.checkpoint_activations:
        model.checkpoint_activations()
    trainer = Trainer(
        model,
        text,
        objective_of(model, options, teacher, levels),
        SAMPLERS[options.sampler](levels, options.seed),
        judge,
        settings,
        work,
        start=hash_of(options.start),
    )
    resumed = trainer.resume()
    if options.export_only:
        if not resumed:
            raise UsageError(f"--export-only: {work} has no checkpoint")
    else:
        is_new = not resumed and options.start is None
        if is_new and options.train == "delta" and options.start_batches > 0:
            trainer.start_terms(options.start_batches)
        if options.compose:
            for each in (model, teacher):
                each.compose(options.compile)
            teacher.set_level(teacher.full_level)
        trainer.run()
    write(trainer, options)
    return 0


def main(arguments=None) -> int:
    try:
        return run(parse(arguments))
    except (ArtifactError, DataError, Diverged, RuntimeError, ValueError) as error:
        print(f"nestor-consolidate: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
