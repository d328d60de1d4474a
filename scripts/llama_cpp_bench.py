#!/usr/bin/env python3
"""llama.cpp's speed and quality through PyPI's llama-cpp-python, and Nestor's beside them.

    llama_cpp_bench.py quantize SOURCE.gguf OUT.gguf --type TYPE
    llama_cpp_bench.py measure MODEL.gguf [--threads N]
    llama_cpp_bench.py compare --bench build/bin/nestor --peer TYPE=MODEL.gguf ... \\
        --artifact DIR ... [--threads 1,2]
    llama_cpp_bench.py quality --nestor build/bin/nestor --source bf16.gguf \\
        --checkpoint HF_DIR --peer TYPE=MODEL.gguf ... --artifact DIR ... --text FILE ...

`measure` prints one JSON object: decode and prefill in tokens per second for every setting.
`compare` runs it on every peer's file alternately with `nestor bench` on every artifact, each in a
process of its own, and prints every level against the best setting of each type: medians of the
rounds. `quality` prints what every type and every level keep of the unquantised model's quality, the
ratio of perplexities on the same windows of each text, in the order of their bytes.
"""

import argparse
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys
import time

CONTEXT = 16  # tokens before the first decoded one, as in `nestor bench`
DECODED = 64
PROMPT = 512
WINDOW = 512  # tokens that perplexity is measured on at once, as in `nestor evaluate`
MICRO_BATCHES = [64, 128, 512]

# Flash attention off or on, times the rows of one pass through the graph.
SETTINGS = [
    {"flash_attention": flash, "micro_batch": rows}
    for flash in (False, True)
    for rows in MICRO_BATCHES
]


def load_library():
    """llama_cpp, without its log on stderr."""
    import llama_cpp

    llama_cpp.llama_log_set(_no_log(llama_cpp), None)
    return llama_cpp


def _no_log(llama_cpp):
    if not hasattr(_no_log, "callback"):  # kept alive for as long as the library may call it
        _no_log.callback = llama_cpp.llama_log_callback(lambda *_: None)
    return _no_log.callback


def quantize(options):
    llama_cpp = load_library()
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{options.type.upper()}")
    parameters.allow_requantize = True
    partial = options.out.with_suffix(".partial")
    failed = llama_cpp.llama_model_quantize(
        str(options.source).encode(), str(partial).encode(), parameters
    )
    if failed:
        sys.exit(f"llama_cpp_bench.py: {options.source}: llama.cpp could not quantise it")
    partial.rename(options.out)


class Session:
    """A loaded model with one setting; feeds fixed tokens, since sampling is not measured."""

    def __init__(self, llama_cpp, model, threads, setting):
        self._library = llama_cpp
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = PROMPT + 128
        parameters.n_batch = PROMPT
        parameters.n_ubatch = setting["micro_batch"]
        parameters.n_threads = threads
        parameters.n_threads_batch = threads
        parameters.flash_attn_type = int(setting["flash_attention"])  # 0: disabled, 1: enabled
        self._context = llama_cpp.llama_init_from_model(model, parameters)
        if not self._context:
            sys.exit(f"llama_cpp_bench.py: llama.cpp refuses {setting}")

    def close(self):
        self._library.llama_free(self._context)

    def _run(self, tokens):
        array = (self._library.llama_token * len(tokens))(*tokens)
        batch = self._library.llama_batch_get_one(array, len(tokens))
        if self._library.llama_decode(self._context, batch) != 0:
            sys.exit("llama_cpp_bench.py: llama_decode failed")
        self._library.llama_synchronize(self._context)

    def _clear(self):
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)

    def decode(self):
        self._clear()
        self._run(list(range(100, 100 + CONTEXT)))
        begin = time.perf_counter()
        for token in range(DECODED):
            self._run([200 + token])
        return DECODED / (time.perf_counter() - begin)

    def prefill(self):
        self._clear()
        begin = time.perf_counter()
        self._run(list(range(100, 100 + PROMPT)))
        return PROMPT / (time.perf_counter() - begin)


