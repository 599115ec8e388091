#!/usr/bin/env bash
# install.sh dependencies|project: a step of the image's build, in /opt/kvcat.
#
# The base image's own builds are protected: packages that are compiled against its CUDA and torch are pinned to what is there,
# and looked at again afterwards. On a base without torch, torch comes from constraints.txt.
set -euo pipefail

say() { printf 'image: %s\n' "$*"; }
pip() { python -m pip "$@"; }

# NAME==VERSION lines of what must stay as it is (protected.py says which).
protected() { python launch/image/protected.py; }

dependencies() {
  python -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else f"the base has Python {sys.version}; 3.11 or newer is needed")'
  pip --version || python -m ensurepip # environments made by uv may lack it
  unset PIP_CONSTRAINT                 # NGC's own pins; its builds are protected below
  protected > /tmp/before.txt
  say "the base's own, never replaced: $(paste -sd' ' /tmp/before.txt)"
  # Our pins, but for what is protected; those are pinned to the versions that are there.
  python - /tmp/before.txt << 'PYTHON' > /tmp/constraints.txt
import re, sys

before = open(sys.argv[1]).read().split()
present = {re.sub(r"[-_.]+", "-", line.partition("==")[0]).lower() for line in before}
for line in open("constraints.txt"):
    name = re.sub(r"[-_.]+", "-", line.partition("==")[0].strip()).lower()
    if not line.startswith("#") and name not in present:
        print(line.strip())
print(*before, sep="\n")
PYTHON
  grep -q '^torch==' /tmp/before.txt || pip install "$(grep '^torch==' constraints.txt)"
  protected > /tmp/before.txt
  python -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; print(*p["dependencies"], *p["optional-dependencies"]["train"], sep="\n")' \
    > /tmp/requirements.txt
  pip install --no-compile -c /tmp/constraints.txt -r /tmp/requirements.txt
  unchanged
  rm -f /tmp/constraints.txt /tmp/requirements.txt
  mkdir -p /opt/kvcat && mv /tmp/before.txt /opt/kvcat/protected.txt
}

# A package that the base had must be there still, in the same version.
unchanged() {
  local list=${1:-/tmp/before.txt}
  protected | diff "$list" - || { say "pip replaced what the base had built (above: < before, > after)"; exit 1; }
}

project() {
  pip install --no-compile --no-deps .
  rm -rf build ./*.egg-info
  unchanged /opt/kvcat/protected.txt
  chmod -R a+rX /opt/kvcat
}

case ${1:-} in
  dependencies | project) "$1" ;;
  *) say "usage: install.sh dependencies|project"; exit 2 ;;
esac
