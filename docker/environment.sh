#!/bin/bash
# Create the image's Python environment: torch as pinned in the Makefile, requirements.txt as pinned in constraints.txt, and
# the `otel` extra, because TGI's image has tracing and a deployment may set OTLP_ENDPOINT.
#   docker/environment.sh cpu|cuda PREFIX [WHEELS]   (run in the sources' root; TORCH_INDEX has PyTorch's CPU builds)
set -euo pipefail
device=$1 prefix=$2 wheels=${3:-docker/wheels}
torch=$(sed -n 's/^TORCH ?= //p' Makefile)
"${PYTHON:-python3}" -m venv "$prefix"
install() {
    "$prefix/bin/python" -m pip --disable-pip-version-check --no-cache-dir install --find-links "$wheels" "$@"
}
if [[ $device == cpu ]]; then
    # PyPI's builds include gigabytes of CUDA; the local version (+cpu) excludes them.
    install "$torch+cpu" ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"}
else
    install "$torch"
fi
install -c constraints.txt 'setuptools>=77' 'ninja>=1.11' 'pybind11>=2.13' -r requirements.txt \
    'opentelemetry-sdk>=1.30' 'opentelemetry-exporter-otlp-proto-grpc>=1.30'
