#!/usr/bin/env bash
# Installs the Debian packages that building, testing and the quickstart need, where missing.
# Usage: scripts/install_packages.sh [EXTRA_PACKAGE...]
# Needs root or sudo only when something is missing; says nothing when everything is there.
set -euo pipefail

packages=(
  # Compiler and build.
  build-essential cmake ninja-build ccache mold pkg-config
  # Server: gRPC, protobuf, metrics, configuration.
  libgrpc++-dev libprotobuf-dev protobuf-compiler protobuf-compiler-grpc libabsl-dev
  prometheus-cpp-dev libyaml-cpp-dev
  # Engine and compression: linear algebra, tokenizer, JSON, checksums.
  libopenblas-dev liblapacke-dev libpcre2-dev libicu-dev nlohmann-json3-dev libssl-dev zlib1g-dev
  # Tests.
  libgtest-dev libgmock-dev
  # Model import, and the English prose for calibration.
  python3 python3-venv ca-certificates fortunes
  "$@"
)

missing=()
installed=" $(dpkg-query --show --showformat='${db:Status-Status}:${Package} ' "${packages[@]}" \
  2>/dev/null || true)"
for package in "${packages[@]}"; do
  [[ $installed == *" installed:$package "* ]] || missing+=("$package")
done
[[ ${#missing[@]} -eq 0 ]] && exit 0

as_root=(env DEBIAN_FRONTEND=noninteractive)
if [[ $(id -u) -ne 0 ]]; then
  if ! command -v sudo >/dev/null; then
    echo "install_packages.sh: missing packages: ${missing[*]}" >&2
    echo "install_packages.sh: run as root, or install sudo" >&2
    exit 1
  fi
  as_root=(sudo env DEBIAN_FRONTEND=noninteractive)
fi
apt_options=(-y -qq -o Acquire::Retries=3 -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0)

log=$(mktemp)
trap 'rm -f "$log"' EXIT
echo "installing ${#missing[@]} packages: ${missing[*]}" >&2
for attempt in 1 2 3; do
  if "${as_root[@]}" apt-get update "${apt_options[@]}" >"$log" 2>&1 &&
    "${as_root[@]}" apt-get install "${apt_options[@]}" --no-install-recommends "${missing[@]}" \
      >>"$log" 2>&1; then
    exit 0
  fi
  echo "install_packages.sh: attempt $attempt of 3 failed" >&2
  sleep $((attempt * 3))
done
cat "$log" >&2
exit 1
