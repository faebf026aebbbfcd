"""A server in this process with a tiny embedder or reranker."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.support.serving import serving
from tgi_asgi.app import App, create_app
from tgi_asgi.settings import Settings


@dataclass(slots=True)
class PooledServer:
    """A running server."""

    url: str
    app: App
    http: httpx.AsyncClient

    async def post(self, path: str, **body: Any) -> httpx.Response:
        return await self.http.post(path, json=body)


@asynccontextmanager
async def pooled_server(directory: Path, **settings: Any) -> AsyncIterator[PooledServer]:
    """Load the model of a directory in float32 and serve it."""
    values = {
        "model_id": str(directory),
        "served_model_name": "tiny",
        "dtype": "float32",
        "num_threads": 2,
        "thread_nice": 0,
        "max_batch_total_tokens": 4096,
        "max_batch_prefill_tokens": 64,
    }
    app = create_app(Settings(**{**values, **settings}))
    loading: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    app.on_ready = lambda served: loading.set_result(None)
    app.on_fatal = loading.set_exception
    app.start()
    await asyncio.wait_for(loading, 60)
    app.on_fatal = None
    try:
        async with serving(app) as url, httpx.AsyncClient(base_url=url, timeout=60, verify=False) as http:
            yield PooledServer(url, app, http)
    finally:
        await app.stop()
