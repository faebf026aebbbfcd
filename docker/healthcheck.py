"""Ask the server of this container for its health; end with 1 unless it answers 200. Docker runs this."""

from __future__ import annotations

import ipaddress
import os
import re
import sys
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path


def health_url(arguments: Sequence[str], environ: Mapping[str, str]) -> str:
    """Return where a server with this command line and environment answers for its health."""
    port = environ.get("AIP_HTTP_PORT") or environ.get("PORT") or "3000"
    if arguments and arguments[-1] == "serve":  # SageMaker
        port = "8080"
    host = environ.get("HOSTNAME", "")  # Docker's is the container's id: then the server listens everywhere
    line = "\0".join(arguments)
    port = _last(r"(?:--port[=\0]|-p\0?)(\d+)", line) or port
    host = _last(r"--host(?:name)?[=\0]([^\0]+)", line) or host
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return f"http://127.0.0.1:{port}/health"
    if address.is_unspecified:
        return f"http://{'[::1]' if address.version == 6 else '127.0.0.1'}:{port}/health"
    return f"http://{f'[{address}]' if address.version == 6 else address}:{port}/health"


def _last(pattern: str, line: str) -> str | None:
    found = re.findall(rf"(?:^|\0){pattern}(?=\0|$)", line)
    return found[-1] if found else None


def main() -> int:
    """Check the server that the container's first process is."""
    arguments = Path("/proc/1/cmdline").read_text(encoding="utf-8", errors="replace").rstrip("\0").split("\0")
    try:
        with urllib.request.urlopen(health_url(arguments, os.environ), timeout=4) as answer:
            return 0 if answer.status == 200 else 1
    except OSError as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
