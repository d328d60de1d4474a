#!/usr/bin/env python3
"""ONNX Runtime's speed on a sentence encoder, and Nestor's beside it.

    onnxruntime_bench.py export HF_DIR OUT_DIR
    onnxruntime_bench.py measure MODEL_DIR TOKENIZER.json SENTENCES [--threads N] [--batch 1,32]
    onnxruntime_bench.py compare MODEL_DIR ARTIFACT PAIRS --build build [--threads N] [--rounds N]

`export` writes exported.onnx and, after ONNX Runtime's optimiser for transformers, fused.onnx; both
hold mean pooling and normalisation, too. `measure` prints one JSON object: sentences per second for
every graph, order of the sentences and batch. `compare` checks that the embeddings are those of
Nestor's full level, then runs `measure` alternately with `nestor bench`, each in a process of its
own, and prints every level against the best setting of ONNX Runtime: medians of the rounds. On both
sides tokens are made before the clock starts; so are ONNX Runtime's batches, which are padded to
their longest sentence.
"""

import argparse
import json
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

GRAPHS = ["exported", "fused"]
ORDERS = ["file", "length"]
INPUTS = ["input_ids", "attention_mask"]
# The artifact's full level is int8.
LEAST_COSINE = 0.99


# --- export -------------------------------------------------------------------------------------


def export(options):
    import onnxruntime.transformers.optimizer
    import torch
    import transformers

    class Encoder(torch.nn.Module):
        """The transformer with mean pooling and normalisation behind it."""

        def __init__(self):
            super().__init__()
            self.model = transformers.AutoModel.from_pretrained(
                options.source, attn_implementation="eager", dtype=torch.float32
            ).eval()

        def forward(self, input_ids, attention_mask):
            rows = self.model(input_ids=input_ids, attention_mask=attention_mask)[0]
            mask = attention_mask.unsqueeze(-1).to(rows.dtype)
            return torch.nn.functional.normalize((rows * mask).sum(1) / mask.sum(1), dim=1)

    encoder = Encoder()
    ids = torch.ones((2, 8), dtype=torch.int64)
    exported = options.out / "exported.onnx"
    with torch.no_grad():
        torch.onnx.export(
            encoder,
            (ids, torch.ones_like(ids)),
            str(exported),
            input_names=INPUTS,
            output_names=["embedding"],
            dynamic_axes={name: {0: "batch", 1: "length"} for name in INPUTS},
            opset_version=17,
            dynamo=False,
        )
    config = encoder.model.config
    fused = onnxruntime.transformers.optimizer.optimize_model(
        str(exported),
        model_type="bert",
        num_heads=config.num_attention_heads,
        hidden_size=config.hidden_size,
    )
    print(f"fused: {fused.get_fused_operator_statistics()}", file=sys.stderr)
    partial = options.out / "fused.partial"
    fused.save_model_to_file(str(partial))
    partial.rename(options.out / "fused.onnx")


# --- measure ------------------------------------------------------------------------------------


def read_sentences(path):
    return [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]


def tokenise(tokenizer_path, sentences):
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer_path))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return [encoding.ids for encoding in tokenizer.encode_batch(sentences)]


def padded_batches(tokens, size):
    """The inputs of the graph for every batch."""
    batches = []
    for begin in range(0, len(tokens), size):
        batch = tokens[begin : begin + size]
        ids = np.zeros((len(batch), max(map(len, batch))), np.int64)
        mask = np.zeros_like(ids)
        for row, text in enumerate(batch):
            ids[row, : len(text)] = text
            mask[row, : len(text)] = 1
        batches.append(dict(zip(INPUTS, (ids, mask))))
    return batches


def open_session(path, threads):
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.inter_op_num_threads = 1
    settings.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])


def measure(options):
    import onnxruntime

    tokens = tokenise(options.tokenizer, read_sentences(options.sentences))
    results = []
    for graph in GRAPHS:
        session = open_session(options.models / f"{graph}.onnx", options.threads)
        for order in ORDERS:
            texts = sorted(tokens, key=len) if order == "length" else tokens
            for batch in options.batch:
                batches = padded_batches(texts, batch)
                for inputs in batches[-16:] + batches[:16]:  # warms up
                    session.run(None, inputs)
                begin = time.perf_counter()
                for inputs in batches:
                    session.run(None, inputs)
                speed = len(texts) / (time.perf_counter() - begin)
                results.append({"graph": graph, "order": order, "batch": batch, "speed": speed})
    num_tokens = sum(map(len, tokens))
    version = onnxruntime.__version__
    print(json.dumps({"settings": results, "tokens": num_tokens, "version": version}))


# --- compare ------------------------------------------------------------------------------------


def run_json(command):
    command = [str(argument) for argument in command]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode != 0:
        sys.exit(f"onnxruntime_bench.py: {' '.join(command)}: {process.stderr.strip()}")
    return json.loads(process.stdout)


def sentences_of_pairs(path):
    """Both sentences of every line, in the file's order."""
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8").split("\n")]
    return [sentence.strip() for row in rows for sentence in row[5:7]]


