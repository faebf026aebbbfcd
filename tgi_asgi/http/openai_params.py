"""Check what `/v1`'s two endpoints have in common, and turn it into the engine's parameters.

Pure functions over decoded requests; every refusal names the field and what is allowed.
"""

from __future__ import annotations

import random
import typing
from dataclasses import dataclass
from typing import Any, NoReturn

from msgspec import Meta

from tgi_asgi.errors import InvalidRequest
from tgi_asgi.http.openai_schema import (
    ChatRequest,
    CommonRequest,
    CompletionRequest,
)
from tgi_asgi.http.tgi_validation import MAX_STOP_CHARS
from tgi_asgi.settings import Settings
from tgi_asgi.types import ModelInfo, SamplingParams, StopConditions

_GREEDY_BELOW = 1e-5  # temperatures under this are 0: dividing logits by them would overflow
_DRAWN_SEEDS = 2**53  # a drawn seed survives JavaScript's numbers
_LARGEST_FACTOR = 1e6  # float32 logits survive a factor of this much, or of its inverse
MAX_IDS = 1024  # entries of logit_bias and of stop_token_ids: each costs time in every step
_UNSUPPORTED = (
    "prompt_logprobs", "allowed_token_ids", "bad_words", "logprob_token_ids", "use_beam_search",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Limits:
    """How much one request may ask for: as OpenAI, as TGI in its compatible mode, or as the operator says."""

    best_of: int
    stops: int
    top_logprobs: int
    prompts: int
    choices: int  # prompts times n
    is_compat: bool  # what TGI ignored is ignored

    @classmethod
    def of(cls, settings: Settings) -> Limits:
        best_of, stops, top_logprobs, prompts = (2, 4, 5, 4) if settings.tgi_compat else (128, 16, 20, 128)
        return cls(
            best_of=_or(settings.max_best_of, best_of),
            stops=_or(settings.max_stop_sequences, stops),
            top_logprobs=_or(settings.max_top_n_tokens, top_logprobs),
            prompts=_or(settings.max_client_batch_size, prompts),
            choices=min(128, settings.max_concurrent_requests),
            is_compat=settings.tgi_compat,
        )


def refuse(param: str, message: str, code: str | None = None) -> NoReturn:
    """Refuse the request for one field."""
    raise InvalidRequest(message, param=param, code=code)


def check_common(request: CommonRequest, limits: Limits, info: ModelInfo) -> None:
    """Check ranges, combinations and features of the shared fields.

    Raises:
        InvalidRequest: `param` names the first field that is wrong.
    """
    _check_ranges(request)
    if request.n is not None and request.n > limits.best_of:
        refuse("n", f"`n` must be at most {limits.best_of}, got {request.n}")
    if request.stream_options is not None and not request.stream and not limits.is_compat:
        refuse("stream_options", "`stream_options` is only allowed with `stream: true`")
    stops = stop_strings(request)
    if len(stops) > limits.stops:
        refuse("stop", f"`stop` takes at most {limits.stops} strings, got {len(stops)}")
    for i, stop in enumerate(stops):
        param = "stop" if isinstance(request.stop, str) else f"stop[{i}]"
        if not 1 <= len(stop) <= MAX_STOP_CHARS:
            refuse(param, f"`{param}` must have 1 to {MAX_STOP_CHARS} characters, got {len(stop)}")
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


def sampling_of(request: CommonRequest, info: ModelInfo, logprobs: int | None) -> SamplingParams:
    """Return the sampling parameters of a checked request.

    Raises:
        InvalidRequest: `logit_bias` names no token of the model.
    """
    temperature = _or(request.temperature, 1.0)
    top_p = _or(request.top_p, 1.0)
    top_k = max(_or(request.top_k, 0), 0)
    repetition_penalty = _or(request.repetition_penalty, 1.0)
    return SamplingParams(
        temperature=0.0 if temperature < _GREEDY_BELOW else temperature,
        top_k=min(top_k, info.vocab_size) if top_p > 0 else 1,
        top_p=top_p if top_p > 0 else 1.0,
        min_p=_or(request.min_p, 0.0),
        typical_p=_or(request.typical_p, 1.0),
        repetition_penalty=min(max(repetition_penalty, 1 / _LARGEST_FACTOR), _LARGEST_FACTOR),
        frequency_penalty=_or(request.frequency_penalty, 0.0),
        presence_penalty=_or(request.presence_penalty, 0.0),
        logit_bias=_logit_bias(request.logit_bias or {}, info.vocab_size),
        seed=drawn_seed() if request.seed is None else request.seed % 2**63,
        logprobs=logprobs,
    )


def stop_of(request: CommonRequest, max_tokens: int, *, shows_special: bool = False) -> StopConditions:
    """Return the stop conditions of a checked request, whose prompt leaves room for `max_tokens`.

    Raises:
        InvalidRequest: `min_tokens` exceeds `max_tokens`.
    """
    min_tokens = request.min_tokens or 0
    if min_tokens > max_tokens:
        refuse("min_tokens", f"`min_tokens` must be at most `max_tokens` ({max_tokens}), got {min_tokens}")
    return StopConditions(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        ignore_eos=bool(request.ignore_eos),
        stop_token_ids=frozenset(request.stop_token_ids or ()),
        stop=stop_strings(request),
        include_stop=includes_stop(request),
        skip_special_tokens=request.skip_special_tokens is not False and not shows_special,
    )


def stop_strings(request: CommonRequest) -> tuple[str, ...]:
    """Return the stop strings: one string counts as a list of one."""
    return (request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ())


def drawn_seed() -> int:
    """Return a seed for a request that gave none."""
    return random.randrange(_DRAWN_SEEDS)


def includes_stop(request: CommonRequest) -> bool:
    """Return whether the text keeps the stop string that ended it."""
    return bool(request.include_stop_str_in_output or request.no_stop_trim)


def _check_ranges(request: CommonRequest) -> None:
    for name, low, high, is_open in _RANGES[type(request)]:
        value = getattr(request, name)
        if value is None or (low < value <= high if is_open else low <= value <= high):
            continue
        if low == float("-inf") or high >= 2**63 - 1:
            rule = f"above {low:g}" if is_open else f"at least {low:g}"
            rule = f"at most {high:g}" if value > high else rule
        else:
            rule = f"in {'(' if is_open else '['}{low:g}, {high:g}]"
        refuse(name, f"`{name}` must be {rule}, got {value}")


def _ranges(kind: type[CommonRequest]) -> list[tuple[str, float, float, bool]]:
    """Return (field, least, greatest, least is excluded) as the struct's annotations have them."""
    found = []
    for name, hint in typing.get_type_hints(kind, include_extras=True).items():
        for part in (hint, *typing.get_args(hint)):
            for meta in getattr(part, "__metadata__", ()):
                keywords = meta.extra_json_schema if isinstance(meta, Meta) else None
                if not keywords or "anyOf" in keywords:
                    continue
                is_open = "exclusiveMinimum" in keywords
                low = keywords["exclusiveMinimum" if is_open else "minimum"]
                found.append((name, low, keywords.get("maximum", float("inf")), is_open))
    return found


_RANGES: dict[type[CommonRequest], list[tuple[str, float, float, bool]]] = {
    kind: _ranges(kind) for kind in (ChatRequest, CompletionRequest)
}


def _logit_bias(given: dict[str, float], vocab_size: int) -> tuple[tuple[int, float], ...]:
    if len(given) > MAX_IDS:
        refuse("logit_bias", f"`logit_bias` takes at most {MAX_IDS} tokens, got {len(given)}")
    bias: dict[int, float] = {}
    for key, value in given.items():
        param = f"logit_bias.{key}"
        if not (key.isascii() and key.isdigit() and len(key) < 20 and int(key) < vocab_size):
            refuse(param, f"`logit_bias` takes token ids in 0..{vocab_size - 1}, got {key[:40]!r}")
        if not -100 <= value <= 100:
            refuse(param, f"`{param}` must be in [-100, 100], got {value}")
        bias[int(key)] = value
    return tuple(bias.items())


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value
