"""TGI's rules for a generate request: its checks, in its order and words, and what they turn into.

`plan_request` checks what needs no permit, `check_parameters` what TGI checks once a permit is held,
`to_generation` what needs the prompt's tokens. Pure functions: `tgi.py` owns the permit and the threads.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn, TypeVar

from tgi_asgi.errors import InvalidRequest
from tgi_asgi.http.tgi_schema import (
    DEFAULT_MAX_BEST_OF,
    DEFAULT_MAX_STOP_SEQUENCES,
    DEFAULT_MAX_TOP_N_TOKENS,
    FREQUENCY_PENALTY_BOUND,
    MAX_SEED,
    CompatGenerateRequest,
    GenerateParameters,
    GenerateRequest,
)
from tgi_asgi.settings import Settings
from tgi_asgi.types import GenerationRequest, LogprobsMode, ModelInfo, SamplingParams, StopConditions

# TGI tests the room for at most this many new tokens, then generates what was asked for.
MAX_TESTED_NEW_TOKENS = 1024
MAX_STOP_CHARS = 1024  # of one stop sequence: matching holds that much text back at worst
# A drawn seed survives a JavaScript client's numbers.
DRAWN_SEEDS = 2**53
_ENGINE_SEED_MASK = 2**63 - 1
# Factors that float32 logits can be multiplied or divided by without becoming infinite or zero.
_SMALLEST_FACTOR, _LARGEST_FACTOR = 1e-6, 1e6

_ABSENT = GenerateParameters()


@dataclass(frozen=True, slots=True)
class NativeLimits:
    """The operator's and the model's bounds, with TGI's defaults filled in."""

    max_best_of: int
    max_stop_sequences: int
    max_top_n_tokens: int
    max_input_tokens: int
    max_total_tokens: int
    vocab_size: int
    enable_prefill_logprobs: bool
    disable_grammar_support: bool

    @classmethod
    def of(cls, settings: Settings, info: ModelInfo) -> NativeLimits:
        return cls(
            max_best_of=_or(settings.max_best_of, DEFAULT_MAX_BEST_OF),
            max_stop_sequences=_or(settings.max_stop_sequences, DEFAULT_MAX_STOP_SEQUENCES),
            max_top_n_tokens=_or(settings.max_top_n_tokens, DEFAULT_MAX_TOP_N_TOKENS),
            max_input_tokens=info.max_input_tokens,
            max_total_tokens=info.max_total_tokens,
            vocab_size=info.vocab_size,
            enable_prefill_logprobs=settings.enable_prefill_logprobs,
            disable_grammar_support=settings.disable_grammar_support,
        )


@dataclass(frozen=True, slots=True)
class NativePlan:
    """A decoded request and what its answer must show."""

    inputs: str
    parameters: GenerateParameters
    is_sampled: bool
    num_choices: int  # permits to take
    details: bool
    shows_prefill: bool
    needs_logprobs: bool
    top_n: int
    text_prefix: str  # `inputs`, where the full text is wanted
    seeds: tuple[int, ...]  # by choice, [0, 2**64): the client's, or drawn

    def shown_seed(self, choice: int = 0) -> int | None:
        """Return the seed that answers report for a choice: none where nothing was drawn."""
        return self.seeds[choice] if self.is_sampled else None


