#!/bin/bash
# Make the Python environment of the image: torch as the Makefile pins it, and requirements.txt as constraints.txt does.
#   docker/environment.sh cpu|cuda PREFIX [WHEELS]   (in the folder of these files; TORCH_INDEX has PyTorch's CPU builds)
set -euo pipefail
device=$1 prefix=$2 wheels=${3:-docker/wheels}
torch=$(sed -n 's/^TORCH ?= //p' Makefile)
"${PYTHON:-python3}" -m venv "$prefix"
install() {
    "$prefix/bin/python" -m pip --disable-pip-version-check --no-cache-dir install --find-links "$wheels" "$@"
}
if [[ $device == cpu ]]; then
    # PyPI's own builds bring gigabytes of CUDA; the local version makes sure that none of them is taken.
    install "$torch+cpu" ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"}
else
    install "$torch"
fi
install -c constraints.txt 'setuptools>=77' 'ninja>=1.11' 'pybind11>=2.13' -r requirements.txt
