"""The lifecycle of a generating request: read, check, take a permit, make the prompt, generate, deliver.

    route = Route("POST", "/v1/chat/completions", generating(parse_chat), ...)

Each dialect provides `parse`, a function from a body to a `Call`, whose renderer produces the answer's bytes.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial

from tgi_asgi.api.answer import Choices, Reading
from tgi_asgi.api.answer_form import AnswerForm, answer_form, compile_grammar
from tgi_asgi.api.answer_headers import stream_headers, sync_headers
from tgi_asgi.api.budgets import KeptAnswer, token_bytes
from tgi_asgi.api.call import Call, Generation, Prepared, Renderer
from tgi_asgi.api.context import name_in
from tgi_asgi.api.exchange import Exchange, Handler
from tgi_asgi.api.images import check_images, load_images, salted_images
from tgi_asgi.api.job import Job
from tgi_asgi.api.limits import bounded_priority
from tgi_asgi.api.prompt import Prompt, make_prompt
from tgi_asgi.api.served import Served
from tgi_asgi.api.sse import EventStream
from tgi_asgi.errors import InvalidRequest, ModelNotSupported, TgiError
from tgi_asgi.settings import Settings
from tgi_asgi.types import (
    Adapter,
    Channel,
    Engine,
    GenerationRequest,
    Permit,
    StopConditions,
    TokenEvent,
    TopTokens,
)

Parse = Callable[[bytes, Exchange], Call | Callable[[], Call]]  # raises a refusal from `errors.py`

LARGE_ANSWER = 500  # tokens and alternatives in an answer; rendering each takes about 5 us


def generating(parse: Parse) -> Handler:
    """Return the handler of a route whose bodies `parse` reads.

    `parse` does no I/O, and runs in a thread if the body is large. It may set the exchange's `dialect`. If a
    small body makes much work, it sets `is_large` and returns a function, which does that work in a thread.
    """
    return partial(_generate, parse=parse)


async def _generate(exchange: Exchange, parse: Parse) -> None:
    """Answer a generating request.

    Raises:
        TgiError: if the request is refused, or fails before its answer begins.
        ClientDisconnected: if the client disconnects.
    """
    served = exchange.context.ready()
    call = await exchange.work(parse, await exchange.read_body(), exchange)
    call = call if isinstance(call, Call) else await exchange.work(call)
    exchange.large_objects.append(call)
    model = served_name(exchange, call.model)
    if not call.jobs:
        await exchange.respond(200, call.render(Generation(served, model, [], [])).whole([]))
        return
    check_images([job.prompt.images for job in call.jobs], exchange.context.settings.max_images)
    if not served.info.generates:
        can = "embeds" if served.info.embedding is not None else "scores"
        raise ModelNotSupported(f"The model {can} texts, and generates none", param="model")
    with admitted(exchange, call.num_choices) as permit:
        for job in call.jobs:
            with exchange.dialect.refusing(job.where):
                if job.check is not None:
                    job.check()
        # Nothing is awaited between these checks, the resolution of `model`, and this line.
        names = [model if job.adapter is None else job.adapter for job in call.jobs]
        adapters = await lease_adapters(exchange, served, names)
        jobs = await _prepare_all(exchange, served, call.jobs, adapters)
        generation = Generation(served, model, jobs, exchange.channels)
        renderer = await exchange.work(call.render, generation)
        exchange.large_objects += [jobs, renderer]
        for prepared in jobs:
            own_permit = permit.split(prepared.request.n)
            exchange.channels.append(submit(served.engine, prepared.request, own_permit))
    await (_stream if call.stream else _answer_whole)(exchange, call, generation, renderer)


async def _stream(exchange: Exchange, call: Call, generation: Generation, renderer: Renderer) -> None:
    """Send an answer as its tokens come."""
    characters = _num_characters(generation)
    headers = stream_headers(exchange, generation.info, characters=characters)
    stream = EventStream(exchange, call, renderer, headers)
    shows_prompt = any(job.request.prompt_logprobs is not None for job in generation.jobs)
    with _keeping(exchange, call, generation) as kept:
        await stream.run(
            slow_beyond=LARGE_ANSWER // _token_cost(generation),
            begins_slowly=shows_prompt,
            kept=kept if shows_prompt or call.num_repeats else None,
        )


async def _answer_whole(exchange: Exchange, call: Call, generation: Generation, renderer: Renderer) -> None:
    """Send an answer once it is complete."""
    with _keeping(exchange, call, generation) as kept:
        job_choices = await collect(exchange, kept)
        kept.end()
        exchange.large_objects.append(job_choices)
        num_tokens = sum(len(events) for choices in job_choices for events in choices)
        size = num_tokens * _token_cost(generation)
        size += sum(len(job.request.prompt_ids) * job.request.n for job in generation.jobs)
        exchange.is_large |= size > LARGE_ANSWER
        body = await exchange.work(renderer.whole, job_choices)
        if not call.has_headers:
            await exchange.respond(200, body)
            return
        headers = sync_headers(
            exchange,
            generation.info,
            characters=_num_characters(generation),
            num_tokens=generation.num_shown,
            is_sum=call.is_sum,
        )
        await exchange.respond(200, body, headers=headers)


def _keeping(exchange: Exchange, call: Call, generation: Generation) -> AbstractContextManager[KeptAnswer]:
    """Return a context that counts what is kept of an answer until it is sent."""
    requests = [job.request for job in generation.jobs]
    scored = [each for each in requests if each.prompt_logprobs is not None]
    has_top = any(each.sampling.logprobs for each in requests)
    advice = "Ask for fewer prompts, choices, tokens or alternatives"
    if not (scored or call.num_repeats):
        advice += ", or stream the answer: a stream has no such limit"
    num_copies = 2 * call.num_repeats if call.stream else 1  # as a frame each, and in all frames together
    memory = exchange.context.answer_memory
    answer = KeptAnswer(
        memory,
        exchange.tenant,
        param=exchange.dialect.field_name(("logprobs" if has_top else "max_tokens",)),
        advice=advice,
        prompt_bytes=sum(
            len(each.prompt_ids) * each.n * token_bytes(each.prompt_logprobs) for each in scored
        ),
        token_bytes=num_copies * max(token_bytes(each.sampling.logprobs) for each in requests),
    )
    return memory.keeping(answer)


def _num_characters(generation: Generation) -> int:
    return sum(job.prompt.num_characters for job in generation.jobs)


def _token_cost(generation: Generation) -> int:
    """Return what rendering a token costs at most, in the unit of `LARGE_ANSWER`."""
    return max(2 + (job.request.sampling.logprobs or 0) for job in generation.jobs)


def served_name(exchange: Exchange, requested: str | None) -> str:
    """Return the model name for the answer: the requested name, or the served model's own.

    Raises:
        UnknownModel: if names are strict and this one is not served.
    """
    context, served = exchange.context, exchange.context.ready()
    context.check_name(requested)
    if requested is not None and served.serves(requested):
        return requested
    own, requested = served.info.model_id, name_in(requested)
    if requested is None:
        return own
    context.note_unknown_model(requested)
    exchange.response_headers.append((b"x-tgi-model", own.encode("ascii", "backslashreplace")))
    return requested


async def lease_adapters(
    exchange: Exchange, served: Served, names: Sequence[str | None]
) -> list[Adapter | None]:
    """Return each name's adapter, held until the exchange ends; None for names that are not adapters.

    Which names are adapters is decided before the first await. A name that is unloaded meanwhile is refused,
    not answered by the base model.

    Raises:
        TgiError: if an adapter is not available, or not now.
    """
    if served.adapters is None:
        return [None] * len(names)
    found: dict[str | None, Adapter] = {}
    for name in [name for name in dict.fromkeys(names) if name is not None and name in served.adapters]:
        lease = await served.adapters.lease(name)
        exchange.leases.append(lease)
        found[name] = lease.adapter
    return [found.get(name) for name in names]


async def _prepare_all(
    exchange: Exchange, served: Served, jobs: Sequence[Job], adapters: Sequence[Adapter | None]
) -> list[Prepared]:
    """Prepare the jobs one after another; what may take long ends when the client leaves."""

    async def prepared() -> list[Prepared]:
        pairs = zip(jobs, adapters, strict=True)
        return [await prepare(exchange, served, job, adapter) for job, adapter in pairs]

    may_take_long = exchange.is_large or any(
        job.prompt.images is not None or job.tools is not None or job.constraint is not None for job in jobs
    )
    return await (exchange.unless_gone(prepared()) if may_take_long else prepared())


async def prepare(exchange: Exchange, served: Served, job: Job, adapter: Adapter | None) -> Prepared:
    """Make a job's prompt and grammar in threads, and build the engine's request.

    Raises:
        InvalidRequest: if a message or a grammar is refused, or the prompt does not fit.
        TemplateError: if there is no template, or it refuses the messages.
    """
    context = exchange.context
    with exchange.dialect.refusing(job.where):
        if job.prompt.images is not None:
            await load_images(exchange, served, job.prompt.images)
        prompt, budget = await context.text_threads.run_for(
            exchange.tenant, _prompt_and_budget, job, served, context.settings
        )
        if job.min_tokens > budget:
            limit = exchange.dialect.field_name(("max_tokens",))
            message = f"`{{field}}` must be at most `{limit}` ({budget}), got {job.min_tokens}"
            raise InvalidRequest(message, field=("min_tokens",))
        form = answer_form(job, served, context.settings, prompt.tail)
        grammar = None
        if job.tools is not None or job.constraint is not None:
            grammar = await compile_grammar(exchange, served.grammars, job, form)
        reading = form.reading()
        thinking = _reasoning_tokens(job, context.settings)
    salt = cache_salt_of(exchange, job.cache_salt)
    request = GenerationRequest(
        request_id=exchange.request_id,
        prompt_ids=prompt.ids,
        sampling=job.sampling,
        stop=_stop_conditions(job, budget, prompt, form, reading),
        n=job.n,
        priority=bounded_priority(job.priority, context.settings),
        cache_salt=salt,
        adapter=adapter,
        grammar=grammar,
        reasoning_budget=None if thinking is None else form.reasoning_budget(thinking),
        prompt_logprobs=job.prompt_logprobs,
        seeds=job.seeds,
        images=salted_images(prompt.images, salt),
    )
    return Prepared(job, prompt, request, reading)


def _reasoning_tokens(job: Job, settings: Settings) -> int | None:
    """Return the maximum number of tokens of a job's reasoning; None: any number."""
    match job.reasoning_budget:
        case "default":
            return settings.max_reasoning_tokens
        case "any":
            return None
        case num_tokens:
            return num_tokens


