"""`tgi_asgi.app:app` with the fake server's loader, for tests under other servers' commands."""

from __future__ import annotations

from tests.server.fake_server import load
from tgi_asgi import app as module

module.load_model = load
app = module.app
