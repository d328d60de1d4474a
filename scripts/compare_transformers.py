#!/usr/bin/env python3
"""Compares an artifact's full level with PyPI transformers on the same stored weights.

Loads the dense weights of a bf16 artifact into a transformers model in fp32 arithmetic and prints
the perplexity (windows of 512 tokens, no overlap, no added BOS, the first token of a window
unscored) and a greedy continuation beside those of `nestor evaluate` and `nestor generate`.

    scripts/compare_transformers.py models/smollm2-135m-instruct.bf16.nested \
        --text held_out.txt --tokens 8192 --build build

Needs the packages of requirements-fixtures.txt (PyTorch among them). Exits with 1 where the
perplexities differ by more than 0.5 % or the greedy tokens differ.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

WINDOW = 512
GREEDY_TOKENS = 64
PROMPT = "The history of the steam engine begins with"


def as_gpt2_stores(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The artifact's layers as a GPT-2 checkpoint has them: fused, transposed, with a prefix."""
    stored = {}
    for name, tensor in state.items():
        stem, _, part = name.rpartition(".")
        if stem.endswith((".key", ".value")):
            continue
        if stem.endswith(".query"):
            stem = stem.removesuffix(".query")
            roles = ("query", "key", "value")
            tensor = torch.cat([state[f"{stem}.{role}.{part}"] for role in roles])
        if name.startswith("h.") and tensor.dim() == 2:
            tensor = tensor.T
        prefix = "" if stem == "lm_head" else "transformer."
        stored[f"{prefix}{stem}.{part}"] = tensor
    return stored


def load_reference(artifact: Path) -> torch.nn.Module:
    """The artifact's dense weights as a transformers model in fp32."""
    state = {}
    with safe_open(artifact / "nested.safetensors", framework="pt") as file:
        for name in file.keys():
            if name.endswith(".dense"):
                state[name[: -len(".dense")] + ".weight"] = file.get_tensor(name).float()
            elif name.endswith((".weight", ".bias")):
                state[name] = file.get_tensor(name).float()
    config = AutoConfig.from_pretrained(artifact)
    if config.model_type == "gpt2":
        state = as_gpt2_stores(state)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    missing, unexpected = model.load_state_dict(state, strict=False)
    missing = [name for name in missing if not (config.tie_word_embeddings and "lm_head" in name)]
    if missing or unexpected:
        sys.exit(f"{artifact}: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    return model.eval()


@torch.no_grad()
def perplexity(model: torch.nn.Module, ids: list[int]) -> float:
    total, count = 0.0, 0
    for begin in range(0, len(ids), WINDOW):
        window = torch.tensor(ids[begin : begin + WINDOW])
        if len(window) < 2:
            continue
        log_probabilities = model(window[None]).logits[0, :-1].double().log_softmax(-1)
        total += log_probabilities.gather(1, window[1:, None]).sum().item()
        count += len(window) - 1
    return math.exp(-total / count)


@torch.no_grad()
def greedy(model: torch.nn.Module, ids: list[int]) -> list[int]:
    ids = list(ids)
    begin = len(ids)
    for _ in range(GREEDY_TOKENS):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[begin:]


def nestor_generate(build: Path, artifact: Path) -> list[int]:
    """Greedy tokens of the full level, through the daemon."""
    with tempfile.TemporaryDirectory() as directory:
        port_file = Path(directory) / "port"
        daemon = subprocess.Popen(
            [build / "bin/nestord", "--config", "config/nestord.yaml", "--model", artifact,
             "--listen", "127.0.0.1:0", "--port-file", port_file],
            stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        try:
            deadline = time.monotonic() + 60
            while not (port_file.exists() and port_file.read_text().strip()):
                if daemon.poll() is not None or time.monotonic() > deadline:
                    sys.exit("nestord did not start")
                time.sleep(0.1)
            server = f"127.0.0.1:{port_file.read_text().strip()}"
            subprocess.run([build / "bin/nestor", "health", "--server", server, "--wait", "60s"],
                           check=True, stdout=subprocess.DEVNULL)
            reply = subprocess.run(
                [build / "bin/nestor", "generate", PROMPT, "--server", server, "--ignore-eos",
                 "--max-tokens", str(GREEDY_TOKENS), "--json"],
                check=True, capture_output=True, text=True)
            return json.loads(reply.stdout)["tokens"]
        finally:
            daemon.terminate()
            daemon.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--build", type=Path, default=Path("build"))
    arguments = parser.parse_args()

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(arguments.artifact / "tokenizer.json"))
    ids = tokenizer(arguments.text.read_text(), add_special_tokens=False)["input_ids"]
    model = load_reference(arguments.artifact)
    expected = perplexity(model, ids[: arguments.tokens])
    evaluated = json.loads(subprocess.run(
        [arguments.build / "bin/nestor", "evaluate", arguments.artifact, "--text", arguments.text,
         "--tokens", str(arguments.tokens), "--json"],
        check=True, capture_output=True, text=True).stdout)
    actual = evaluated["levels"][-1]["perplexity"]
    difference = actual / expected - 1
    print(f"perplexity: transformers {expected:.5f}, nestor {actual:.5f} ({difference:+.4%})")

    prompt = tokenizer(PROMPT, add_special_tokens=False)["input_ids"]
    reference_tokens = greedy(model, prompt)
    tokens = nestor_generate(arguments.build, arguments.artifact)
    agreeing = next((i for i, (a, b) in enumerate(zip(reference_tokens, tokens)) if a != b),
                    min(len(reference_tokens), len(tokens)))
    print(f"greedy: {agreeing} of {GREEDY_TOKENS} tokens equal")
    if abs(difference) > 0.005 or agreeing < GREEDY_TOKENS:
        sys.exit(1)


if __name__ == "__main__":
    main()