def measure(options):
    llama_cpp = load_library()
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(
        str(options.model).encode(), llama_cpp.llama_model_default_params()
    )
    if not model:
        sys.exit(f"llama_cpp_bench.py: {options.model}: llama.cpp cannot load it")
    results = []
    for setting in SETTINGS:
        session = Session(llama_cpp, model, options.threads, setting)
        session.decode()  # warms up
        results.append({**setting, "decode": session.decode(), "prefill": session.prefill()})
        session.close()
    system = llama_cpp.llama_print_system_info().decode()
    print(json.dumps({"settings": results, "system": system, "version": llama_cpp.__version__}))


class Scorer:
    """A loaded model that scores windows of text."""

    def __init__(self, path):
        self._library = load_library()
        self._library.llama_backend_init()
        self._model = self._library.llama_model_load_from_file(
            str(path).encode(), self._library.llama_model_default_params()
        )
        if not self._model:
            sys.exit(f"llama_cpp_bench.py: {path}: llama.cpp cannot load it")
        parameters = self._library.llama_context_default_params()
        parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = WINDOW
        parameters.n_threads = parameters.n_threads_batch = len(os.sched_getaffinity(0))
        self._context = self._library.llama_init_from_model(self._model, parameters)
        self._vocabulary = self._library.llama_model_get_vocab(self._model)
        self.bytes = self._library.llama_model_size(self._model)

    def close(self):
        self._library.llama_free(self._context)
        self._library.llama_model_free(self._model)

    def windows(self, path, tokens):
        """The first `tokens` tokens of a text, without special ones, in windows."""
        text = path.read_bytes()
        ids = (self._library.llama_token * len(text))()
        count = self._library.llama_tokenize(
            self._vocabulary, text, len(text), ids, len(text), False, False
        )
        if count < tokens:
            sys.exit(f"llama_cpp_bench.py: {path}: {count} tokens, expected {tokens}")
        return [list(ids[i : min(i + WINDOW, tokens)]) for i in range(0, tokens, WINDOW)]

    def losses(self, window):
        """-log p of each token of a window but the first, in nats."""
        import numpy

        batch = self._library.llama_batch_init(len(window), 0, 1)
        batch.n_tokens = len(window)
        for i, token in enumerate(window):
            batch.token[i], batch.pos[i], batch.logits[i] = token, i, 1
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)
        if self._library.llama_decode(self._context, batch) != 0:
            sys.exit("llama_cpp_bench.py: llama_decode failed")
        width = self._library.llama_vocab_n_tokens(self._vocabulary)
        logits = numpy.ctypeslib.as_array(
            self._library.llama_get_logits(self._context), shape=(len(window), width)
        )
        rows = logits[:-1] - logits[:-1].max(axis=1, keepdims=True)
        chosen = rows[numpy.arange(len(window) - 1), window[1:]].astype(numpy.float64)
        losses = numpy.log(numpy.exp(rows).sum(axis=1, dtype=numpy.float64)) - chosen
        self._library.llama_batch_free(batch)
        return losses


def window_losses(path, texts, tokens):
    """A model's bytes, and by text the mean loss of each window."""
    scorer = Scorer(path)
    losses = {
        text: [scorer.losses(window).mean() for window in scorer.windows(text, tokens)]
        for text in texts
    }
    size = scorer.bytes
    scorer.close()
    return size, losses


def own_qualities(options, artifact, text):
    """(name, bytes, quality, standard error) of every level."""
    command = [str(options.nestor), "evaluate", str(artifact), "--text", str(text), "--json"]
    command += ["--tokens", str(options.tokens), "--source", str(options.checkpoint)]
    levels = json.loads((artifact / "nested.json").read_text(encoding="utf-8"))["levels"]
    for entry in run_json(command)["levels"]:
        level = levels[entry["level"]]
        name = f"{artifact.name}, level {entry['level']} ({level['ladder']})"
        yield name, level["weight_bytes"], entry["quality_vs_source"], entry["standard_error"]


