"""Clients' sampling fields as engine parameters: defaults filled in, extremes brought into range."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import TypeVar

from tgi_asgi.api.limits import MAX_IDS
from tgi_asgi.api.parse import refuse, refuse_field
from tgi_asgi.model_info import ModelInfo
from tgi_asgi.settings.sampling import NO_DEFAULTS, SamplingDefaults
from tgi_asgi.types import LogprobsMode, SamplingParams

T = TypeVar("T")

ENGINE_SEEDS = 2**63
GREEDY_BELOW = 1e-5  # lower temperatures count as 0, because dividing logits by them would overflow
_RANDOM_SEEDS = 2**53  # such a seed is exact as a JavaScript number
# Factors that scale float32 logits without making them infinite or zero.
_SMALLEST_FACTOR, _LARGEST_FACTOR = 1e-6, 1e6
_BAN = -100.0  # the bias that OpenAI defines as a ban


def sampling(
    info: ModelInfo,
    defaults: SamplingDefaults = NO_DEFAULTS,
    *,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    typical_p: float | None = None,
    repetition_penalty: float | None = None,
    frequency_penalty: float | None = None,
    presence_penalty: float | None = None,
    logit_bias: Mapping[str, float] | None = None,
    seed: int | None = None,
    logprobs: int | None = None,
    mode: LogprobsMode = LogprobsMode.RAW,
) -> SamplingParams:
    """Return engine parameters for values that are in range.

    None selects the value of `defaults`, and if that has none, temperature 1, no filter and no penalty. A
    `top_p` of 0 keeps only the likeliest token.

    Raises:
        InvalidRequest: if `logit_bias` contains something other than a token id of the model.
    """
    temperature = _first(temperature, defaults.temperature, 1.0)
    top_k = _first(top_k, defaults.top_k, 0)
    top_p = _first(top_p, defaults.top_p, 1.0)
    return SamplingParams(
        temperature=0.0 if temperature < GREEDY_BELOW else min(temperature, _LARGEST_FACTOR),
        top_k=1 if top_p == 0 else min(max(top_k, 0), info.vocab_size),
        top_p=top_p or 1.0,
        min_p=_first(min_p, defaults.min_p, 0.0),
        typical_p=_first(typical_p, defaults.typical_p, 1.0),
        repetition_penalty=factor(_first(repetition_penalty, defaults.repetition_penalty, 1.0)),
        frequency_penalty=frequency_penalty or 0.0,
        presence_penalty=presence_penalty or 0.0,
        logit_bias=_logit_bias(logit_bias or {}, info),
        seed=random_seed() if seed is None else seed % ENGINE_SEEDS,
        logprobs=logprobs,
        logprobs_mode=mode,
    )


def random_seed() -> int:
    """Return a random seed for a request without one."""
    return random.randrange(_RANDOM_SEEDS)


def factor(value: float | None) -> float:
    """Return a factor clamped so that float32 logits stay finite and non-zero; None is 1."""
    return 1.0 if value is None else min(max(value, _SMALLEST_FACTOR), _LARGEST_FACTOR)


def _first(*values: T | None) -> T:
    """Return the first value that is not None; the last one never is."""
    return next(value for value in values if value is not None)


def _logit_bias(given: Mapping[str, float], info: ModelInfo) -> tuple[tuple[int, float], ...]:
    """Return the bias of each token, including the ban of those that the model must never sample."""
    if len(given) > MAX_IDS:
        refuse_field("logit_bias", f"takes at most {MAX_IDS} tokens, got {len(given)}")
    vocab_size = info.vocab_size
    bias: dict[int, float] = {}
    for key, value in given.items():
        param = f"logit_bias.{key}"
        if not (key.isascii() and key.isdigit() and len(key) < 20 and int(key) < vocab_size):
            refuse(param[:60], f"`logit_bias` takes token ids in 0..{vocab_size - 1}, got {key[:40]!r}")
        if not -100 <= value <= 100:
            refuse_field(param, f"must be in [-100, 100], got {value}")
        bias[int(key)] = value
    return tuple((bias | dict.fromkeys(info.suppressed_ids, _BAN)).items())
