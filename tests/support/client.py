"""An HTTP client for an app in this process, without a socket or a server."""

from __future__ import annotations

from typing import Any, cast

import httpx

from tgi_asgi.app import App


def client_of(app: App) -> httpx.AsyncClient:
    """Return a client that calls the app directly; a streamed response arrives all at once."""
    return httpx.AsyncClient(transport=httpx.ASGITransport(cast(Any, app)), base_url="http://tgi")


async def post(app: App, path: str, body: object, headers: dict[str, str] | None = None) -> httpx.Response:
    """Send one JSON body to the app."""
    async with client_of(app) as client:
        return await client.post(path, json=body, headers=headers)
