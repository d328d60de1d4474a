#!/usr/bin/env bash
# Sentences per second of ONNX Runtime (fp32, from PyPI) and of `nestor bench`, in turns within one
# run, on the quickstart's MiniLM.
set -euo pipefail

help() {
  cat <<'TEXT'
Usage: scripts/compare_onnxruntime.sh --pairs FILE [--artifact DIR] [--venv DIR] [FLAG...]

  --pairs FILE    sentence pairs in STS-B's tab-separated format
  --artifact DIR  of nestor (default: models/all-minilm-l6-v2.nested)
  --venv DIR      a virtual environment with the packages of requirements-onnxruntime.txt
                  (default: .cache/onnxruntime, made when it is missing; PyTorch takes 5.7 GB)

Further flags: --threads N (default: all), --rounds N, --batch LIST (default: 1,32). The model is
exported from models/all-minilm-l6-v2. Of ONNX Runtime, the best of the graph as exported and as
fused by its own optimiser, and of the sentences in the file's order and sorted by length, counts.
Run ./quickstart.sh --demo embed before, and nothing else meanwhile.
Example: scripts/compare_onnxruntime.sh --pairs stsb_dev.csv --threads 2 --rounds 5
TEXT
}

pairs=
artifact=models/all-minilm-l6-v2.nested
source=models/all-minilm-l6-v2
venv=.cache/onnxruntime
flags=()
while [[ $# -gt 0 ]]; do
  case $1 in
    --help | -h)
      help
      exit 0
      ;;
    --pairs) pairs=$(realpath "$2") && shift ;;
    --artifact) artifact=$(realpath "$2") && shift ;;
    --venv) venv=$(realpath "$2") && shift ;;
    *) flags+=("$1") ;;
  esac
  shift
done

cd "$(dirname "${BASH_SOURCE[0]}")/.."
[[ -f $pairs ]] || {
  echo "compare_onnxruntime.sh: --pairs: give a file; was \"$pairs\"" >&2
  exit 1
}
[[ -x build/bin/nestord && -f $artifact/nested.json && -f $source/model.safetensors ]] || {
  echo "compare_onnxruntime.sh: build/bin, $artifact or $source is missing;" \
    "run ./quickstart.sh --demo embed" >&2
  exit 1
}

if ! "$venv/bin/python" -c 'import onnxruntime, onnxscript, transformers' 2>/dev/null; then
  echo "making the Python environment $venv" >&2
  rm -rf "$venv"
  /usr/bin/python3 -m venv "$venv"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-cache-dir \
    -r requirements-onnxruntime.txt
fi

files=.cache/onnxruntime-models
if [[ ! -f $files/fused.onnx ]]; then
  mkdir -p "$files"
  "$venv/bin/python" scripts/onnxruntime_bench.py export "$source" "$files"
fi

exec "$venv/bin/python" scripts/onnxruntime_bench.py compare "$files" "$artifact" "$pairs" \
  --build build "${flags[@]}"
