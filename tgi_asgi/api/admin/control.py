"""Operations on a running server, with `--admin-api-key`."""

from __future__ import annotations

from typing import Literal

import msgspec
from msgspec import Struct

from tgi_asgi.api.exchange import Exchange
from tgi_asgi.api.parse import refuse_field
from tgi_asgi.errors import NotFound
from tgi_asgi.observe import logs


class AbortRequest(Struct):
    """Body of `/abort_request`; SGLang calls the id `rid`."""

    request_id: str | None = None
    rid: str | None = None


class LogLevel(Struct):
    """Body of `/log_level`."""

    level: Literal["debug", "info", "warn", "error"]


_ABORT = msgspec.json.Decoder(AbortRequest)
_LEVEL = msgspec.json.Decoder(LogLevel)


async def abort_request(exchange: Exchange) -> None:
    """End the requests with an id; their clients get an error."""
    body = await exchange.read_json(_ABORT)
    request_id = body.request_id or body.rid
    if not request_id:
        refuse_field("request_id", "is required")
    num_aborted = exchange.context.ready().engine.abort(request_id)
    if not num_aborted:
        raise NotFound("No request of that id is running or waiting", param="request_id")
    await exchange.respond_json({"aborted": num_aborted})


async def reset_prefix_cache(exchange: Exchange) -> None:
    """Drop all cached prompts."""
    num_blocks = exchange.context.ready().engine.reset_prefix_cache()
    await exchange.respond_json({"blocks": num_blocks})


async def log_level(exchange: Exchange) -> None:
    """Change the log level."""
    body = await exchange.read_json(_LEVEL)
    logs.set_level(body.level)
    await exchange.respond_json({"level": body.level})
