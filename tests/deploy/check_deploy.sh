#!/usr/bin/env bash
# Checks what is shipped for deployment. Exit status: 0 passed, 77 skipped because a tool is missing,
# else failed.
#
#   check_deploy.sh manifests | configuration | prometheus | dashboard | packages
#   check_deploy.sh libraries BIN_DIRECTORY
set -euo pipefail
cd "$(dirname "$0")/../.."
PATH="$PWD/.venv/bin:$PATH"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

skip() {
  echo "SKIPPED: $*"
  exit 77
}

fail() {
  echo "FAILED: $*" >&2
  exit 1
}

need() {
  command -v "$1" >/dev/null || skip "$1 is not installed"
}

need_yaml() {
  need python3
  python3 -c 'import yaml' 2>/dev/null || skip "python3 has no module yaml"
}

# The packages that the Dockerfile's runtime stage installs, one a line.
runtime_packages() {
  sed -n '/^FROM debian:12-slim$/,$p' Dockerfile | grep -oE '^ +(lib[a-z0-9.+-]+)' | tr -d ' '
}

check_manifests() {
  need kubectl
  kubectl kustomize deploy/kubernetes >"$scratch/all.yaml"
  need_yaml
  python3 tests/deploy/check_manifests.py "$scratch/all.yaml" "$scratch/kinds"
  need kubernetes-validate
  kubernetes-validate --strict "$scratch"/kinds/*.yaml
}

check_configuration() {
  need_yaml
  python3 tests/deploy/check_configuration.py config/nestord.yaml deploy/kubernetes/nestord.yaml \
    deploy/kubernetes/deployment.yaml Dockerfile
}

check_prometheus() {
  need promtool
  promtool check config deploy/prometheus/prometheus.yml
  promtool check rules deploy/prometheus/nestor_rules.yml
  (cd deploy/prometheus && promtool test rules nestor_rules_test.yml)
  # Debian builds promtool without service discovery in Kubernetes: check the rest of that file.
  need_yaml
  cp deploy/prometheus/nestor_rules.yml "$scratch"
  python3 - deploy/prometheus/prometheus_kubernetes.yml >"$scratch/prometheus.yml" <<'PYTHON'
import sys, yaml
configuration = yaml.safe_load(open(sys.argv[1], encoding="utf-8"))
for job in configuration["scrape_configs"]:
    assert job.pop("kubernetes_sd_configs")[0]["role"] == "pod"
print(yaml.safe_dump(configuration))
PYTHON
  promtool check config "$scratch/prometheus.yml"
}

check_dashboard() {
  need python3
  python3 tests/deploy/check_metrics.py docs/metrics.md deploy/grafana/nestor.json \
    deploy/prometheus/nestor_rules.yml deploy/prometheus/nestor_rules_test.yml
}

# The runtime stage's packages install together on a system that has nothing.
check_packages() {
  need apt-get
  [[ $(. /etc/os-release && echo "$ID $VERSION_ID") == "debian 12" ]] || skip "not Debian 12"
  apt-cache show libgrpc++1.51 >/dev/null 2>&1 || skip "the package lists are empty"
  : >"$scratch/status"
  mapfile -t packages < <(runtime_packages)
  ((${#packages[@]} >= 10)) || fail "only ${#packages[@]} packages found in the Dockerfile"
  apt-get install --simulate --no-install-recommends -o Dir::State::status="$scratch/status" \
    "${packages[@]}" >"$scratch/log" 2>&1 || fail "$(cat "$scratch/log")"
  echo "${#packages[@]} packages, $(grep -c '^Inst' "$scratch/log") with what they depend on"
}

# Every library that the two programs name is a file of a package that the runtime stage installs.
check_libraries() {
  need readelf
  need dpkg-query
  local program library bad=0
  mapfile -t packages < <(runtime_packages)
  dpkg-query --listfiles libc6 "${packages[@]}" >"$scratch/files" 2>"$scratch/log" ||
    fail "the Dockerfile's packages cannot be listed: $(cat "$scratch/log")"
  sed 's|.*/||' "$scratch/files" >"$scratch/names"
  for program in "$1/nestord" "$1/nestor"; do
    [[ -x $program ]] || skip "$program is not built"
    readelf -d "$program" | sed -n 's/.*(NEEDED).*\[\(.*\)\]/\1/p' >>"$scratch/needed"
  done
  while read -r library; do
    grep -qxF "$library" "$scratch/names" && continue
    echo "$library is in no package that the Dockerfile installs: ${packages[*]}" >&2
    bad=1
  done <"$scratch/needed"
  ((bad == 0)) || exit 1
  echo "$(wc -l <"$scratch/needed") libraries checked"
}

case "${1:-}" in
  manifests | configuration | prometheus | dashboard | packages) "check_$1" ;;
  libraries) check_libraries "${2:?directory of the programs}" ;;
  *) fail "unknown check '${1:-}'" ;;
esac