def quality(options):
    if options.tokens <= 0 or options.tokens % WINDOW != 0:
        sys.exit(f"--tokens: expected a multiple of {WINDOW}; was {options.tokens}")
    size, source = window_losses(options.source, options.text, options.tokens)
    print(f"unquantised (bf16): {size / 1e6:.1f} MB")
    peers = {
        kind: window_losses(model, options.text, options.tokens) for kind, model in options.peer
    }
    for text in options.text:
        perplexity = math.exp(statistics.mean(source[text]))
        print(f"\n{text.name}, {options.tokens} tokens; unquantised, perplexity {perplexity:.2f}")
        rows = []
        for kind, (size, losses) in peers.items():
            lost = [loss - own for loss, own in zip(losses[text], source[text])]
            kept = math.exp(-statistics.mean(lost))
            error = kept * statistics.stdev(lost) / math.sqrt(len(lost)) if len(lost) > 1 else 0
            note = " (the source's own type)" if kind == "q4_1" else ""
            rows.append((f"llama.cpp {kind}{note}", size, kept, error))
        for artifact in options.artifact:
            rows += own_qualities(options, artifact, text)
        width = max(len(row[0]) for row in rows)
        print(f"{'':<{width}} {'MB':>7} {'vs source':>9} {'+-':>6}")
        for name, size, kept, error in sorted(rows, key=lambda row: row[1]):
            print(f"{name:<{width}} {size / 1e6:>7.1f} {kept:>9.4f} {error or 0:>6.4f}")
    print(
        "\nMB: of all tensors of llama.cpp's file, and of what a token reads at a level. +-: standard "
        "errors, of a level against its own full one"
    )


def run_json(command):
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode != 0:
        sys.exit(f"llama_cpp_bench.py: {' '.join(command)}: {process.stderr.strip()}")
    return json.loads(process.stdout)


def own_command(options, artifact, threads):
    command = [str(options.bench), "bench", str(artifact), "--threads", str(threads), "--json"]
    # The mixed steps are not part of this comparison: as few as there are.
    command += ["--rows", "1", "--mixed-rows", "2", "--rounds", "1"]
    command += ["--prompt-tokens", str(PROMPT)]
    return command + ["--context", str(CONTEXT), "--tokens", str(DECODED)]


def peer_command(model, threads):
    return [sys.executable, __file__, "measure", str(model), "--threads", str(threads)]


def run_rounds(options):
    """What llama.cpp measured, by (threads, type), and Nestor, by (threads, artifact): a list with
    one report for each round. All of them take turns within a round."""
    peers, own = {}, {}
    for index in range(options.rounds):
        print(f"round {index + 1} of {options.rounds}", file=sys.stderr, flush=True)
        for threads in options.threads:
            for kind, model in options.peer:
                report = run_json(peer_command(model, threads))
                peers.setdefault((threads, kind), []).append(report)
            for artifact in options.artifact:
                report = run_json(own_command(options, artifact, threads))
                own.setdefault((threads, artifact), []).append(report)
    return peers, own


def best_setting(reports, what):
    """The setting whose median over the rounds is the highest, and that median."""
    medians = [
        statistics.median(report["settings"][index][what] for report in reports)
        for index in range(len(SETTINGS))
    ]
    best = max(range(len(SETTINGS)), key=medians.__getitem__)
    return SETTINGS[best], medians[best]


def own_medians(reports, what):
    """Level -> median tokens per second."""
    by_level = {}
    for report in reports:
        for row in report[what]:
            by_level.setdefault(row["level"], []).append(row["tokens_per_second"])
    return {level: statistics.median(values) for level, values in by_level.items()}


