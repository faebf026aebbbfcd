"""What systemd is told of a server that it started with `Type=notify`: sd_notify(3), without libsystemd."""

from __future__ import annotations

import contextlib
import os
import socket


def notify(*lines: str) -> None:
    """Send assignments (`READY=1`, `STATUS=...`) to the service manager; nothing where there is none."""
    path = os.environ.get("NOTIFY_SOCKET")
    if not path:
        return
    address = "\0" + path[1:] if path.startswith("@") else path  # the abstract namespace
    # A manager that does not listen must not stop a server.
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.sendto("\n".join(lines).encode(), address)
