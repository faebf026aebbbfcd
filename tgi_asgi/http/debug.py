"""`/debug/engine`: what the engine holds at this moment, for whoever looks into a server that misbehaves.

Off unless `--debug-endpoints` is given: it names every request. Texts and tokens are not in it.
"""

from __future__ import annotations

import asyncio

from starlette.routing import Route

from tgi_asgi.http.exchange import Exchange
from tgi_asgi.http.routing import route
from tgi_asgi.settings import Settings


def routes(settings: Settings) -> list[Route]:
    """Return the debugging routes, if the operator wants them."""
    return [route("/debug/engine", get=engine)] if settings.debug_endpoints else []


async def engine(exchange: Exchange) -> None:
    """Answer with permits, blocks and sequences, also while the engine drains or is dead."""
    context = exchange.context
    served = context.served or context.ready()
    payload = served.engine.describe() | {"state": context.state.value, "tasks": len(asyncio.all_tasks())}
    await exchange.reply_json(payload)
