"""Quality as the engine measures it, put into an artifact that was written anew."""

import hashlib
import json
import os
import pathlib
import shlex
import subprocess

METRICS = ("quality", "quality_vs_source", "perplexity", "spearman", "standard_error")


def command(nestor, artifact, text, tokens: int, source=None) -> list[str]:
    arguments = [str(nestor), "evaluate", str(artifact), "--text", str(text), "--json"]
    if tokens > 0:
        arguments += ["--tokens", str(tokens)]
    return arguments + (["--source", str(source)] if source else [])


def measure(nestor, artifact, text, tokens: int, source=None):
    """Runs `nestor evaluate` and writes what it measures into nested.json; the levels it reports.
    RuntimeError with the command and what it said where it fails."""
    arguments = command(nestor, artifact, text, tokens, source)
    done = subprocess.run(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, check=False
    )
    if done.returncode != 0:
        said = done.stderr.strip().splitlines()[-1:] or ["nothing"]
        raise RuntimeError(f"{shlex.join(arguments)}: failed: {said[0]}")
    report = json.loads(done.stdout)
    path = pathlib.Path(artifact) / "nested.json"
    description = json.loads(path.read_text())
    for level, measured in zip(description["levels"], report["levels"], strict=True):
        level["metrics"] = {key: measured.get(key) for key in METRICS}
    description["evaluation"]["tokens"] = report["tokens"]
    description["evaluation"]["text_sha256"] = hashlib.sha256(
        pathlib.Path(text).read_bytes()
    ).hexdigest()
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(description, indent=1))
    os.replace(partial, path)
    return report["levels"]
