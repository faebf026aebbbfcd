"""`tgi_asgi.app:app` with the fake server's loader, for tests under other servers' commands."""

from __future__ import annotations

from tests.server.fake_server import load
from tgi_asgi import assembly
from tgi_asgi.app import app as app

assembly.load_model = load
