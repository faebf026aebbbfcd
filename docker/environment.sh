#!/bin/bash
# Make the Python environment of the image: torch as the Makefile pins it, and what pyproject.toml asks for.
#   docker/environment.sh cpu|cuda PREFIX       (in the folder of both; TORCH_INDEX has PyTorch's CPU builds)
set -euo pipefail
device=$1 prefix=$2
torch=$(sed -n 's/^TORCH ?= //p' Makefile)
"${PYTHON:-python3}" -m venv "$prefix"
pip() { "$prefix/bin/python" -m pip --disable-pip-version-check --no-cache-dir "$@"; }
if [[ $device == cpu ]]; then
    # PyPI's own builds bring gigabytes of CUDA; the local version makes sure that none of them is taken.
    pip install "$torch+cpu" ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"}
else
    pip install "$torch"
fi
"$prefix/bin/python" - <<'PYTHON' >"$prefix/requirements.txt"
import tomllib

with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)
print(*project["build-system"]["requires"], *project["project"]["dependencies"], sep="\n")
PYTHON
pip install -r "$prefix/requirements.txt"
