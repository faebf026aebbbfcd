"""The served models as Anthropic lists them, for clients that send `anthropic-version`."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from tgi_asgi.api.anthropic.render import ANTHROPIC
from tgi_asgi.api.exchange import Exchange, Handler

Models = list[dict[str, Any]]  # each as `GET /v1/models` describes it


def in_own_form(other: Handler, list_models: Callable[[Exchange], Models]) -> Handler:
    """Return a handler of `GET /v1/models` and `GET /v1/models/{model}`, which both APIs have.

    Args:
        other: Handler for other clients.
        list_models: Returns the models of the request: all of them, or the one that the path names.
    """

    async def handle(exchange: Exchange) -> None:
        exchange.response_headers.append((b"vary", b"anthropic-version"))
        if exchange.dialect is not ANTHROPIC:
            await other(exchange)
            return
        models = [_model(model) for model in list_models(exchange)]
        if "model" in exchange.scope.get("path_params", ()):
            await exchange.respond_json(models[0])
            return
        ends = {"first_id": models[0]["id"], "last_id": models[-1]["id"]}
        await exchange.respond_json({"data": models, "has_more": False, **ends})

    return handle


def _model(model: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "model",
        "id": model["id"],
        "display_name": model["id"],
        "created_at": datetime.fromtimestamp(model["created"], UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "lifecycle": "active",
        "max_input_tokens": model["max_model_len"],
        "max_tokens": model["max_model_len"],
    }
