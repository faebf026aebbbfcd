"""TGI's response headers: how large a request was and where its time went.

Sync answers carry all of them, streams only those known before the first token.
"""

from __future__ import annotations

from tgi_asgi.http.asgi import Header
from tgi_asgi.http.metrics import RequestTimes
from tgi_asgi.settings import Settings
from tgi_asgi.types import ModelInfo


def compute_type(settings: Settings, info: ModelInfo) -> str:
    """Return the operator's COMPUTE_TYPE, else TGI's `{shards}-{device}`."""
    return settings.compute_type or f"1-{info.device.partition(':')[0]}"


def stream_headers(kind: str, characters: int) -> list[Header]:
    """Return what a stream's headers say; `characters` are those of the prompt's text."""
    return [
        (b"x-compute-type", kind.encode("latin-1", "replace")),
        (b"x-compute-characters", b"%d" % characters),
        (b"x-accel-buffering", b"no"),
    ]


def sync_headers(
    kind: str, characters: int, times: RequestTimes, *, prompt_tokens: int, generated_tokens: int
) -> list[Header]:
    """Return what a whole answer's headers say; times are whole milliseconds, rounded down."""
    milliseconds = (
        (b"x-total-time", times.total_s),
        (b"x-validation-time", times.validation_s),
        (b"x-queue-time", times.queue_s),
        (b"x-inference-time", times.inference_s),
        (b"x-time-per-token", times.inference_s / max(generated_tokens, 1)),
    )
    return [
        (b"x-compute-type", kind.encode("latin-1", "replace")),
        (b"x-compute-time", b"%.9f" % times.total_s),
        (b"x-compute-characters", b"%d" % characters),
        *((name, b"%d" % int(seconds * 1000)) for name, seconds in milliseconds),
        (b"x-prompt-tokens", b"%d" % prompt_tokens),
        (b"x-generated-tokens", b"%d" % generated_tokens),
    ]
