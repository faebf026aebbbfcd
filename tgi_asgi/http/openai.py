"""OpenAI's routes under `/v1`, and those of them that need no engine: models."""

from __future__ import annotations

from typing import Any

from starlette.routing import Route

from tgi_asgi.http.exchange import Exchange
from tgi_asgi.http.messages import count_tokens, messages
from tgi_asgi.http.openai_answer import model_not_found
from tgi_asgi.http.openai_chat import chat_completions
from tgi_asgi.http.openai_completions import completions
from tgi_asgi.http.responses import responses
from tgi_asgi.http.routing import route
from tgi_asgi.types import ModelInfo


def routes() -> list[Route]:
    """Return the routes under `/v1`."""
    return [
        route("/v1/chat/completions", post=chat_completions, generates=True),
        route("/v1/completions", post=completions, generates=True),
        route("/v1/responses", post=responses, generates=True),
        route("/v1/messages", post=messages, generates=True),
        route("/v1/messages/count_tokens", post=count_tokens),
        route("/v1/models", get=list_models),
        route("/v1/models/{model:path}", get=retrieve_model),
    ]


async def list_models(exchange: Exchange) -> None:
    """Answer with the served model and its aliases, the primary name first."""
    info = exchange.context.ready().info
    names = (info.model_id, *info.aliases)
    await exchange.reply_json({"object": "list", "data": [_model_object(name, info) for name in names]})


async def retrieve_model(exchange: Exchange) -> None:
    """Answer with one model by its name, which may hold slashes."""
    info = exchange.context.ready().info
    name = exchange.scope["path_params"]["model"]
    if name not in (info.model_id, *info.aliases):
        raise model_not_found(name)
    await exchange.reply_json(_model_object(name, info))


def _model_object(name: str, info: ModelInfo) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": info.created,
        "owned_by": "tgi-asgi",
        "root": info.model_id,
        "parent": None,
        "max_model_len": info.max_total_tokens,
    }
