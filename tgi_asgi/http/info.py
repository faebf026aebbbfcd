"""What the server says of itself: `/info`, `/tokenizer_info` and `/metrics`."""

from __future__ import annotations

import os

import msgspec
from starlette.routing import Route

import tgi_asgi
from tgi_asgi.http.asgi import JSON
from tgi_asgi.http.exchange import Exchange
from tgi_asgi.http.openai_params import Limits
from tgi_asgi.http.routing import route
from tgi_asgi.http.tgi_schema import Info
from tgi_asgi.http.tgi_validation import NativeLimits
from tgi_asgi.observe.prometheus import CONTENT_TYPE
from tgi_asgi.settings import Settings
from tgi_asgi.types import ModelInfo


def routes() -> list[Route]:
    """Return the routes that describe the server."""
    return [
        route("/info", get=info),
        route("/tokenizer_info", get=tokenizer_info),
        route("/metrics", get=metrics, is_quiet=True),
    ]


async def info(exchange: Exchange) -> None:
    """Answer with the model and the limits."""
    served = exchange.context.ready()
    payload = describe(exchange.context.settings, served.info)
    await exchange.reply(200, msgspec.json.encode(payload), JSON)


async def tokenizer_info(exchange: Exchange) -> None:
    """Answer with the special tokens and the chat template, as lm-eval's remote tokenizer wants them."""
    served = exchange.context.ready()
    tokenizer, template = served.tokenizer, served.chat_template
    special = tokenizer.special_tokens
    await exchange.reply_json(
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": special.get("bos_token"),
            "eos_token": special.get("eos_token"),
            "pad_token": special.get("pad_token"),
            "unk_token": special.get("unk_token"),
            "bos_token_id": tokenizer.bos_id,
            "eos_token_id": tokenizer.eos_id,
            "add_bos_token": tokenizer.adds_bos,
            "vocab_size": tokenizer.vocab_size,
            "model_max_length": served.info.max_total_tokens,
            "chat_template": template.source if template else None,
        }
    )


async def metrics(exchange: Exchange) -> None:
    """Answer with the metrics; while the model loads as well."""
    context = exchange.context
    stats = context.served.stats if context.served else None
    await exchange.reply(200, context.metrics.render(stats), CONTENT_TYPE)


def describe(settings: Settings, model: ModelInfo) -> Info:
    """Return `/info`'s payload."""
    limits = NativeLimits.of(settings, model)
    return Info(
        model_id=model.model_id,
        model_sha=model.revision,
        model_pipeline_tag="text-generation",
        model_dtype=model.dtype,
        model_device_type=model.device.partition(":")[0],
        max_concurrent_requests=settings.max_concurrent_requests,
        max_best_of=limits.max_best_of,
        max_stop_sequences=limits.max_stop_sequences,
        max_input_tokens=model.max_input_tokens,
        max_total_tokens=model.max_total_tokens,
        validation_workers=settings.validation_workers,
        max_client_batch_size=Limits.of(settings).prompts,
        max_batch_total_tokens=model.kv_tokens,
        max_batch_size=settings.max_batch_size,
        # Dashboards and clients ask for this name; `version` is ours.
        router="text-generation-router",
        version=tgi_asgi.__version__,
        sha=None,
        docker_label=os.environ.get("DOCKER_LABEL"),
    )
