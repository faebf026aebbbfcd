#!/bin/bash
# Compile the extension and install the server into the environment created by environment.sh.
#   docker/install.sh cpu|cuda PREFIX           (run in the sources' root)
set -euo pipefail
device=$1 prefix=$2
pip() { "$prefix/bin/python" -m pip --disable-pip-version-check --no-cache-dir "$@"; }
# If the requested compiler is missing, the build fails instead of making the other image.
TGI_CUDA=$([[ $device == cuda ]] && echo 1 || echo 0)
export TGI_CUDA
pip install --no-build-isolation --no-deps .
pip uninstall -y ninja pybind11
# Parts of torch that only building and testing need: a tenth of the image. Only in this prefix: torch may be elsewhere.
rm -rf "$prefix"/lib/python3*/site-packages/torch/{include,test}
# Not from the sources' folder, so that this checks the installed package.
cd /
"$prefix/bin/python" -c "import tgi_asgi._C, tgi_asgi.app"
"$prefix/bin/tgi-asgi" --version
