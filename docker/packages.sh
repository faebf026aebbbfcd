#!/bin/bash
# Install the distribution's packages for a stage of the image.
#   docker/packages.sh build|run
set -euo pipefail
case $1 in
build) packages=(build-essential python3-dev python3-venv ca-certificates) ;;
run) packages=(python3 ca-certificates) ;;
*) echo "usage: $0 build|run" >&2 && exit 2 ;;
esac
export DEBIAN_FRONTEND=noninteractive
apt-get update
apt-get install -y --no-install-recommends "${packages[@]}"
apt-get clean
rm -rf /var/lib/apt/lists/* /var/cache/apt/*.bin
