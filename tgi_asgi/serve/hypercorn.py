"""hypercorn as we run it: configured for long streams, with classes of ours for what it does otherwise.

Used by `server.py` only.
"""

from __future__ import annotations

import logging
import socket
from functools import partial
from importlib.metadata import version

import hypercorn.asyncio.run
import hypercorn.protocol.h11
from hypercorn.config import Config

from tgi_asgi.errors import ModelLoadError
from tgi_asgi.serve.body_chunks import Stream
from tgi_asgi.serve.connections import Connection, ConnectionLimit, Http1, Turnstile
from tgi_asgi.serve.listening import BACKLOG
from tgi_asgi.settings import Settings

logger = logging.getLogger(__name__)

KNOWN_VERSIONS = ("0.18.",)  # whose source was read for what our classes replace
KEEP_ALIVE_S = 75  # over the 60 s of common load balancers, which else reuse a connection as it closes
FLUSH_S = 1.0  # what the last events of a stream get to leave, once nothing more is generated
_A_TURN = 8  # reads that are parsed in one turn of the event loop


def make_config(listener: socket.socket, settings: Settings) -> Config:
    """Return hypercorn's configuration for long streams; its defaults are for short answers.

    Takes the listener over.

    Raises:
        ModelLoadError: the certificate or its key cannot be used.
    """
    config = Config()
    config.bind = [f"fd://{listener.detach()}"]
    config.backlog = BACKLOG
    config.keep_alive_timeout = KEEP_ALIVE_S
    config.keep_alive_max_requests = 1 << 31
    config.max_app_queue_size = 100
    config.graceful_timeout = FLUSH_S  # our drain has ended before hypercorn begins to close
    config.shutdown_timeout = 10
    config.h11_max_incomplete_size = 64 << 10
    config.alpn_protocols = ["http/1.1"]  # its HTTP/2 kills connections answered before the upload ends
    config.include_server_header = False
    config.errorlog = logging.getLogger("hypercorn.error")
    if settings.ssl_certfile is not None:
        config.certfile = settings.ssl_certfile
        config.keyfile = settings.ssl_keyfile or settings.ssl_certfile
        config.keyfile_password = ""  # without one OpenSSL would ask the terminal
        try:
            config.create_ssl_context()
        except OSError as error:
            files = f"{config.certfile} and {config.keyfile}"
            raise ModelLoadError(f"--ssl-certfile, --ssl-keyfile: cannot use {files}: {error}") from None
    return config


def install(limit: ConnectionLimit) -> None:
    """Let hypercorn use our classes from now on, in this process, if its version is known."""
    found = version("hypercorn")
    if not found.startswith(KNOWN_VERSIONS):
        logger.warning("hypercorn %s is not known here: its own classes serve, with slower streams", found)
        return
    turnstile = Turnstile(_A_TURN)
    hypercorn.asyncio.run.TCPServer = partial(Connection, limit, turnstile)  # type: ignore[assignment, attr-defined]
    hypercorn.protocol.H11Protocol = Http1  # type: ignore[attr-defined]
    hypercorn.protocol.h11.HTTPStream = Stream  # type: ignore[attr-defined]
