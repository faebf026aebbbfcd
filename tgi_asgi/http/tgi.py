"""TGI's generating routes: `POST /`, `/generate` and `/generate_stream`.

They read a request, take its permit, tokenise in a thread and hand over to the engine; checks are
`tgi_validation`'s, answers `tgi_render`'s.
"""

from __future__ import annotations

import dataclasses

import msgspec
from starlette.routing import Route

from tgi_asgi.errors import InvalidRequest
from tgi_asgi.http import health
from tgi_asgi.http.asgi import JSON, Header
from tgi_asgi.http.collect import collect
from tgi_asgi.http.context import Served
from tgi_asgi.http.exchange import Exchange
from tgi_asgi.http.grammars import compile_grammar
from tgi_asgi.http.permits import Permits
from tgi_asgi.http.routing import route
from tgi_asgi.http.sse import EventStream
from tgi_asgi.http.tgi_grammar import PARAM, native_grammar
from tgi_asgi.http.tgi_render import StreamRenderer, pick_best, render_prefill, render_whole
from tgi_asgi.http.tgi_schema import (
    COMPAT_GENERATE,
    GENERATE,
    CompatGenerateRequest,
    GenerateRequest,
    GenerateResponse,
)
from tgi_asgi.http.tgi_validation import (
    NativeLimits,
    NativePlan,
    check_parameters,
    plan_request,
    to_generation,
)
from tgi_asgi.observe.course import stream_headers, sync_headers
from tgi_asgi.types import GenerationRequest


def routes() -> list[Route]:
    """Return TGI's generating routes; `GET /` is its health check."""
    return [
        route("/", get=health.health, post=generate_compat, generates=True, is_quiet=True),
        route("/generate", post=generate, generates=True),
        route("/generate_stream", post=generate_stream, generates=True),
    ]


async def generate(exchange: Exchange) -> None:
    """Answer with one object."""
    served = exchange.context.ready()
    request = await exchange.read_json(GENERATE)
    response, headers = await _answer_whole(exchange, served, request)
    await exchange.reply(200, msgspec.json.encode(response), JSON, headers)


async def generate_stream(exchange: Exchange) -> None:
    """Answer with one event a token."""
    served = exchange.context.ready()
    request = await exchange.read_json(GENERATE)
    await _answer_stream(exchange, served, request)


async def generate_compat(exchange: Exchange) -> None:
    """Answer with an array of one object or with a stream, as the body asks."""
    served = exchange.context.ready()
    request = await exchange.read_json(COMPAT_GENERATE)
    if request.stream:
        await _answer_stream(exchange, served, request, full_text_default=True)
        return
    response, headers = await _answer_whole(exchange, served, request, full_text_default=True)
    await exchange.reply(200, msgspec.json.encode([response]), JSON, headers)


async def prepare(exchange: Exchange, served: Served, plan: NativePlan) -> GenerationRequest:
    """Check the values and tokenise the prompt, in a thread; a permit is held already.

    TGI takes it first, so a server without room answers 429 to what it would have refused.

    Raises:
        InvalidRequest: a value or a grammar is refused, or the prompt does not fit.
    """
    context = exchange.context
    limits = NativeLimits.of(context.settings, served.info)
    check_parameters(plan, limits)
    if plan.parameters.watermark:
        context.warn_once("watermark", "`watermark` is accepted, but texts are not watermarked")
    prompt_ids = await context.in_thread(served.tokenizer.encode, plan.inputs, add_special_tokens=True)
    generation = to_generation(plan, limits, prompt_ids, exchange.request_id)
    given = plan.parameters.grammar
    if given is None:
        return generation
    is_disabled = limits.disable_grammar_support
    source = await context.in_thread(native_grammar, given, is_disabled=is_disabled)
    try:
        grammar = await compile_grammar(context, source)
    except InvalidRequest as error:
        error.param = f"{PARAM}.value"
        raise
    return dataclasses.replace(generation, grammar=grammar)


async def _answer_whole(
    exchange: Exchange,
    served: Served,
    request: GenerateRequest | CompatGenerateRequest,
    *,
    full_text_default: bool = False,
) -> tuple[GenerateResponse, list[Header]]:
    limits = NativeLimits.of(exchange.context.settings, served.info)
    plan = plan_request(request, limits, is_stream=False, full_text_default=full_text_default)
    with Permits(exchange, served.engine, plan.num_choices) as permits:
        generation = await prepare(exchange, served, plan)
        channel = permits.submit(generation)
    [choices] = await collect(exchange, [channel])
    best = pick_best(choices)
    prefill = render_prefill(generation, channel.stats, served.tokenizer)
    headers = sync_headers(
        exchange, served.info, characters=len(plan.inputs), generated_tokens=len(choices[best])
    )
    return render_whole(plan, choices, best, prefill, served.tokenizer), headers


async def _answer_stream(
    exchange: Exchange,
    served: Served,
    request: GenerateRequest | CompatGenerateRequest,
    *,
    full_text_default: bool = False,
) -> None:
    limits = NativeLimits.of(exchange.context.settings, served.info)
    plan = plan_request(request, limits, is_stream=True, full_text_default=full_text_default)
    with Permits(exchange, served.engine, plan.num_choices) as permits:
        generation = await prepare(exchange, served, plan)
        channel = permits.submit(generation)
    renderer = StreamRenderer(plan, len(generation.prompt_ids), served.tokenizer)
    headers = stream_headers(exchange, served.info, characters=len(plan.inputs))
    await EventStream(exchange, renderer, headers).run([channel])
