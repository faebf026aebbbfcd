"""TGI's rules for a generate request: its checks, in its order and wording, and the resulting job.

`read_request` makes the checks that TGI makes before taking a permit, and the job's `check` the rest.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import msgspec

from tgi_asgi.api.call import Call
from tgi_asgi.api.context import ServerContext
from tgi_asgi.api.exchange import Exchange
from tgi_asgi.api.job import Constraint, Job, Text
from tgi_asgi.api.limits import MAX_STOP_CHARS, Limits, Overflow
from tgi_asgi.api.parse import decode_json, refuse
from tgi_asgi.api.sampling import ENGINE_SEEDS, GREEDY_BELOW, factor, random_seed, sampling
from tgi_asgi.api.tgi.render import AnswerOptions, NativeRenderer
from tgi_asgi.api.tgi.schema import (
    COMPAT_GENERATE,
    GENERATE,
    MAX_SEED,
    GenerateParameters,
    GenerateRequest,
    Grammar,
)
from tgi_asgi.errors import InvalidRequest
from tgi_asgi.images.decode import is_data_url
from tgi_asgi.text.constrain import source as sources
from tgi_asgi.text.constrain.source import GrammarSource
from tgi_asgi.types import LogprobsMode

_ABSENT = GenerateParameters()
# TGI's own, without a charset: `@huggingface/inference` compared it exactly until its version 2.6.1.
_STREAM_TYPE = b"text/event-stream"
_MARKDOWN = re.compile(r"!\[\]\(([^()]*)\)")  # no "(" inside, otherwise each of many would search to the end
_GRAMMAR = "parameters.grammar.value"
# Conditions on given values, in TGI's order and wording.
_RULES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("temperature", lambda value: value > 0, "strictly positive"),
    ("repetition_penalty", lambda value: value > 0, "strictly positive"),
    ("frequency_penalty", lambda value: abs(value) <= 2, ">= -2.0 and <= 2.0"),
    ("top_p", lambda value: 0 < value < 1, "> 0.0 and < 1.0"),
    ("typical_p", lambda value: 0 < value < 1, "> 0.0 and < 1.0"),
    ("top_k", lambda value: value > 0, "strictly positive"),
    ("max_new_tokens", lambda value: value > 0, "strictly positive"),
)


def parse_generate(body: bytes, exchange: Exchange, *, is_stream: bool = False) -> Call:
    """Parse the body of `/generate` or `/generate_stream`."""
    job, options = read_request(decode_json(body, GENERATE), exchange.context, is_stream=is_stream)
    render = partial(NativeRenderer, options=options)
    return Call(jobs=[job], render=render, stream=is_stream, stream_type=_STREAM_TYPE)


def parse_root(body: bytes, exchange: Exchange) -> Call:
    """Parse the body of `POST /`, which may ask for streaming.

    Answers begin with the prompt, as in TGI, but not with images in it: `return_full_text` is true by default
    for models that its `pipeline_tag` calls text-generation.
    """
    request = decode_json(body, COMPAT_GENERATE)
    is_stream = bool(request.stream)
    served = exchange.context.ready()
    full_text = not served.accepts_images and served.info.encoder_decoder is None
    job, options = read_request(request, exchange.context, is_stream=is_stream, full_text=full_text)
    render = partial(NativeRenderer, options=options, is_list=True)
    return Call(jobs=[job], render=render, stream=is_stream, stream_type=_STREAM_TYPE)


def read_inputs(inputs: str, context: ServerContext) -> Text:
    """Return a prompt; if the model accepts images, `![](url)` in it is an image.

    Only `data:` URLs and URLs of hosts that the administrator has listed are used. The prompt may contain
    anyone's text, so a URL in it does not mean that the client wants it fetched.
    """
    served = context.ready()
    images, processor = served.new_images(), served.image_processor
    if images is None or processor is None:
        return Text(inputs)
    pieces, end = [], 0
    for found in _MARKDOWN.finditer(inputs):
        url = found[1]
        if is_data_url(url) or context.fetcher.allows_host_of(url):
            images.add(url, "inputs")
            pieces += [inputs[end : found.start()], processor.placeholder]
            end = found.end()
    return Text("".join([*pieces, inputs[end:]]), images=images)


def read_request(
    request: GenerateRequest, context: ServerContext, *, is_stream: bool = False, full_text: bool = False
) -> tuple[Job, AnswerOptions]:
    """Make the checks that TGI makes before taking a permit; return the job and what to show.

    Args:
        full_text: Whether the answer begins with the prompt, unless the request says otherwise.

    Raises:
        InvalidRequest: if best_of or decoder_input_details is not possible, or a seed has more than 64 bits.
    """
    given = request.parameters
    p = given or _ABSENT
    limits = Limits.of(context.settings, is_tgi=True)
    n = _check_before_permit(p, limits, is_stream=is_stream)
    full_text = full_text if p.return_full_text is None else p.return_full_text
    is_warped = any(value not in (None, 1.0) for value in (p.temperature, p.top_p, p.typical_p))
    shows_prefill = bool(p.decoder_input_details) and context.settings.enable_prefill_logprobs
    info = context.ready().info
    pair = info.encoder_decoder
    options = AnswerOptions(
        # As in TGI, a request without parameters samples, but one with parameters is greedy by default.
        is_sampled=given is None or bool(p.do_sample) or p.top_k is not None or is_warped,
        details=bool(p.details or p.decoder_input_details),
        top_n=p.top_n_tokens or 0,
        text_prefix=request.inputs if full_text else "",
        seeds=tuple(random_seed() if p.seed is None else p.seed for _ in range(n)),
        starts=pair.starts if pair is not None and shows_prefill else (),
    )
    # Each token of a stream shows its own log-probability; choosing the best of several sequences needs them,
    # too.
    needs_logprobs = is_stream or options.details or n > 1
    job = Job(
        prompt=read_inputs(request.inputs, context),
        sampling=sampling(
            info,
            temperature=max(factor(p.temperature), GREEDY_BELOW) if options.is_sampled else 0.0,
            top_k=p.top_k,
            top_p=p.top_p,
            typical_p=p.typical_p,
            repetition_penalty=p.repetition_penalty,
            frequency_penalty=p.frequency_penalty,
            seed=options.seeds[0],
            logprobs=options.top_n if needs_logprobs else None,
            mode=LogprobsMode.PROCESSED,
        ),
        n=n,
        check=partial(_check, request.inputs, p, options.top_n, n, limits, context),
        max_tokens=p.max_new_tokens,
        overflow=Overflow.TGI,
        keep_tokens=p.truncate,
        stop=tuple(p.stop or ()),
        include_stop=True,
        constraint=Constraint(_GRAMMAR, partial(native_grammar, p.grammar)) if p.grammar else None,
        prompt_logprobs=0 if shows_prefill and pair is None else None,
        seeds=tuple(seed % ENGINE_SEEDS for seed in options.seeds) if n > 1 else (),
        adapter=p.adapter_id,
    )
    return job, options


def _check_before_permit(p: GenerateParameters, limits: Limits, *, is_stream: bool) -> int:
    """Make the checks that TGI makes before taking a permit; return the number of sequences."""
    best_of = 1 if p.best_of is None else p.best_of
    message = f"`parameters.seed` must be at most {MAX_SEED}. Given: {p.seed}"
    _require((p.seed or 0) <= MAX_SEED, message)
    if is_stream:
        _require(best_of == 1, "`best_of` != 1 is not supported when streaming tokens")
        message = "`decoder_input_details` == true is not supported when streaming tokens"
        _require(not p.decoder_input_details, message)
    if best_of > 1:
        _require(limits.best_of != 1, "`best_of` != 1 is not allowed for this endpoint")
        message = f"`best_of` must be > 0 and <= {limits.best_of}. Given: {best_of}"
        _require(best_of <= limits.best_of, message)
    return max(best_of, 1)


def _check(
    inputs: str, p: GenerateParameters, top_n: int, n: int, limits: Limits, context: ServerContext
) -> None:
    """Check the values, in TGI's order and wording."""
    asks_to_sample = p.do_sample or (p.temperature, p.top_k, p.top_p, p.typical_p) != (None,) * 4
    _require(n == 1 or asks_to_sample, "you must use sampling when `best_of` is > 1")
    for name, holds, words in _RULES:
        value = getattr(p, name)
        _require(value is None or holds(value), f"`{name}` must be {words}")
    stop, limit = p.stop or (), limits.stops
    _require(len(stop) <= limit, f"`stop` supports up to {limit} stop sequences. Given: {len(stop)}")
    # TGI ends such a request after its first token, which cannot be intended.
    _require("" not in stop, "`stop` must not hold an empty string")
    longest = max(map(len, stop), default=0)
    message = f"`stop` sequences may have up to {MAX_STOP_CHARS} characters. Given: {longest}"
    _require(longest <= MAX_STOP_CHARS, message)
    _require(p.seed is None or n == 1, "`seed` must not be set when `best_of` > 1")
    message = f"`top_n_tokens` must be >= 0 and <= {limits.top_logprobs}. Given: {top_n}"
    _require(top_n <= limits.top_logprobs, message)
    _require(inputs, "`inputs` cannot be empty")
    max_input = context.ready().info.max_input_tokens
    message = f"`truncate` must be strictly positive and less than {max_input}. Given: {p.truncate}"
    _require(p.truncate is None or 0 < p.truncate <= max_input, message)
    if p.adapter_id is not None:
        _check_adapter(p.adapter_id, context)
    if p.watermark:
        context.warn_once("watermark", "`watermark` is accepted, but texts are not watermarked")


def _check_adapter(name: str, context: ServerContext) -> None:
    adapters = context.ready().adapters
    known = adapters is not None and name in adapters
    message = f"`adapter_id` must name an adapter that is served. Given: {name[:256]}"
    if adapters is None:
        message = f"`adapter_id` is not supported: no adapters are served. Given: {name[:256]}"
    _require(known, message)


def native_grammar(grammar: Grammar) -> GrammarSource:
    """Return the grammar source of a request's constraint.

    Raises:
        InvalidRequest: if its form is wrong, or it is too large.
    """
    value = grammar.value
    message = "grammar is not supported"
    try:
        if grammar.type == "regex":
            if not isinstance(value, str):
                raise InvalidRequest("a regex must be a string")
            return sources.regex(value)
        if grammar.type == "json_schema" and isinstance(value, dict):
            value = value.get("schema")
        if isinstance(value, str):
            value = msgspec.json.decode(value)
        if isinstance(value, dict):
            return sources.json_schema(value, is_strict=False)
    except (InvalidRequest, msgspec.DecodeError, RecursionError) as error:
        message = f"grammar is not valid: {error}"
    refuse(_GRAMMAR, message)


def _require(holds: object, message: str) -> None:
    if not holds:
        raise InvalidRequest(message)
