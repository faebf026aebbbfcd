"""The routes by which machines ask whether the server is well."""

from __future__ import annotations

from starlette.routing import Route

from tgi_asgi.http.exchange import Exchange
from tgi_asgi.http.routing import route
from tgi_asgi.types import EngineState


def routes() -> list[Route]:
    """Return `/health` and `/ping`; `GET /` is the same handler, beside the native `POST /`."""
    return [route(path, get=health, is_quiet=True) for path in ("/health", "/ping")]


async def health(exchange: Exchange) -> None:
    """Answer 200 with an empty body while requests can be served, else 503 with the reason in JSON."""
    context = exchange.context
    state = context.state
    if state is EngineState.READY:
        await exchange.reply(200, b"", b"text/plain; charset=utf-8")
        return
    progress = context.progress
    payload = {
        "error": "unhealthy",
        "error_type": "healthcheck",
        "state": state.value,
        "progress": {"stage": progress.stage, "done": progress.done, "total": progress.total}
        if state is EngineState.LOADING
        else None,
    }
    await exchange.reply_json(payload, 503, [(b"retry-after", b"2")])