def plan_request(
    request: GenerateRequest | CompatGenerateRequest,
    limits: NativeLimits,
    *,
    is_stream: bool,
    full_text_default: bool = False,
) -> NativePlan:
    """Check what TGI checks before it takes a permit.

    Raises:
        InvalidRequest: best_of or decoder_input_details do not fit; a seed has more than 64 bits.
    """
    given = request.parameters
    parameters = given or _ABSENT
    best_of = _or(parameters.best_of, 1)
    if parameters.seed is not None and parameters.seed > MAX_SEED:
        _refuse(f"`parameters.seed` must be at most {MAX_SEED}. Given: {parameters.seed}", "seed")
    if is_stream:
        _require(best_of == 1, "`best_of` != 1 is not supported when streaming tokens", "best_of")
        _require(
            not parameters.decoder_input_details,
            "`decoder_input_details` == true is not supported when streaming tokens",
            "decoder_input_details",
        )
    if best_of > 1:
        _require(limits.max_best_of != 1, "`best_of` != 1 is not allowed for this endpoint", "best_of")
        _require(
            best_of <= limits.max_best_of,
            f"`best_of` must be > 0 and <= {limits.max_best_of}. Given: {best_of}",
            "best_of",
        )
    details = bool(parameters.details or parameters.decoder_input_details)
    full_text = parameters.return_full_text
    return NativePlan(
        inputs=request.inputs,
        parameters=parameters,
        # TGI's trap: a request without parameters samples, one with parameters is greedy unless told.
        is_sampled=given is None or _is_sampled(given),
        num_choices=max(best_of, 1),
        details=details,
        shows_prefill=bool(parameters.decoder_input_details) and limits.enable_prefill_logprobs,
        # Every token of a stream shows its own; the best of several sequences is the likeliest.
        needs_logprobs=is_stream or details or best_of > 1,
        top_n=parameters.top_n_tokens or 0,
        text_prefix=request.inputs if (full_text_default if full_text is None else full_text) else "",
        seeds=tuple(
            random.randrange(DRAWN_SEEDS) if parameters.seed is None else parameters.seed
            for _ in range(max(best_of, 1))
        ),
    )


def check_parameters(plan: NativePlan, limits: NativeLimits) -> None:
    """Check the values, in TGI's order.

    Raises:
        InvalidRequest: the first rule that is broken, in TGI's words.
    """
    p = plan.parameters
    asks_to_sample = bool(p.do_sample) or any(
        value is not None for value in (p.temperature, p.top_k, p.top_p, p.typical_p)
    )
    _require(
        plan.num_choices == 1 or asks_to_sample, "you must use sampling when `best_of` is > 1", "best_of"
    )
    for name in ("temperature", "repetition_penalty"):
        value = getattr(p, name)
        _require(value is None or value > 0.0, f"`{name}` must be strictly positive", name)
    _require(
        p.frequency_penalty is None or abs(p.frequency_penalty) <= FREQUENCY_PENALTY_BOUND,
        f"`frequency_penalty` must be >= -{FREQUENCY_PENALTY_BOUND} and <= {FREQUENCY_PENALTY_BOUND}",
        "frequency_penalty",
    )
    for name in ("top_p", "typical_p"):
        value = getattr(p, name)
        _require(value is None or 0.0 < value < 1.0, f"`{name}` must be > 0.0 and < 1.0", name)
    _require(p.top_k is None or p.top_k > 0, "`top_k` must be strictly positive", "top_k")
    _require(p.max_new_tokens != 0, "`max_new_tokens` must be strictly positive", "max_new_tokens")
    _check_stop(p.stop or (), limits.max_stop_sequences)
    _require(p.seed is None or plan.num_choices == 1, "`seed` must not be set when `best_of` > 1", "seed")
    _require(
        plan.top_n <= limits.max_top_n_tokens,
        f"`top_n_tokens` must be >= 0 and <= {limits.max_top_n_tokens}. Given: {plan.top_n}",
        "top_n_tokens",
    )
    if not plan.inputs:
        _refuse("`inputs` cannot be empty", "inputs")
    _require(
        p.truncate is None or 0 < p.truncate <= limits.max_input_tokens,
        f"`truncate` must be strictly positive and less than {limits.max_input_tokens}. Given: {p.truncate}",
        "truncate",
    )
    _require(
        p.adapter_id is None,
        f"`adapter_id` is not supported: no adapters are served. Given: {p.adapter_id}",
        "adapter_id",
    )


