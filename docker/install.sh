#!/bin/bash
# Compile the extension and install the server into the environment that environment.sh has made.
#   docker/install.sh cpu|cuda PREFIX           (in the folder of the sources)
set -euo pipefail
device=$1 prefix=$2
pip() { "$prefix/bin/python" -m pip --disable-pip-version-check --no-cache-dir "$@"; }
# Without the compiler that was asked for, the build shall fail rather than make the other image.
TGI_CUDA=$([[ $device == cuda ]] && echo 1 || echo 0)
export TGI_CUDA
pip install --no-build-isolation --no-deps .
pip uninstall -y ninja pybind11
# What only building and testing need of torch: a tenth of the image. In this folder alone: torch may come from elsewhere.
rm -rf "$prefix"/lib/python3*/site-packages/torch/{include,test}
# Not from the sources' folder: what was installed must be whole.
cd /
"$prefix/bin/python" -c "import tgi_asgi._C, tgi_asgi.app"
"$prefix/bin/tgi-asgi" --version