def _stop_conditions(
    job: Job, budget: int, prompt: Prompt, form: AnswerForm, reading: Reading | None
) -> StopConditions:
    return StopConditions(
        max_tokens=budget,
        min_tokens=job.min_tokens,
        ignore_eos=job.ignore_eos,
        stop_token_ids=job.stop_token_ids | prompt.end_ids,
        stop=job.stop,
        include_stop=job.include_stop,
        skip_special_tokens=job.skip_special_tokens,
        shown_special_ids=frozenset() if reading is None else reading.marker_ids,
        reasoning=form.reasoning_marks(),
        drops_first_space=form.drops_space,
    )


def _prompt_and_budget(job: Job, served: Served, settings: Settings) -> tuple[Prompt, int]:
    """Make a job's prompt, and compute how many tokens its answer may have.

    Both in one thread, which frees a prompt that is refused: millions of ids take 20 ms.

    Raises:
        InvalidRequest, TemplateError: as in `prepare`.
    """
    prompt = make_prompt(job, served, settings)
    return prompt, job.overflow.budget(served.info, len(prompt.ids), job.max_tokens, job.default_max_tokens)


def cache_salt_of(exchange: Exchange, salt: str | None) -> str | None:
    """Return a salt that separates clients' cached prefixes, so timing does not reveal others' prompts."""
    tenant = exchange.tenant
    if tenant is None or exchange.context.settings.share_prefix_cache:
        return salt
    return f"{tenant}\0{salt or ''}"


