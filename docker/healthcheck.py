"""Docker health check: query /health of the server in this container; exit with 1 unless it answers 200."""

from __future__ import annotations

import ipaddress
import os
import re
import socket
import ssl
import sys
import urllib.parse
from collections.abc import Mapping, Sequence
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path

TIMEOUT_S = 4


def health_url(arguments: Sequence[str], environ: Mapping[str, str]) -> str:
    """Return the health URL of a server with this command line and environment, or `unix:PATH`."""
    line = "\0".join(map(_with_dashes, arguments))
    path = _last(r"--uds[=\0]([^\0]+)", line) or environ.get("UDS")
    if path:
        return f"unix:{path}"
    port = environ.get("AIP_HTTP_PORT") or environ.get("PORT") or "3000"
    if arguments and arguments[-1] == "serve":  # SageMaker
        port = "8080"
    port = _last(r"(?:--port[=\0]|-p\0?)(\d+)", line) or port
    host = environ.get("HOSTNAME", "")
    if host != "localhost" and _address(host) is None:  # set by Docker: the server listens on all addresses
        host = "0.0.0.0"
    host = _last(r"--host(?:name)?[=\0]([^\0]+)", line) or host
    address = _address(host)
    if address is not None:
        if address.is_unspecified:
            host = "::1" if address.version == 6 else "127.0.0.1"
        host = f"[{host}]" if address.version == 6 else host
    is_tls = _last(r"--ssl-certfile[=\0]([^\0]+)", line) or environ.get("SSL_CERTFILE")
    return f"{'https' if is_tls else 'http'}://{host}:{port}/health"


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _with_dashes(argument: str) -> str:
    """Return an argument with its flag as this program spells it; the server also takes underscores."""
    flag, equals, value = argument.partition("=")
    return f"{flag.replace('_', '-')}{equals}{value}" if flag.startswith("--") else argument


def _last(pattern: str, line: str) -> str | None:
    found = re.findall(rf"(?:^|\0){pattern}(?=\0|$)", line)
    return found[-1] if found else None


def connect(url: str) -> HTTPConnection:
    """Return a connection to the server, accepting a certificate for any name."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme == "unix":
        connection = HTTPConnection("localhost", timeout=TIMEOUT_S)
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.settimeout(TIMEOUT_S)
        connection.sock.connect(parts.path)
        return connection
    if parts.scheme == "https":
        return HTTPSConnection(parts.netloc, timeout=TIMEOUT_S, context=ssl._create_unverified_context())
    return HTTPConnection(parts.netloc, timeout=TIMEOUT_S)


def main() -> int:
    """Check the server that runs as the container's first process."""
    arguments = Path("/proc/1/cmdline").read_text(encoding="utf-8", errors="replace").rstrip("\0").split("\0")
    try:
        connection = connect(health_url(arguments, os.environ))
        connection.request("GET", "/health")
        return 0 if connection.getresponse().status == 200 else 1
    except (OSError, HTTPException) as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