def compare(options):
    peers, own = run_rounds(options)
    first_peer = next(iter(peers.values()))[0]
    print(f"{next(iter(own.values()))[0]['cpu']}, {options.rounds} rounds in turns, medians")
    print(f"llama-cpp-python {first_peer['version']}: {first_peer['system'].strip()}")
    for kind, model in options.peer:
        print(f"  {kind}: {model.name}, {model.stat().st_size / 1e6:.1f} MB")
    for threads in options.threads:
        reads = [
            report["read_gbps"]
            for artifact in options.artifact
            for report in own[threads, artifact]
        ]
        plural = "s" if threads > 1 else ""
        print(f"\n== {threads} thread{plural}; reads {statistics.median(reads):.1f} GB/s")
        for what in ("decode", f"prefill of {PROMPT}"):
            print_comparison(options, peers, own, threads, what)
    print(
        "\nspeed x cost: 1.00 is a level as much faster than the full one as it reads fewer bytes"
    )


def print_comparison(options, peers, own, threads, title):
    what = title.split()[0]
    speeds = {}
    print(f"\n{title}: llama.cpp")
    for kind, _ in options.peer:
        setting, speeds[kind] = best_setting(peers[threads, kind], what)
        print(
            f"  {kind:<5} {speeds[kind]:>8.1f} tokens/s with flash attention "
            f"{'on' if setting['flash_attention'] else 'off'}, micro-batch {setting['micro_batch']}"
        )
    for artifact in options.artifact:
        description = json.loads((artifact / "nested.json").read_text(encoding="utf-8"))
        print(f"{title}: {artifact.name} ({description['dtype']})")
        medians = own_medians(own[threads, artifact], what)
        print_levels(medians, speeds, description["levels"])


def print_levels(own_speeds, peer_speeds, levels):
    full = own_speeds[len(levels) - 1]
    peers = {f"of {kind}": speed for kind, speed in peer_speeds.items()}
    if len(peers) > 1:
        peers["of the best"] = max(peer_speeds.values())
    print(
        f"{'level':>5} {'relative cost':>13} {'tokens/s':>9} "
        + "".join(f"{name:>12} " for name in peers)
        + f"{'of full level':>13} {'speed x cost':>12}"
    )
    for level, speed in sorted(own_speeds.items()):
        cost = levels[level]["relative_cost"]
        print(
            f"{level:>5} {cost:>13.3f} {speed:>9.1f} "
            + "".join(f"{speed / peer:>12.2f} " for peer in peers.values())
            + f"{speed / full:>13.2f} {speed / full * cost:>12.2f}"
        )


def peer_file(text):
    kind, _, path = text.partition("=")
    if not kind or not pathlib.Path(path).is_file():
        raise argparse.ArgumentTypeError(f"expected TYPE=FILE.gguf; was {text}")
    return kind, pathlib.Path(path)


def thread_counts(text):
    try:
        counts = [int(entry) for entry in text.split(",")]
    except ValueError:
        counts = [0]
    if min(counts) < 1:
        raise argparse.ArgumentTypeError(
            f"expected positive integers with commas between them; was {text}"
        )
    return counts


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("quantize")
    command.add_argument("source", type=pathlib.Path)
    command.add_argument("out", type=pathlib.Path)
    command.add_argument("--type", required=True)
    command.set_defaults(run=quantize)
    command = commands.add_parser("measure")
    command.add_argument("model", type=pathlib.Path)
    command.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    command.set_defaults(run=measure)
    command = commands.add_parser("compare")
    command.add_argument("--bench", type=pathlib.Path, required=True)
    command.add_argument("--peer", type=peer_file, action="append", required=True)
    command.add_argument("--artifact", type=pathlib.Path, action="append", required=True)
    command.add_argument("--rounds", type=int, default=5)
    command.add_argument("--threads", type=thread_counts, default=[len(os.sched_getaffinity(0))])
    command.set_defaults(run=compare)
    command = commands.add_parser("quality")
    command.add_argument("--nestor", type=pathlib.Path, required=True)
    command.add_argument("--source", type=pathlib.Path, required=True)
    command.add_argument("--checkpoint", type=pathlib.Path, required=True)
    command.add_argument("--peer", type=peer_file, action="append", required=True)
    command.add_argument("--artifact", type=pathlib.Path, action="append", required=True)
    command.add_argument("--text", type=pathlib.Path, action="append", required=True)
    command.add_argument("--tokens", type=int, default=4096)
    command.set_defaults(run=quality)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