def to_generation(
    plan: NativePlan, limits: NativeLimits, prompt_ids: Sequence[int], request_id: str
) -> GenerationRequest:
    """Check the lengths, and build the engine's request; its grammar is `tgi_grammar`'s.

    Raises:
        InvalidRequest: the prompt or its answer does not fit.
    """
    p = plan.parameters
    if p.truncate is not None:
        prompt_ids = prompt_ids[-p.truncate :]
    if not prompt_ids:
        _refuse("`inputs` cannot be empty", "inputs")
    room = _check_length(len(prompt_ids), p.max_new_tokens, limits)
    return GenerationRequest(
        request_id=request_id,
        prompt_ids=prompt_ids,
        sampling=_sampling(plan, limits, plan.top_n if plan.needs_logprobs else None),
        stop=StopConditions(
            max_tokens=room if p.max_new_tokens is None else min(p.max_new_tokens, room),
            stop=tuple(p.stop or ()),
            include_stop=True,
        ),
        n=plan.num_choices,
        prompt_logprobs=0 if plan.shows_prefill else None,
        is_prefix_cached=not plan.shows_prefill,
        seeds=tuple(seed & _ENGINE_SEED_MASK for seed in plan.seeds) if plan.num_choices > 1 else (),
    )


def _sampling(plan: NativePlan, limits: NativeLimits, logprobs: int | None) -> SamplingParams:
    p = plan.parameters
    return SamplingParams(
        temperature=_factor(p.temperature) if plan.is_sampled else 0.0,
        top_k=min(_or(p.top_k, 0), limits.vocab_size),
        top_p=_or(p.top_p, 1.0),
        typical_p=_or(p.typical_p, 1.0),
        repetition_penalty=_factor(p.repetition_penalty),
        frequency_penalty=_or(p.frequency_penalty, 0.0),
        seed=plan.seeds[0] & _ENGINE_SEED_MASK,
        logprobs=logprobs,
        logprobs_mode=LogprobsMode.PROCESSED,
    )


def _is_sampled(p: GenerateParameters) -> bool:
    return (
        bool(p.do_sample)
        or p.top_k is not None
        or any(value not in (None, 1.0) for value in (p.temperature, p.top_p, p.typical_p))
    )


def _check_stop(stop: Sequence[str], most: int) -> None:
    _require(len(stop) <= most, f"`stop` supports up to {most} stop sequences. Given: {len(stop)}", "stop")
    # TGI ends such a request after its first token, which nobody can have meant.
    _require("" not in stop, "`stop` must not hold an empty string", "stop")
    longest = max(map(len, stop), default=0)
    _require(
        longest <= MAX_STOP_CHARS,
        f"`stop` sequences may have up to {MAX_STOP_CHARS} characters. Given: {longest}",
        "stop",
    )


def _check_length(num_input: int, max_new: int | None, limits: NativeLimits) -> int:
    """Return how many tokens the context has room for."""
    room = max(limits.max_total_tokens - num_input, 0)
    tested = min(room if max_new is None else max_new, MAX_TESTED_NEW_TOKENS)
    _require(
        num_input + tested <= limits.max_total_tokens,
        f"`inputs` tokens + `max_new_tokens` must be <= {limits.max_total_tokens}. "
        f"Given: {num_input} `inputs` tokens and {tested} `max_new_tokens`",
        "max_new_tokens",
    )
    _require(
        num_input <= limits.max_input_tokens,
        f"`inputs` must have less than {limits.max_input_tokens} tokens. Given: {num_input}",
        "inputs",
    )
    return room


def _require(holds: bool, message: str, field: str) -> None:
    if not holds:
        _refuse(message, field)


def _refuse(message: str, field: str) -> NoReturn:
    path = field if field == "inputs" else f"parameters.{field}"
    raise InvalidRequest(message, param=path)


def _factor(value: float | None) -> float:
    return 1.0 if value is None else min(max(value, _SMALLEST_FACTOR), _LARGEST_FACTOR)


_Value = TypeVar("_Value")


def _or(value: _Value | None, default: _Value) -> _Value:
    return default if value is None else value
