#!/usr/bin/env bash
# From a language model's checkpoint to a prefix ladder of trained factors: a measured search, a
# refit, training, and the artifact (docs/ladders.md, "The whole in one command").
set -euo pipefail

help() {
  cat <<'TEXT'
Usage: scripts/consolidate_ladder.sh --text FILE [--evaluation FILE ...] [FLAG ...]

  --text FILE        to calibrate, search and train on, but for its last twentieth, on which the
                     artifact states its qualities; may be given several times, and texts take
                     turns in training, so one that is given twice counts twice
  --evaluation FILE  to measure the trained levels on besides; may be given several times. Nothing
                     is chosen by these
  --tokens N         to measure of each of these (default: 8192; 0: all)
  --costs LIST       FLOPs of the levels (default: 0.9,0.8,0.6; on a GPU 0.9,0.8,0.7,0.6,0.5)
  --minutes N        of training (default: 180; on a GPU 10)
  --self-sample N    tokens that the model writes itself, one more text to train on (default: 0; on
                     a GPU 4000000)
  --model DIR        (default: models/smollm2-135m-instruct, which ./quickstart.sh fetches)
  --work DIR         what is made on the way; a run that was stopped goes on from there, with the
                     same options (default: MODEL.consolidated.work)
  --out DIR          the artifact (default: MODEL.consolidated.nested)
  --venv DIR         with the packages of requirements-consolidate.txt (default: .venv-consolidate,
                     made when it is missing; PyTorch takes 5.7 GB)

Before the training two cores calibrate, search and refit for a quarter of an hour. Of a model of
135 M parameters training takes 8 GB of memory on a CPU, and the work 2 GB of disk. Nothing else
should run meanwhile.
Example: scripts/consolidate_ladder.sh --text train.txt --evaluation test.txt
TEXT
}

fail() {
  echo "consolidate_ladder.sh: $*" >&2
  exit 1
}

texts=()
evaluations=()
tokens=8192
costs=
minutes=
self_sample=
model=models/smollm2-135m-instruct
work=
out=
venv=.venv-consolidate
while [[ $# -gt 0 ]]; do
  case $1 in
    --help | -h)
      help
      exit 0
      ;;
    --text | --evaluation | --tokens | --costs | --minutes | --self-sample | --model | --work | \
      --out | --venv)
      [[ $# -ge 2 ]] || fail "$1: needs a value; see --help"
      case $1 in
        --text | --evaluation)
          [[ -f $2 ]] || fail "$1: $2: no such file"
          ;;
        --tokens | --minutes | --self-sample)
          [[ $2 =~ ^[0-9]+$ ]] || fail "$1: expected a whole number; was $2"
          ;;
        --costs)
          [[ $2 =~ ^0?\.[0-9]+(,0?\.[0-9]+)*$ ]] ||
            fail "$1: expected shares such as 0.9,0.8,0.6; was $2"
          ;;
        --model)
          [[ -f $2/config.json ]] || fail "$1: $2 has no config.json"
          ;;
      esac
      case $1 in
        --text) texts+=("$(realpath "$2")") ;;
        --evaluation) evaluations+=("$(realpath "$2")") ;;
        --tokens) tokens=$2 ;;
        --costs) costs=$2 ;;
        --minutes) minutes=$2 ;;
        --self-sample) self_sample=$2 ;;
        --model) model=$(realpath "$2") ;;
        --work) work=$(realpath -m "$2") ;;
        --out) out=$(realpath -m "$2") ;;
        --venv) venv=$(realpath -m "$2") ;;
      esac
      shift 2
      ;;
    *) fail "unknown argument $1; see --help" ;;
  esac
done
[[ ${#texts[@]} -gt 0 ]] || fail "--text: give a file; see --help"
[[ $minutes != 0 ]] || fail "--minutes: must be positive; was 0"

cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/step.sh
source scripts/step.sh
nestor=build/bin/nestor
[[ -x $nestor ]] || fail "$nestor is missing; run ./quickstart.sh"
[[ -f $model/config.json ]] || fail "$model is missing; run ./quickstart.sh, or give --model"
if grep -q '"model_type": *"bert"' "$model/config.json"; then
  fail "--model: $model is an encoder, expected a language model"
fi
work=${work:-$model.consolidated.work}
out=${out:-$model.consolidated.nested}

make_environment() {
  /usr/bin/python3 -m venv "$venv"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-cache-dir \
    -r requirements-consolidate.txt
}
[[ -x $venv/bin/python ]] || step "PyTorch ($venv)" make_environment
"$venv/bin/python" -c 'import jinja2, safetensors, tokenizers, torch, transformers' ||
  fail "--venv: $venv lacks packages of requirements-consolidate.txt; remove it to have it made"

if "$venv/bin/python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  costs=${costs:-0.9,0.8,0.7,0.6,0.5}
  minutes=${minutes:-10}
  self_sample=${self_sample:-4000000}
  training=(--length 512 --batch 256 --micro-batch 64 --learning-rate 1.2e-3)
else
  costs=${costs:-0.9,0.8,0.6}
  minutes=${minutes:-180}
  self_sample=${self_sample:-0}
  # Small steps of one level each, a pass for every worker: a CPU's hours are few tokens, and steps
  # count for more than their size.
  workers=$(($(nproc) < 4 ? $(nproc) : 4))
  training=(--length 512 --batch $((2 * workers)) --micro-batch 2 --workers "$workers"
    --learning-rate 2e-4 --warm-up 20 --checkpoint-steps 20 --held-out-steps 100 --held-out 4)
fi

# What lies in the work directory is of one set of options.
options=$(
  echo "model: $model, costs: $costs, minutes: $minutes, self-sample: $self_sample"
  echo "training: ${training[*]}"
  sha256sum "${texts[@]}"
)
mkdir -p "$work"
if [[ -f $work/options && $(<"$work/options") != "$options" ]]; then
  diff "$work/options" <(echo "$options") >&2 || true
  fail "--work: $work holds a run of other options (above: <); expected the same, or another --work"
fi
echo "$options" >"$work/options"

untrained=$work/untrained.nested
factors=$work/factors.safetensors
# Each text once.
mapfile -t different < <(printf '%s\n' "${texts[@]}" | sort -u)

# Ranks at the cost of gar pairs, and factors refitted to what cut layers give. The model writes as
# many tokens again to calibrate on.
search() {
  "$nestor" compress "$model" "$untrained" --ladder prefix --search measured --probes 2 \
    --probe-tokens 512 --costs "$costs" --gar-levels later --calibration-tokens 18432 \
    "${different[@]/#/--calibration=}"
}

train() {
  "$venv/bin/python" -m consolidate "$untrained" "${texts[@]/#/--text=}" --train factors \
    --minutes "$minutes" --self-sample "$self_sample" "${training[@]}" --work "$work/training" \
    --out "$factors"
}

# The pairs of the trained factors, which calibration has no part in but for where pivots lie.
apply() {
  "$nestor" compress "$model" "$out" --ladder prefix --delta "$factors" \
    --evaluation "$work/training/held_out.txt" "${different[@]/#/--calibration=}"
}

measure() {
  local text
  for text in "${evaluations[@]}"; do
    echo "$text:"
    "$nestor" evaluate "$out" --text "$text" --tokens "$tokens" --source "$model"
  done
}

[[ -f $untrained/nested.json ]] || step "search ($untrained)" search
[[ -f $factors ]] || step "train ($factors)" train
[[ -f $out/nested.json ]] || step "compress ($out)" apply
[[ ${#evaluations[@]} -eq 0 ]] || step "measure" measure
