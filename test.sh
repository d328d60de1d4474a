#!/usr/bin/env bash
# Installs what is missing, builds, and runs every test.
set -euo pipefail

help() {
  cat <<'TEXT'
Usage: ./test.sh [--asan | --tsan] [CTEST_ARGUMENT...]

  --asan   under the address and undefined-behaviour sanitizers (build-asan/)
  --tsan   under the thread sanitizer, what links no gRPC (build-tsan/)

Further arguments go to ctest. Example: ./test.sh -R Scheduler
TEXT
}

preset=cpu
directory=build
case ${1:-} in
  --help | -h)
    help
    exit 0
    ;;
  --asan)
    preset=asan
    directory=build-asan
    shift
    ;;
  --tsan)
    preset=tsan
    directory=build-tsan
    # OpenBLAS is not instrumented: what its own threads do would look like races.
    export OPENBLAS_NUM_THREADS=1
    shift
    ;;
esac

cd "$(dirname "${BASH_SOURCE[0]}")"
# shellcheck source=scripts/step.sh
source scripts/step.sh

python_env() {
  scripts/python_env.sh || echo "the tests of scripts/ will show as skipped" >&2
}

build() {
  mkdir -p "$directory"
  logged "$directory/configure.log" cmake --preset "$preset"
  logged "$directory/build.log" cmake --build "$directory"
}

run_tests() {
  ctest --test-dir "$directory" --output-on-failure --no-tests=error -j "$(nproc)" "$@"
}

step "packages" scripts/install_packages.sh
step "Python environment" python_env
step "build ($directory)" build
step "tests ($directory)" run_tests "$@"