async def collect(exchange: Exchange, kept: KeptAnswer) -> list[Choices]:
    """Wait for every choice of every channel: `result[job][choice]` has that choice's events in order.

    Raises:
        TgiError: if one channel failed, or the answer is too large; the others are cancelled.
        ClientDisconnected: if the client disconnected; all are cancelled.
    """
    channels = exchange.channels
    sinks = [_Sink(channel.request.n, kept) for channel in channels]
    ended = asyncio.gather(*(sink.ended for sink in sinks))

    def refuse(error: TgiError) -> None:
        for sink in sinks:  # some may have ended
            sink.on_error(error)

    try:
        kept.begin(refuse)
        for channel, sink in zip(channels, sinks, strict=True):
            channel.attach(sink)
        await exchange.unless_gone(ended)
    finally:
        exchange.cancel_channels()
    return [sink.events for sink in sinks]


class _Sink:
    """Collects the events of one channel by choice."""

    __slots__ = ("_kept", "ended", "events", "num_open")

    def __init__(self, n: int, kept: KeptAnswer) -> None:
        self._kept = kept
        self.num_open = n
        self.events: list[list[TokenEvent]] = [[] for _ in range(n)]
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def on_events(self, events: Sequence[TokenEvent]) -> None:
        for event in events:
            if event.top:
                event.top = TopTokens.of(event.top)
            self.events[event.index].append(event)
            self.num_open -= event.finish is not None
        self._kept.add_tokens(len(events))
        if not self.num_open and not self.ended.done():
            self.ended.set_result(None)

    def on_error(self, error: TgiError) -> None:
        if not self.ended.done():
            self.ended.set_exception(error)


@contextlib.contextmanager
def admitted(exchange: Exchange, num_choices: int) -> Iterator[Permit]:
    """Take a permit for all choices of a call at once; finally release what the engine did not take.

    All at once, because admission may displace other requests, and a call that is refused must not do that.

    Raises:
        InvalidRequest, Overloaded, Unavailable: if there is no capacity; nothing is held then.
    """
    permit = exchange.context.ready().engine.acquire(num_choices, exchange.tenant)
    try:
        yield permit
    finally:
        permit.release()


def submit(engine: Engine, request: GenerationRequest, permit: Permit) -> Channel:
    """Submit a prompt to the engine; its permit is released when it ends, or at once if this raises."""
    try:
        return engine.submit(request, permit)
    except BaseException:
        permit.release()
        raise
