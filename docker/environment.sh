#!/bin/bash
# Make the Python environment of the image: torch as the Makefile pins it, and requirements.txt.
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
pip install 'setuptools>=77' wheel 'ninja>=1.11' 'pybind11>=2.13' -r requirements.txt
