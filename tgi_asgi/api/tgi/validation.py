"""TGI's rules for a generate request: its checks, in its order and words, and what they turn into.

`read_request` checks what TGI checks before it takes a permit, the job's `check` the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NoReturn

import msgspec

from tgi_asgi.api.call import Constraint, Job, Text
from tgi_asgi.api.context import ServerContext
from tgi_asgi.api.limits import MAX_STOP_CHARS, Limits, Room
from tgi_asgi.api.sampling import ENGINE_SEEDS, GREEDY_BELOW, drawn_seed, factor, sampling
from tgi_asgi.api.tgi.schema import (
    FREQUENCY_PENALTY_BOUND,
    MAX_SEED,
    CompatGenerateRequest,
    GenerateParameters,
    GenerateRequest,
    Grammar,
)
from tgi_asgi.errors import InvalidRequest
from tgi_asgi.text.constrain import source as sources
from tgi_asgi.text.constrain.source import GrammarSource
from tgi_asgi.types import LogprobsMode

_ABSENT = GenerateParameters()
_GRAMMAR = "parameters.grammar"


@dataclass(frozen=True, slots=True)
class Shown:
    """What the answer to a request must show."""

    is_sampled: bool
    details: bool
    top_n: int
    text_prefix: str  # `inputs`, where the full text is wanted
    seeds: tuple[int, ...]  # by choice, [0, 2**64): the client's, or drawn

    def seed(self, choice: int = 0) -> int | None:
        """Return the seed that answers report for a choice: none where nothing was drawn."""
        return self.seeds[choice] if self.is_sampled else None


def read_request(
    request: GenerateRequest | CompatGenerateRequest,
    context: ServerContext,
    *,
    is_stream: bool,
    full_text: bool = False,
) -> tuple[Job, Shown]:
    """Check what TGI checks before it takes a permit, and return what the request asks for.

    Args:
        full_text: the answer begins with the prompt, unless the request says otherwise.

    Raises:
        InvalidRequest: best_of or decoder_input_details do not fit; a seed has more than 64 bits.
    """
    given = request.parameters
    p = given or _ABSENT
    limits = Limits.of(context.settings, is_tgi=True)
    best_of = 1 if p.best_of is None else p.best_of
    if p.seed is not None and p.seed > MAX_SEED:
        _refuse(f"`parameters.seed` must be at most {MAX_SEED}. Given: {p.seed}", "seed")
    if is_stream:
        _require(best_of == 1, "`best_of` != 1 is not supported when streaming tokens", "best_of")
        _require(
            not p.decoder_input_details,
            "`decoder_input_details` == true is not supported when streaming tokens",
            "decoder_input_details",
        )
    if best_of > 1:
        _require(limits.best_of != 1, "`best_of` != 1 is not allowed for this endpoint", "best_of")
        message = f"`best_of` must be > 0 and <= {limits.best_of}. Given: {best_of}"
        _require(best_of <= limits.best_of, message, "best_of")
    n = max(best_of, 1)
    full_text = full_text if p.return_full_text is None else p.return_full_text
    shown = Shown(
        # TGI's trap: a request without parameters samples, one with parameters is greedy unless told.
        is_sampled=given is None or _is_sampled(given),
        details=bool(p.details or p.decoder_input_details),
        top_n=p.top_n_tokens or 0,
        text_prefix=request.inputs if full_text else "",
        seeds=tuple(drawn_seed() if p.seed is None else p.seed for _ in range(n)),
    )
    # Every token of a stream shows its own; the best of several sequences is the likeliest.
    needs_logprobs = is_stream or shown.details or best_of > 1
    shows_prefill = bool(p.decoder_input_details) and context.settings.enable_prefill_logprobs
    info = context.ready().info
    job = Job(
        prompt=Text(request.inputs),
        sampling=sampling(
            info,
            temperature=max(factor(p.temperature), GREEDY_BELOW) if shown.is_sampled else 0.0,
            top_k=p.top_k,
            top_p=p.top_p,
            typical_p=p.typical_p,
            repetition_penalty=p.repetition_penalty,
            frequency_penalty=p.frequency_penalty,
            seed=shown.seeds[0],
            logprobs=shown.top_n if needs_logprobs else None,
            mode=LogprobsMode.PROCESSED,
        ),
        n=n,
        check=partial(_check, request.inputs, p, shown.top_n, n, limits, context),
        max_tokens=p.max_new_tokens,
        room=Room.TGI,
        keep_tokens=p.truncate,
        stop=tuple(p.stop or ()),
        include_stop=True,
        constraint=_constraint(p.grammar),
        prompt_logprobs=0 if shows_prefill else None,
        seeds=tuple(seed % ENGINE_SEEDS for seed in shown.seeds) if n > 1 else (),
    )
    return job, shown


def _check(
    inputs: str, p: GenerateParameters, top_n: int, n: int, limits: Limits, context: ServerContext
) -> None:
    """Check the values, in TGI's order and words."""
    max_input = context.ready().info.max_input_tokens
    asks_to_sample = bool(p.do_sample) or any(
        value is not None for value in (p.temperature, p.top_k, p.top_p, p.typical_p)
    )
    _require(n == 1 or asks_to_sample, "you must use sampling when `best_of` is > 1", "best_of")
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
    _check_stop(p.stop or (), limits.stops)
    _require(p.seed is None or n == 1, "`seed` must not be set when `best_of` > 1", "seed")
    _require(
        top_n <= limits.top_logprobs,
        f"`top_n_tokens` must be >= 0 and <= {limits.top_logprobs}. Given: {top_n}",
        "top_n_tokens",
    )
    _require(bool(inputs), "`inputs` cannot be empty", "inputs")
    _require(
        p.truncate is None or 0 < p.truncate <= max_input,
        f"`truncate` must be strictly positive and less than {max_input}. Given: {p.truncate}",
        "truncate",
    )
    _require(
        p.adapter_id is None,
        f"`adapter_id` is not supported: no adapters are served. Given: {str(p.adapter_id)[:256]}",
        "adapter_id",
    )
    if p.watermark:
        context.warn_once("watermark", "`watermark` is accepted, but texts are not watermarked")


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


def _constraint(grammar: Grammar | None) -> Constraint | None:
    if grammar is None:
        return None
    return Constraint(f"{_GRAMMAR}.value", partial(native_grammar, grammar))


def native_grammar(grammar: Grammar) -> GrammarSource:
    """Return what a request's grammar constrains the output to.

    Raises:
        InvalidRequest: the shape is wrong, or it is too large.
    """
    value = grammar.value
    try:
        if grammar.type == "regex":
            if not isinstance(value, str):
                raise InvalidRequest("a regex must be a string")
            return sources.regex(value)
        if grammar.type == "json_schema" and isinstance(value, dict):
            value = value.get("schema")
        if isinstance(value, str):
            value = msgspec.json.decode(value)
    except (InvalidRequest, msgspec.DecodeError, RecursionError) as error:
        _refuse_grammar(f"grammar is not valid: {error}")
    if not isinstance(value, dict):
        _refuse_grammar("grammar is not supported")
    try:
        return sources.json_schema(value, is_strict=False)
    except InvalidRequest as error:
        _refuse_grammar(f"grammar is not valid: {error}")


def _refuse_grammar(message: str) -> NoReturn:
    raise InvalidRequest(message, param=f"{_GRAMMAR}.value")


def _require(holds: bool, message: str, field: str) -> None:
    if not holds:
        _refuse(message, field)


def _refuse(message: str, field: str) -> NoReturn:
    path = field if field == "inputs" else f"parameters.{field}"
    raise InvalidRequest(message, param=path)
