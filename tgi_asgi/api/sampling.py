"""Clients' sampling fields as engine parameters: defaults filled in, extremes brought into range."""

from __future__ import annotations

import random
from collections.abc import Mapping

from tgi_asgi.api.limits import MAX_IDS
from tgi_asgi.api.parse import refuse
from tgi_asgi.types import LogprobsMode, ModelInfo, SamplingParams

ENGINE_SEEDS = 2**63
GREEDY_BELOW = 1e-5  # lower temperatures count as 0, because dividing logits by them would overflow
_RANDOM_SEEDS = 2**53  # such a seed is exact as a JavaScript number
# Factors that scale float32 logits without making them infinite or zero.
_SMALLEST_FACTOR, _LARGEST_FACTOR = 1e-6, 1e6


def sampling(
    info: ModelInfo,
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
    """Return engine parameters for values that are in range; None selects each one's default.

    A `top_p` of 0 keeps only the likeliest token.

    Raises:
        InvalidRequest: if `logit_bias` contains something other than a token id of the model.
    """
    temperature = 1.0 if temperature is None else temperature
    return SamplingParams(
        temperature=0.0 if temperature < GREEDY_BELOW else temperature,
        top_k=1 if top_p == 0 else min(max(top_k or 0, 0), info.vocab_size),
        top_p=top_p or 1.0,
        min_p=min_p or 0.0,
        typical_p=1.0 if typical_p is None else typical_p,
        repetition_penalty=factor(repetition_penalty),
        frequency_penalty=frequency_penalty or 0.0,
        presence_penalty=presence_penalty or 0.0,
        logit_bias=_logit_bias(logit_bias or {}, info.vocab_size),
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


def _logit_bias(given: Mapping[str, float], vocab_size: int) -> tuple[tuple[int, float], ...]:
    if len(given) > MAX_IDS:
        refuse("logit_bias", f"`logit_bias` takes at most {MAX_IDS} tokens, got {len(given)}")
    bias: dict[int, float] = {}
    for key, value in given.items():
        param = f"logit_bias.{key}"
        if not (key.isascii() and key.isdigit() and len(key) < 20 and int(key) < vocab_size):
            refuse(param[:60], f"`logit_bias` takes token ids in 0..{vocab_size - 1}, got {key[:40]!r}")
        if not -100 <= value <= 100:
            refuse(param, f"`{param}` must be in [-100, 100], got {value}")
        bias[int(key)] = value
    return tuple(bias.items())
