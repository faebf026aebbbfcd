"""`GET /v1/models`: what is served."""

from __future__ import annotations

from typing import Any

from tgi_asgi.api.exchange import Exchange
from tgi_asgi.errors import UnknownModel
from tgi_asgi.types import ModelInfo


async def list_models(exchange: Exchange) -> None:
    """Answer with the served model."""
    info = exchange.context.ready().info
    await exchange.respond_json({"object": "list", "data": [_model_object(info)]})


async def retrieve_model(exchange: Exchange) -> None:
    """Answer with one model by its name, which may hold slashes."""
    info = exchange.context.ready().info
    name = exchange.scope["path_params"]["model"]
    if name != info.model_id:
        raise UnknownModel(name)
    await exchange.respond_json(_model_object(info))


def _model_object(info: ModelInfo) -> dict[str, Any]:
    return {
        "id": info.model_id,
        "object": "model",
        "created": info.created,
        "owned_by": "tgi-asgi",
        "root": info.model_id,
        "parent": None,
        "max_model_len": info.max_total_tokens,
    }
