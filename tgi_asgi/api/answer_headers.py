"""TGI's headers of answers. Complete ones have all of them; streams those known before the first token."""

from __future__ import annotations

from tgi_asgi.api.asgi import Header
from tgi_asgi.api.exchange import Exchange
from tgi_asgi.model_info import ModelInfo
from tgi_asgi.observe.summary import RequestSummary


def stream_headers(exchange: Exchange, info: ModelInfo, *, characters: int) -> list[Header]:
    """Return the TGI headers of a stream; `characters` is the length of the prompt's text."""
    # The administrator's COMPUTE_TYPE, otherwise TGI's `{shards}-{device}`.
    compute_type = exchange.context.settings.compute_type or f"{info.num_shards}-{info.device}"
    return [
        (b"x-compute-type", compute_type.encode("latin-1", "replace")),
        (b"x-compute-characters", b"%d" % characters),
    ]


def sync_headers(
    exchange: Exchange,
    info: ModelInfo,
    *,
    characters: int,
    num_tokens: int | None = None,
    is_sum: bool = False,
) -> list[Header]:
    """Return the TGI headers of a complete answer; times are whole milliseconds, rounded down.

    Args:
        characters: Length of the prompt's text.
        num_tokens: Number of generated tokens; by default those of all the request's choices.
        is_sum: Whether the answer covers several prompts; TGI then omits `x-compute-time`.
    """
    summary = RequestSummary.of(exchange)
    num_tokens = summary.generated_tokens if num_tokens is None else num_tokens
    milliseconds = (
        (b"x-total-time", summary.total_s),
        (b"x-validation-time", summary.validation_s),
        (b"x-queue-time", summary.queue_s),
        (b"x-inference-time", summary.inference_s),
        (b"x-time-per-token", summary.inference_s / max(num_tokens, 1)),
    )
    return [
        *stream_headers(exchange, info, characters=characters),
        *(() if is_sum else ((b"x-compute-time", b"%.9f" % summary.total_s),)),
        *((name, b"%d" % int(seconds * 1000)) for name, seconds in milliseconds),
        (b"x-prompt-tokens", b"%d" % summary.prompt_tokens),
        (b"x-generated-tokens", b"%d" % num_tokens),
    ]