def own_embeddings(options, sentences):
    """The full level's, through the daemon."""
    with tempfile.TemporaryDirectory() as directory:
        port = pathlib.Path(directory) / "port"
        daemon = subprocess.Popen(
            [options.build / "bin/nestord", "--config", "config/nestord.yaml"]
            + ["--model", options.artifact, "--listen", "127.0.0.1:0", "--port-file", port]
            + ["--set", "metrics.listen=", "--set", "server.drain_grace_ms=0"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            while not (port.exists() and port.read_text().strip()):
                if daemon.poll() is not None:
                    sys.exit("onnxruntime_bench.py: nestord did not start")
                time.sleep(0.1)
            server = ["--server", f"127.0.0.1:{port.read_text().strip()}"]
            nestor = options.build / "bin/nestor"
            subprocess.run(
                [nestor, "health", *server, "--wait", "60s"], check=True, stdout=subprocess.DEVNULL
            )
            reply = run_json([nestor, "embed", *server, "--json", "--file", sentences])
            return np.array(reply["embeddings"])
        finally:
            daemon.terminate()
            daemon.wait()


def check_embeddings(options, sentences):
    tokens = tokenise(options.artifact / "tokenizer.json", read_sentences(sentences))
    own = own_embeddings(options, sentences)
    for graph in GRAPHS:
        session = open_session(options.models / f"{graph}.onnx", options.threads)
        peer = np.concatenate(
            [session.run(None, inputs)[0] for inputs in padded_batches(tokens, 32)]
        )
        cosines = (own * peer).sum(axis=1) / np.linalg.norm(own, axis=1)
        cosines /= np.linalg.norm(peer, axis=1)
        print(
            f"embeddings of {graph}.onnx and of the full level: cosine {cosines.min():.5f} at "
            f"least, {cosines.mean():.5f} in the mean"
        )
        if cosines.min() < LEAST_COSINE:
            sys.exit(f"onnxruntime_bench.py: the embeddings differ: expected {LEAST_COSINE}")


def run_rounds(options, sentences):
    """What ONNX Runtime measured, by (graph, order, batch), and Nestor, by (level, batch): the
    sentences per second of each round. They take turns."""
    batches = ",".join(map(str, options.batch))
    flags = ["--threads", options.threads, "--batch", batches]
    peer_command = [sys.executable, __file__, "measure", options.models]
    peer_command += [options.artifact / "tokenizer.json", sentences, *flags]
    own_command = [options.build / "bin/nestor", "bench", options.artifact, "--json"]
    own_command += ["--rounds", "1", "--texts", sentences, *flags]
    peers, own = {}, {}
    for index in range(options.rounds):
        print(f"round {index + 1} of {options.rounds}", file=sys.stderr, flush=True)
        peer = run_json(peer_command)
        for result in peer["settings"]:
            key = (result["graph"], result["order"], result["batch"])
            peers.setdefault(key, []).append(result["speed"])
        report = run_json(own_command)
        for row in report["embed"]:
            key = (row["level"], row["batch"])
            own.setdefault(key, []).append(row["sentences_per_second"])
            if row["tokens"] != peer["tokens"]:
                sys.exit(
                    f"onnxruntime_bench.py: {peer['tokens']} tokens, {row['tokens']} of nestor"
                )
    print(
        f"{report['cpu']}, {options.threads} threads, {options.rounds} rounds in turns, medians; "
        f"{report['embed'][0]['sentences']} sentences, {report['embed'][0]['tokens']} tokens"
    )
    print(f"ONNX Runtime {peer['version']}, fp32")
    return peers, own


def compare(options):
    with tempfile.TemporaryDirectory() as directory:
        sentences = pathlib.Path(directory) / "sentences.txt"
        sentences.write_text("\n".join(sentences_of_pairs(options.pairs)) + "\n", encoding="utf-8")
        check_embeddings(options, sentences)
        peers, own = run_rounds(options, sentences)
    best = {}
    for (graph, order, batch), speeds in peers.items():
        speed = statistics.median(speeds)
        print(
            f"  {graph:<8} graph, order of {order:<6}, batch {batch:>3}: {speed:>7.1f} sentences/s"
        )
        best[batch] = max(best.get(batch, 0), speed)
    print_levels(options, {key: statistics.median(speeds) for key, speeds in own.items()}, best)


def print_levels(options, own, best):
    description = json.loads((options.artifact / "nested.json").read_text(encoding="utf-8"))
    print(
        f"\n{options.artifact.name} ({description['dtype']}): sentences/s, and share of ONNX "
        "Runtime's best"
    )
    print(
        f"{'level':>5} {'relative FLOPs':>14} "
        + "".join(
            f"{f'batch {batch}':>10} {f'of {speed:.1f}':>9} " for batch, speed in best.items()
        )
    )
    for level, entry in enumerate(description["levels"]):
        columns = "".join(
            f"{own[level, batch]:>10.1f} {own[level, batch] / speed:>9.2f} "
            for batch, speed in best.items()
        )
        print(f"{level:>5} {entry['relative_flops']:>14.3f} {columns}".rstrip())


def batch_sizes(text):
    try:
        sizes = [int(entry) for entry in text.split(",")]
    except ValueError:
        sizes = [0]
    if min(sizes) < 1:
        raise argparse.ArgumentTypeError(
            f"expected positive integers with commas between them; was {text}"
        )
    return sizes


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("export")
    command.add_argument("source", type=pathlib.Path)
    command.add_argument("out", type=pathlib.Path)
    command.set_defaults(run=export)
    command = commands.add_parser("measure")
    command.add_argument("models", type=pathlib.Path)
    command.add_argument("tokenizer", type=pathlib.Path)
    command.add_argument("sentences", type=pathlib.Path)
    command.set_defaults(run=measure)
    compared = commands.add_parser("compare")
    compared.add_argument("models", type=pathlib.Path)
    compared.add_argument("artifact", type=pathlib.Path)
    compared.add_argument("pairs", type=pathlib.Path)
    compared.add_argument("--build", type=pathlib.Path, required=True)
    compared.add_argument("--rounds", type=int, default=5)
    compared.set_defaults(run=compare)
    for command in (command, compared):
        command.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
        command.add_argument("--batch", type=batch_sizes, default=[1, 32])
    options = parser.parse_args()
    # SIGTERM must end the daemon, too, as Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    options.run(options)


if __name__ == "__main__":
    main()
