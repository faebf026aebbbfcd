"""An HTTP client for an app in this process: no socket, no server."""

from __future__ import annotations

from typing import Any, cast

import httpx

from tgi_asgi.app import App


def client_of(app: App) -> httpx.AsyncClient:
    """Return a client whose requests go straight to the app; streams arrive whole."""
    return httpx.AsyncClient(transport=httpx.ASGITransport(cast(Any, app)), base_url="http://tgi")
