"""Check what `/v1`'s endpoints have in common, and turn it into a `Job`'s parameters.

Pure functions over decoded requests; every refusal names the field and what is allowed.
"""

from __future__ import annotations

from typing import Any

from tgi_asgi.api.limits import MAX_IDS, Limits, Room, check_stops
from tgi_asgi.api.openai.constraints import constraint_of
from tgi_asgi.api.openai.schema import CommonRequest
from tgi_asgi.api.parse import check_ranges, refuse
from tgi_asgi.api.sampling import sampling
from tgi_asgi.settings import Settings
from tgi_asgi.types import ModelInfo

_UNSUPPORTED = (
    "prompt_logprobs", "allowed_token_ids", "bad_words", "logprob_token_ids", "use_beam_search",
)  # fmt: skip
_SAMPLING = (
    "temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "frequency_penalty",
    "presence_penalty", "logit_bias", "seed",
)  # fmt: skip


def check_common(request: CommonRequest, limits: Limits, info: ModelInfo, *, is_compat: bool) -> None:
    """Check ranges, combinations and features of the shared fields.

    Raises:
        InvalidRequest: `param` names the first field that is wrong.
    """
    check_ranges(request)
    if request.n is not None and request.n > limits.best_of:
        refuse("n", f"`n` must be at most {limits.best_of}, got {request.n}")
    if request.stream_options is not None and not request.stream and not is_compat:
        refuse("stream_options", "`stream_options` is only allowed with `stream: true`")
    stops = _stop_strings(request)
    check_stops(stops, limits.stops, "stop", is_list=not isinstance(request.stop, str))
    if len(request.stop_token_ids or ()) > MAX_IDS:
        refuse("stop_token_ids", f"`stop_token_ids` takes at most {MAX_IDS} ids")
    for i, token_id in enumerate(request.stop_token_ids or ()):
        if not 0 <= token_id < info.vocab_size:
            param = f"stop_token_ids[{i}]"
            refuse(param, f"`{param}` must be a token id in 0..{info.vocab_size - 1}, got {token_id}")
    if request.truncate_prompt_tokens == 0:
        refuse("truncate_prompt_tokens", "`truncate_prompt_tokens` must be -1 or at least 1, got 0")
    if request.cache_salt == "":
        refuse("cache_salt", "`cache_salt` must not be empty")
    for name in _UNSUPPORTED:
        if getattr(request, name) not in (None, False, []):
            refuse(name, f"`{name}` is not supported", "unsupported_parameter")


def job_of(
    request: CommonRequest, info: ModelInfo, settings: Settings, logprobs: int | None
) -> dict[str, Any]:
    """Return the parameters of a checked request that all its jobs share, by their names in `Job`.

    Raises:
        InvalidRequest: `logit_bias` names no token of the model, or a constraint is of the wrong shape.
    """
    given = {name: getattr(request, name) for name in _SAMPLING}
    return {
        "sampling": sampling(info, logprobs=logprobs, **given),
        "room": room_of(settings),
        "keep_tokens": request.truncate_prompt_tokens,
        "min_tokens": request.min_tokens or 0,
        "ignore_eos": bool(request.ignore_eos),
        "stop_token_ids": frozenset(request.stop_token_ids or ()),
        "stop": _stop_strings(request),
        "include_stop": bool(request.include_stop_str_in_output or request.no_stop_trim),
        "skip_special_tokens": request.skip_special_tokens is not False,
        "constraint": constraint_of(request),
        "priority": request.priority or 0,
        "cache_salt": request.cache_salt,
    }


def room_of(settings: Settings) -> Room:
    """Return what happens on `/v1` to an answer that is too long for the context."""
    if settings.tgi_compat:
        return Room.TGI
    return Room.CLIPPED if settings.clip_max_tokens else Room.REFUSED


def _stop_strings(request: CommonRequest) -> tuple[str, ...]:
    return (request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ())
