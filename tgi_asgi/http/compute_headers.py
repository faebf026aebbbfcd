"""TGI's response headers: how large a request was and where its time went.

Sync answers carry all of them, streams only those known before the first token.
"""

from __future__ import annotations

from tgi_asgi.http.asgi import Header
from tgi_asgi.observe.course import Course
from tgi_asgi.http.exchange import Exchange
from tgi_asgi.settings import Settings
from tgi_asgi.types import ModelInfo


def compute_type(settings: Settings, info: ModelInfo) -> str:
    """Return the operator's COMPUTE_TYPE, else TGI's `{shards}-{device}`."""
    return settings.compute_type or f"1-{info.device.partition(':')[0]}"


def stream_headers(exchange: Exchange, info: ModelInfo, *, characters: int) -> list[Header]:
    """Return what a stream's headers say; `characters` are those of the prompt's text."""
    return [
        (b"x-compute-type", compute_type(exchange.context.settings, info).encode("latin-1", "replace")),
        (b"x-compute-characters", b"%d" % characters),
    ]


def sync_headers(
    exchange: Exchange,
    info: ModelInfo,
    *,
    characters: int,
    generated_tokens: int | None = None,
    is_sum: bool = False,
) -> list[Header]:
    """Return what a whole answer's headers say; times are whole milliseconds, rounded down.

    Args:
        characters: of the prompt's text.
        generated_tokens: by default those of all the request's choices.
        is_sum: over several prompts; TGI has no `x-compute-time` then.
    """
    course = Course.of(exchange)
    tokens = course.generated_tokens if generated_tokens is None else generated_tokens
    milliseconds = (
        (b"x-total-time", course.total_s),
        (b"x-validation-time", course.validation_s),
        (b"x-queue-time", course.queue_s),
        (b"x-inference-time", course.inference_s),
        (b"x-time-per-token", course.inference_s / max(tokens, 1)),
    )
    return [
        *stream_headers(exchange, info, characters=characters),
        *(() if is_sum else ((b"x-compute-time", b"%.9f" % course.total_s),)),
        *((name, b"%d" % int(seconds * 1000)) for name, seconds in milliseconds),
        (b"x-prompt-tokens", b"%d" % course.prompt_tokens),
        (b"x-generated-tokens", b"%d" % tokens),
    ]
