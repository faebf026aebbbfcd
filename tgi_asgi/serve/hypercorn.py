"""hypercorn as the server runs it: configured for long streams, with some of its classes replaced.

Used only by `server.py`.
"""

from __future__ import annotations

import logging
import socket
import ssl
from functools import partial
from importlib.metadata import version

import hypercorn.asyncio.run
import hypercorn.protocol.h11
from hypercorn.config import Config

from tgi_asgi.errors import ModelLoadError
from tgi_asgi.serve.body_chunks import Stream
from tgi_asgi.serve.connections import Connection, ConnectionLimit, Http1, TurnLimiter
from tgi_asgi.serve.listening import BACKLOG
from tgi_asgi.serve.process import FLUSH_S
from tgi_asgi.settings import Settings

_KNOWN_VERSION = "0.18."  # whose source the replaced classes were checked against; also in requirements.txt
# OpenSSL says only "PEM lib" of all of this.
_NOT_PEM = "there is no certificate or no key in PEM's form, or the key is encrypted"
_MAX_PER_TURN = 8  # reads parsed per turn of the event loop


logger = logging.getLogger(__name__)


class ServerConfig(Config):
    """hypercorn's configuration, with a certificate that can be read again while it is used."""

    _tls: ssl.SSLContext | None = None

    def create_ssl_context(self) -> ssl.SSLContext | None:
        """Return the context of the listening socket, each of whose connections gets the newest one.

        Raises:
            ModelLoadError: if the certificate or its key cannot be used.
        """
        if (context := self._read_certificate()) is not None:
            self._tls = context
            context.sni_callback = self._renew
        return context

    def reload_certificate(self) -> None:
        """Read the certificate and its key again for later connections; if they are broken, keep the old."""
        try:
            self._tls = self._read_certificate()
        except ModelLoadError as error:
            logger.error("keeping the current certificate: %s", error)
            return
        if self._tls is not None:
            logger.info("the certificate has been read again")

    def _read_certificate(self) -> ssl.SSLContext | None:
        try:
            return super().create_ssl_context()
        except OSError as error:
            files = f"{self.certfile} and {self.keyfile}"
            reason = _NOT_PEM if "PEM lib" in str(error) else error.strerror or error
            raise ModelLoadError(f"--ssl-certfile, --ssl-keyfile: cannot use {files}: {reason}") from None

    def _renew(self, connection: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
        """Use the newest certificate. To load it into the context would keep the old one of another type."""
        if self._tls is not None:
            connection.context = self._tls


def make_config(listener: socket.socket, settings: Settings) -> ServerConfig:
    """Return hypercorn's configuration for long streams; its defaults suit short answers.

    Takes ownership of the listener.

    Raises:
        ModelLoadError: if the certificate or its key cannot be used.
    """
    config = ServerConfig()
    config.bind = [f"fd://{listener.detach()}"]
    config.backlog = BACKLOG
    config.keep_alive_timeout = settings.keep_alive_timeout_s
    config.keep_alive_max_requests = 1 << 31
    config.max_app_queue_size = 100
    config.graceful_timeout = FLUSH_S  # the server's own drain ends before hypercorn starts to close
    config.shutdown_timeout = 10
    config.h11_max_incomplete_size = 64 << 10
    config.alpn_protocols = ["http/1.1"]  # its HTTP/2 kills connections answered before the upload ends
    config.include_server_header = False
    config.errorlog = logging.getLogger("hypercorn.error")
    if settings.ssl_certfile is not None:
        config.certfile = settings.ssl_certfile
        config.keyfile = settings.ssl_keyfile or settings.ssl_certfile
        config.keyfile_password = ""  # without a password, OpenSSL would ask at the terminal
        config.create_ssl_context()
    return config


def install(limit: ConnectionLimit) -> None:
    """Replace hypercorn's classes in this process from now on.

    Raises:
        ModelLoadError: if these classes were not made for the installed version. Its own have no limits on
            connections and idle clients, which nobody would notice before an overload.
    """
    found = version("hypercorn")
    if not found.startswith(_KNOWN_VERSION):
        wanted = f"{_KNOWN_VERSION}*"
        advice = f"pip install 'hypercorn=={wanted}'"
        raise ModelLoadError(f"this server needs hypercorn {wanted}, and {found} is installed: {advice}")
    turn_limiter = TurnLimiter(_MAX_PER_TURN)
    hypercorn.asyncio.run.TCPServer = partial(Connection, limit, turn_limiter)  # type: ignore[assignment, attr-defined]
    hypercorn.protocol.H11Protocol = Http1  # type: ignore[assignment, attr-defined]
    hypercorn.protocol.h11.HTTPStream = Stream  # type: ignore[attr-defined]
