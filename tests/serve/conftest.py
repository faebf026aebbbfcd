"""The server's event loop, and the addresses where it listens: TCP, TLS and a Unix socket."""

from __future__ import annotations

import asyncio
import dataclasses
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import trustme

from tests.support.serving import LOCAL
from tgi_asgi.serve.listening import new_event_loop
from tgi_asgi.settings import Settings


def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"native": new_event_loop}


@dataclass(frozen=True)
class ListeningAddress:
    """A listening address, with the certificates that a client needs to trust it."""

    settings: Settings
    tls: ssl.SSLContext | None = None
    authority: str = ""


@pytest.fixture(scope="session")
def tls(tmp_path_factory: pytest.TempPathFactory) -> ListeningAddress:
    """Return an address with TLS and a certificate for this machine."""
    folder = tmp_path_factory.mktemp("tls")
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1", "localhost")
    for number, blob in enumerate(issued.cert_chain_pems):
        blob.write_to_path(str(folder / "chain.pem"), append=number > 0)
    issued.private_key_pem.write_to_path(str(folder / "key.pem"))
    context = ssl.create_default_context()
    authority.configure_trust(context)
    authority.cert_pem.write_to_path(str(folder / "authority.pem"))
    paths = {"ssl_certfile": str(folder / "chain.pem"), "ssl_keyfile": str(folder / "key.pem")}
    settings = dataclasses.replace(LOCAL, **paths)  # type: ignore[arg-type]
    return ListeningAddress(settings, context, str(folder / "authority.pem"))


@pytest.fixture(params=["tcp", "tls", "unix"])
def address(request: pytest.FixtureRequest, tls: ListeningAddress, tmp_path: Path) -> ListeningAddress:
    """Return each address in turn."""
    if request.param == "tls":
        return tls
    return ListeningAddress(
        dataclasses.replace(LOCAL, uds=str(tmp_path / "s")) if request.param == "unix" else LOCAL
    )
