#!/usr/bin/env python3
"""llama.cpp's speed through PyPI's llama-cpp-python, and Nestor's beside it.

    llama_cpp_bench.py quantize SOURCE.gguf OUT.gguf --type q8_0|bf16
    llama_cpp_bench.py measure MODEL.gguf [--threads N]
    llama_cpp_bench.py compare MODEL.gguf ARTIFACT --bench build/bin/nestor [--threads N]

`measure` prints one JSON object: decode and prefill in tokens per second for every setting.
`compare` runs it alternately with `nestor bench`, each in a process of its own, and prints the best
setting of llama.cpp against every level: medians of the rounds.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

CONTEXT = 16  # tokens before the first decoded one, as in `nestor bench`
DECODED = 64
PROMPT = 512
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
    types = {"q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, "bf16": llama_cpp.LLAMA_FTYPE_MOSTLY_BF16}
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = types[options.type]
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


def run_json(command):
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode != 0:
        sys.exit(f"llama_cpp_bench.py: {' '.join(command)}: {process.stderr.strip()}")
    return json.loads(process.stdout)


def run_rounds(options):
    """Per round, in turns: what llama.cpp and what Nestor measured."""
    threads = str(options.threads)
    peer_command = [sys.executable, __file__, "measure", str(options.model), "--threads", threads]
    own_command = [
        str(options.bench),
        "bench",
        str(options.artifact),
        "--threads",
        threads,
        "--json",
        "--rows",
        "1",
        "--rounds",
        "1",
        "--prompt-tokens",
        str(PROMPT),
        "--context",
        str(CONTEXT),
        "--tokens",
        str(DECODED),
    ]
    peers, own = [], []
    for index in range(options.rounds):
        print(f"round {index + 1} of {options.rounds}", file=sys.stderr, flush=True)
        peers.append(run_json(peer_command))
        own.append(run_json(own_command))
    return peers, own


def best_setting(peers, what):
    """The setting whose median over the rounds is the highest, and that median."""
    medians = [
        statistics.median(peer["settings"][index][what] for peer in peers)
        for index in range(len(SETTINGS))
    ]
    best = max(range(len(SETTINGS)), key=medians.__getitem__)
    return SETTINGS[best], medians[best]


def own_medians(own, what):
    """Level -> median tokens per second."""
    by_level = {}
    for report in own:
        for row in report[what]:
            by_level.setdefault(row["level"], []).append(row["tokens_per_second"])
    return {level: statistics.median(values) for level, values in by_level.items()}


def compare(options):
    levels = json.loads((options.artifact / "nested.json").read_text(encoding="utf-8"))["levels"]
    peers, own = run_rounds(options)
    print(
        f"{own[0]['cpu']}, {options.threads} threads, "
        f"{options.rounds} rounds in turns, medians; reads "
        f"{statistics.median(report['read_gbps'] for report in own):.1f} GB/s"
    )
    print(
        f"llama-cpp-python {peers[0]['version']}, {options.model.name}: "
        f"{peers[0]['system'].strip()}"
    )
    for what in ("decode", "prefill"):
        setting, peer = best_setting(peers, what)
        print(
            f"\n{what}: llama.cpp {peer:.1f} tokens/s with flash attention "
            f"{'on' if setting['flash_attention'] else 'off'}, micro-batch {setting['micro_batch']}"
        )
        print_levels(own_medians(own, what), peer, levels)
    print(
        "\nspeed x cost: 1.00 is a level as much faster than the full one as it reads fewer bytes"
    )


def print_levels(speeds, peer, levels):
    full = speeds[len(levels) - 1]
    print(
        f"{'level':>5} {'relative cost':>13} {'tokens/s':>9} {'of llama.cpp':>12} "
        f"{'of full level':>13} {'speed x cost':>12}"
    )
    for level, speed in sorted(speeds.items()):
        cost = levels[level]["relative_cost"]
        print(
            f"{level:>5} {cost:>13.3f} {speed:>9.1f} {speed / peer:>12.2f} "
            f"{speed / full:>13.2f} {speed / full * cost:>12.2f}"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("quantize")
    command.add_argument("source", type=pathlib.Path)
    command.add_argument("out", type=pathlib.Path)
    command.add_argument("--type", choices=["q8_0", "bf16"], required=True)
    command.set_defaults(run=quantize)
    for name, function in (("measure", measure), ("compare", compare)):
        command = commands.add_parser(name)
        command.add_argument("model", type=pathlib.Path)
        if name == "compare":
            command.add_argument("artifact", type=pathlib.Path)
            command.add_argument("--bench", type=pathlib.Path, required=True)
            command.add_argument("--rounds", type=int, default=5)
        command.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
        command.set_defaults(run=function)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
