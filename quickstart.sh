#!/usr/bin/env bash
# From a clean clone to one prompt answered at three budgets.
set -euo pipefail

help() {
  cat <<'TEXT'
Usage: ./quickstart.sh [--demo generate|embed] [--model DIR | --hf-id ORG/NAME] [--prompt TEXT]

Installs what is missing, builds, gets a model, compresses it, starts nestord on a free loopback
port, asks it at three budgets, prints what each answer cost, and stops it. What is done already is
skipped.

  --demo generate   SmolLM2-135M-Instruct answers a prompt (the default)
  --demo embed      all-MiniLM-L6-v2 compares sentences
  --model DIR       a Hugging Face directory instead; the artifact is written beside it
  --hf-id ORG/NAME  a model of the Hugging Face hub instead, downloaded where the network allows
  --prompt TEXT     what to ask a language model

Example: ./quickstart.sh --demo embed
TEXT
}

fail() {
  echo "quickstart.sh: $*" >&2
  exit 1
}

demo=generate
model=
hf_id=
prompt="Why is the sky blue? Answer in two sentences."
while [[ $# -gt 0 ]]; do
  case $1 in
    --help | -h)
      help
      exit 0
      ;;
    --demo | --model | --hf-id | --prompt)
      [[ $# -ge 2 ]] || fail "$1: needs a value; see --help"
      case $1 in
        --demo) demo=$2 ;;
        --model) model=$2 ;;
        --hf-id) hf_id=$2 ;;
        --prompt) prompt=$2 ;;
      esac
      shift 2
      ;;
    *) fail "unknown argument $1; see --help" ;;
  esac
done
[[ $demo == generate || $demo == embed ]] || fail "--demo: expected generate or embed; was $demo"
[[ -z $model || -z $hf_id ]] || fail "--model and --hf-id: give one of them"
if [[ -n $model ]]; then
  [[ -f $model/config.json ]] || fail "--model: $model has no config.json"
  model=$(realpath "$model")
fi

cd "$(dirname "${BASH_SOURCE[0]}")"
# shellcheck source=scripts/step.sh
source scripts/step.sh
nestor=build/bin/nestor
delta=

build() {
  mkdir -p build
  logged build/configure.log cmake --preset cpu
  logged build/build.log cmake --build build --target nestor nestord
}

fetch() {
  scripts/python_env.sh
  if [[ -n $hf_id ]]; then
    model=$(.venv/bin/python scripts/fetch_model.py --hf-id "$hf_id")
  elif [[ -z $model && $demo == embed ]]; then
    model=$(.venv/bin/python scripts/fetch_model.py all-minilm-l6-v2)
    delta=config/deltas/all-minilm-l6-v2.safetensors
  elif [[ -z $model ]]; then
    model=$(.venv/bin/python scripts/fetch_model.py smollm2-135m-instruct)
    delta=config/deltas/smollm2-135m-instruct.safetensors
  fi
  # The script writes this file last.
  [[ -s models/evaluation_sentences.txt ]] || .venv/bin/python scripts/calibration_text.py models
}

compress() {
  local arguments=(--dtype int8)
  if [[ $kind == encoder ]]; then
    local levels=(--levels 5)
    # Which names its levels; gar pairs would save little at their ranks.
    [[ -z $delta ]] || levels=(--delta "$delta" --gar-levels none)
    arguments+=(--ladder prefix "${levels[@]}" --calibration models/calibration_sentences.txt
      --evaluation models/evaluation_sentences.txt)
  else
    # Levels of fewer FLOPs need training, which our own choice of a model has had.
    local ladder=(--ladder residual)
    [[ -z $delta ]] || ladder=(--ladder both --delta "$delta")
    arguments+=("${ladder[@]}" --levels 6 --calibration models/calibration.txt
      --evaluation models/evaluation.txt)
  fi
  "$nestor" compress "$model" "$artifact" "${arguments[@]}"
}

start_daemon() {
  # Loading and the warm-up's measurements take a few seconds.
  build/bin/nestord --config config/nestord.yaml --model "$artifact" --listen 127.0.0.1:0 \
    --port-file "$scratch/port" --set metrics.listen= --set server.drain_grace_ms=0 \
    2>"$scratch/nestord.log" >&2 &
  daemon=$!
  until [[ -s $scratch/port ]]; do
    if ! kill -0 "$daemon" 2>/dev/null; then
      daemon=
      cat "$scratch/nestord.log" >&2
      fail "nestord did not start"
    fi
    sleep 0.1
  done
  server=127.0.0.1:$(<"$scratch/port")
  "$nestor" health --server "$server" --wait 60s >/dev/null
}

# The two budgets beside "none": the cost of the level in the middle, and of the cheapest one. Costs
# are bytes for a language model and FLOPs for an encoder, rounded up so that the level fits.
budgets() {
  "$nestor" levels --server "$server" --json | python3 -c '
import json, math, sys
model = json.load(sys.stdin)
key = "relative_flops" if model["is_encoder"] else "relative_cost"
costs = sorted({math.ceil(level[key] * 100) / 100 for level in model["levels"]})
for cost in sorted({costs[0], costs[(len(costs) - 1) // 2]} - {costs[-1]}, reverse=True):
    print(cost)'
}

ask() {
  local budget=("$@")
  printf '\n-- budget: %s\n' "${budget[*]:-none (the best quality)}"
  if [[ $kind == encoder ]]; then
    "$nestor" embed --server "$server" "${budget[@]}" --pairs \
      "A man is playing a guitar." "Someone plays an instrument." \
      "The river froze overnight." "It was very cold." \
      "The river froze overnight." "Stocks closed higher on Friday."
    # Many sentences for the speed; the usage line alone is wanted.
    printf '256 sentences: '
    # shellcheck disable=SC2069
    head -n 256 models/evaluation_sentences.txt |
      "$nestor" embed --server "$server" "${budget[@]}" --truncate --file - 2>&1 >/dev/null
  else
    "$nestor" generate --server "$server" "${budget[@]}" "${chat[@]}" --max-tokens 96 "$prompt" 2>&1
  fi
}

demonstrate() {
  local list cost
  start_daemon
  "$nestor" levels --server "$server"
  [[ $kind == encoder ]] || printf '\nprompt: %s\n' "$prompt"
  list=$(budgets)
  ask
  for cost in $list; do
    ask --max-cost "$cost"
  done
}

scratch=$(mktemp -d)
daemon=
stop() {
  if [[ -n $daemon ]]; then
    kill -TERM "$daemon" 2>/dev/null || true
    wait "$daemon" || true
  fi
  rm -rf "$scratch"
}
trap stop EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

step "packages" scripts/install_packages.sh
step "build (build/bin)" build
step "model" fetch
artifact=$model.nested
kind=language
grep -q '"model_type": *"bert"' "$model/config.json" && kind=encoder
chat=()
if [[ -f $model/chat_template.jinja ]] ||
  grep -qs '"chat_template"' "$model/tokenizer_config.json"; then
  chat=(--chat)
fi
if [[ ! -f $artifact/nested.json ]]; then
  step "compress ($artifact)" compress
fi
step "three budgets" demonstrate
