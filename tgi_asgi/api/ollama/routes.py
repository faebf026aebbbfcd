"""Ollama's routes: generation, and information about its models."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from functools import partial
from typing import Any

import msgspec
from msgspec import Struct

from tgi_asgi.api.exchange import Exchange
from tgi_asgi.api.life import generating, served_name
from tgi_asgi.api.ollama.embed import OllamaEmbed, OllamaEmbeddings, parse_embed, parse_embeddings
from tgi_asgi.api.ollama.render import CHAT, GENERATE, NDJSON
from tgi_asgi.api.ollama.request import OllamaChat, OllamaGenerate, model_of, parse_chat, parse_generate
from tgi_asgi.api.parse import check_ranges, refuse_field
from tgi_asgi.api.pooled import pooling
from tgi_asgi.api.routes import Route
from tgi_asgi.api.served import Served
from tgi_asgi.text.tools.reasoning import style_of


class OllamaShow(Struct):
    """The body of `POST /api/show`."""

    model: str | None = None
    name: str | None = None  # older name of `model`

    def __post_init__(self) -> None:
        self.model = self.model or self.name


_NEVER = "2318-01-01T00:00:00Z"  # about what Ollama reports for a model that stays loaded
_SHOW = msgspec.json.Decoder(OllamaShow)
_OLLAMA_VERSION = "0.14.2"  # the highest that a client for agents was seen to ask for; VS Code asks for 0.6.4


def rows() -> list[Route]:
    """Return the routes."""
    row = partial(Route, tag="Ollama", dialect=GENERATE)
    stream = partial(row, "POST", generates=True, event=str, stream_type=NDJSON.decode())
    pooled = partial(row, "POST", generates=True)
    return [
        stream("/api/chat", generating(parse_chat), "Chat", dialect=CHAT, requests=(OllamaChat,)),
        stream("/api/generate", generating(parse_generate), "Generate", requests=(OllamaGenerate,)),
        pooled(
            "/api/embed", pooling(parse_embed), "Embed texts", requests=(OllamaEmbed,),
        ),
        pooled(
            "/api/embeddings", pooling(parse_embeddings), "Embed a text: the older form",
            requests=(OllamaEmbeddings,),
        ),
        row("POST", "/api/show", show, "Describe the served model", requests=(OllamaShow,)),
        row("GET", "/api/tags", list_models, "List the served model and its adapters"),
        row("GET", "/api/ps", list_loaded, "List the loaded model, which is the served one"),
        row("GET", "/api/version", version, "The version of Ollama whose API this is"),
    ]  # fmt: skip


async def list_models(exchange: Exchange) -> None:
    """Answer with the served model, and the adapters that requests may name instead."""
    served = exchange.context.ready()
    keys = {} if served.adapters is None else served.adapters.keys
    base = _listed(served)
    details = {**base["details"], "parent_model": served.info.model_id}
    adapters = [
        {**base, "name": name, "model": name, "digest": _digest(key), "details": details}
        for name, key in keys.items()
    ]
    await exchange.respond_json({"models": [base, *adapters]})


async def list_loaded(exchange: Exchange) -> None:
    """Answer with the served model, which stays loaded."""
    entry = _listed(exchange.context.ready())
    await exchange.respond_json({"models": [{**entry, "expires_at": _NEVER, "size_vram": 0}]})


def _listed(served: Served) -> dict[str, Any]:
    info = served.info
    return {
        "name": info.model_id,
        "model": info.model_id,
        "size": 0,  # clients require a number; Ollama also uses 0 for unknown
        "digest": _digest(info.fingerprint),
        "context_length": info.max_total_tokens,
        **_known(served),
    }


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


async def version(exchange: Exchange) -> None:
    """Answer with the version of Ollama whose API this is: clients refuse to work with an older one."""
    await exchange.respond_json({"version": _OLLAMA_VERSION})


async def show(exchange: Exchange) -> None:
    """Answer with a description of the served model."""
    served = exchange.context.ready()
    request = await exchange.read_json(_SHOW)
    check_ranges(request)
    if not request.model:
        refuse_field("model", "is required")
    served_name(exchange, model_of(request.model, exchange))  # as for a chat
    info, template = served.info, served.chat_template
    architecture = info.architecture
    described = {
        "template": template.source if template is not None else "",
        "model_info": {
            "general.architecture": architecture,
            f"{architecture}.context_length": info.max_total_tokens,
            f"{architecture}.vocab_size": info.vocab_size,
        },
    }
    await exchange.respond_json({**described, **_known(served)})


def _known(served: Served) -> dict[str, Any]:
    """Return the fields shared by `/api/tags` and `/api/show`; "" means unknown."""
    info, template = served.info, served.chat_template
    can = {
        "completion": served.info.generates,
        "embedding": served.info.embedding is not None,
        "tools": template is not None and template.mentions("tools"),
        "thinking": template is not None and style_of(template.source) is not None,
        "vision": served.accepts_images,
        "insert": served.fill is not None,
    }
    unknown = dict.fromkeys(("parent_model", "format", "parameter_size", "quantization_level"), "")
    return {
        "modified_at": datetime.fromtimestamp(info.created, UTC),
        "details": {**unknown, "family": info.architecture, "families": [info.architecture]},
        "capabilities": [name for name, is_there in can.items() if is_there],
    }
