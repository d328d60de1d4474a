# shellcheck shell=bash
# Sourced by quickstart.sh and test.sh: steps that tell what they do and how long they took.

# step NAME COMMAND...: runs it, with a headline before and the time after.
step() {
  local name=$1 start=$SECONDS
  shift
  printf '\n== %s\n' "$name" >&2
  "$@"
  printf '== %s: %s s\n' "$name" $((SECONDS - start)) >&2
}

# logged FILE COMMAND...: for tools that print a line a second. A terminal sees them; elsewhere they
# go to FILE, and a failure shows its end.
logged() {
  local log=$1
  shift
  if [[ -t 2 ]]; then
    "$@" >&2
  elif ! "$@" >"$log" 2>&1; then
    tail -n 60 "$log" >&2
    echo "the whole output is in $log" >&2
    return 1
  fi
}
