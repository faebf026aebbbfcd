"""A server's information about itself: health, model, limits, metrics."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import msgspec

import tgi_asgi
from tgi_asgi.api.exchange import Exchange
from tgi_asgi.api.limits import Limits
from tgi_asgi.api.pool_call import max_inputs
from tgi_asgi.api.served import Served
from tgi_asgi.errors import UnknownModel
from tgi_asgi.model_info import ModelInfo
from tgi_asgi.observe.prometheus import CONTENT_TYPE
from tgi_asgi.types import EngineState

_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")
# The last release of TGI. LlamaIndex takes a server below 2.0.1 for one without tools.
_TGI_VERSION = "3.3.7"
_TEXT = b"text/plain; charset=utf-8"


async def health(exchange: Exchange) -> None:
    """Answer 200 with an empty body while requests can be served, else 503 with the reason in JSON."""
    await _report(exchange, exchange.context.state is EngineState.READY)


async def live(exchange: Exchange) -> None:
    """Answer 200 unless only a restart would help; loading and draining need no restart."""
    await _report(exchange, exchange.context.state is not EngineState.DEAD)


async def ready(exchange: Exchange) -> None:
    """Answer as `/health`, but 503 from SIGTERM on, while requests are still accepted."""
    context = exchange.context
    await _report(exchange, context.state is EngineState.READY and not context.is_terminating)


async def _report(exchange: Exchange, is_well: bool) -> None:
    if is_well:
        await exchange.respond(200, b"", _TEXT)
        return
    context = exchange.context
    progress = msgspec.to_builtins(context.progress) if context.state is EngineState.LOADING else None
    state = EngineState.DRAINING if context.is_terminating else context.state
    body = {"error": "unhealthy", "error_type": "healthcheck", "state": state.value, "progress": progress}
    await exchange.respond_json(body, 503, [(b"retry-after", b"2")])


async def info(exchange: Exchange) -> None:
    """Answer with the model and the limits."""
    served, settings = exchange.context.ready(), exchange.context.settings
    model = served.info
    limits = Limits.of(settings, is_tgi=True)
    payload = {
        "model_id": model.model_id,
        "model_sha": model.revision,
        "model_pipeline_tag": _task(served),
        "model_dtype": model.dtype,
        "model_device_type": model.device,
        "model_impl": model.implementation,
        "batch_invariant": model.is_batch_invariant,
        "kernel_set": model.kernel_set,
        "prompt_precision": model.prompt_precision,
        "max_concurrent_requests": settings.max_concurrent_requests,
        "max_best_of": limits.best_of,
        "max_stop_sequences": limits.stops,
        "max_input_tokens": model.max_input_tokens,
        "max_total_tokens": model.max_total_tokens,
        "validation_workers": settings.validation_workers,
        "max_client_batch_size": (
            Limits.of(settings, is_tgi=settings.tgi_compat).prompts
            if model.generates
            else max_inputs(settings)
        ),
        "max_batch_total_tokens": model.kv_tokens,
        "max_batch_size": model.max_batch_size or settings.max_batch_size,
        "max_kept_states": model.num_kept_states,
        # Dashboards and clients expect this name, and versions of TGI.
        "router": "text-generation-router",
        "version": _TGI_VERSION,
        "tgi_asgi_version": tgi_asgi.__version__,
        "sha": None,
        "docker_label": os.environ.get("DOCKER_LABEL"),
    }
    await exchange.respond_json(payload)


def _task(served: Served) -> str:
    """Return the model's task, as the Hub names it."""
    if served.info.encoder_decoder is not None:
        return "text2text-generation"
    if served.info.generates:
        return "image-text-to-text" if served.accepts_images else "text-generation"
    if served.info.classification is not None and len(served.info.classification.labels) > 1:
        return "text-classification"
    return "text-ranking" if served.info.scoring is not None else "feature-extraction"


async def tokenizer_info(exchange: Exchange) -> None:
    """Answer with the special tokens and the chat template, in the form of lm-eval's remote tokenizer."""
    served = exchange.context.ready()
    tokenizer, template = served.tokenizer, served.chat_template
    payload = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{name: tokenizer.special_tokens.get(name) for name in _SPECIAL},
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "add_bos_token": tokenizer.adds_bos,
        "vocab_size": tokenizer.vocab_size,
        "model_max_length": served.info.max_total_tokens,
        "chat_template": template.source if template else None,
    }
    await exchange.respond_json(payload)


async def metrics(exchange: Exchange) -> None:
    """Answer with the metrics, also while the model loads."""
    context = exchange.context
    stats = context.served.stats if context.served else None
    await exchange.respond(200, context.metrics.render(stats), CONTENT_TYPE)


async def engine(exchange: Exchange) -> None:
    """Answer with permits, blocks and sequences, but no texts; also while the engine drains or is dead."""
    context = exchange.context
    served = context.served or context.ready()
    payload = served.engine.describe() | {"state": context.state.value, "tasks": len(asyncio.all_tasks())}
    await exchange.respond_json(payload)


async def list_models(exchange: Exchange) -> None:
    """Answer with the served model and its adapters, as OpenAI lists models."""
    await exchange.respond_json({"object": "list", "data": models_of(exchange)})


async def retrieve_model(exchange: Exchange) -> None:
    """Answer with one model by its name, which may contain slashes."""
    await exchange.respond_json(models_of(exchange)[0])


def models_of(exchange: Exchange) -> list[dict[str, Any]]:
    """Return the served model and its adapters, or the one that the path names, as OpenAI describes models.

    Raises:
        UnknownModel: if the path names none of them.
    """
    served = exchange.context.ready()
    base = _model_object(served.info)
    adapters = [] if served.adapters is None else served.adapters.names
    models = [base, *(base | {"id": name, "root": name, "parent": base["id"]} for name in adapters)]
    name = exchange.scope.get("path_params", {}).get("model")
    if name is None:
        return models
    named = [model for model in models if model["id"] == name]
    if not named:
        raise UnknownModel(name)
    return named[-1:]


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
