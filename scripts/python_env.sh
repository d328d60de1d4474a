#!/usr/bin/env bash
# Makes the virtual environment .venv/ with the packages of requirements.txt.
# Does nothing when it was made from the same requirements before.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Debian's own interpreter, whose venv module install_packages.sh provides.
python=/usr/bin/python3
stamp=.venv/requirements.sha256
wanted=$({ "$python" --version && cat requirements.txt && pwd; } | sha256sum)
[[ -f $stamp && $(<"$stamp") == "$wanted" ]] && exit 0

echo "making the Python environment .venv" >&2
rm -rf .venv
"$python" -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check --retries 5 \
  -r requirements.txt
# Written last: an interrupted run leaves no stamp and starts over.
echo "$wanted" >"$stamp"
