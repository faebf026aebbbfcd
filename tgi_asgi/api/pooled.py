"""The lifecycle of a request for vectors: read, check, take a permit, tokenise, compute, answer.

    route = Route("POST", "/v1/embeddings", pooling(parse_embeddings), ...)

Each dialect provides `parse`, a function from a body to a `PoolCall`. Each input becomes a request of the
engine. The inputs of a call run a few at a time, so that a thousand of them leave capacity for others. A call
is admitted with few permits and takes more while it runs, so that many calls with many inputs share the
capacity instead of being refused. Once one of its inputs has run, a call is no longer refused for want of
capacity, but waits.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from tgi_asgi.api.answer_headers import sync_headers
from tgi_asgi.api.exchange import Exchange, Handler
from tgi_asgi.api.life import admitted, cache_salt_of, lease_adapters, served_name, submit
from tgi_asgi.api.limits import bounded_priority
from tgi_asgi.api.pool_call import PoolCall, Pooled
from tgi_asgi.api.pool_prompt import tokenise
from tgi_asgi.api.served import Served
from tgi_asgi.errors import Overloaded, TgiError, TooManyPrompts
from tgi_asgi.types import (
    Adapter,
    Engine,
    GenerationRequest,
    Permit,
    SamplingParams,
    StopConditions,
    TokenEvent,
)

if TYPE_CHECKING:
    from tgi_asgi.api.asgi import Header
    from tgi_asgi.types import Vector

MAX_TOKENS = 1 << 21  # per call: they wait as lists of about 36 bytes each; a query counts for each document
# What a call has for each permit that it needs to be admitted, because what waits takes memory.
_INPUTS_PER_PERMIT, _CHARACTERS_PER_PERMIT = 64, 64 * 1024
_RETRY_S = 0.1
PARSED_INLINE = 1024  # bytes of a body, which may hold 250 inputs; reading one takes several microseconds
_MANY_INPUTS, _MANY_CHARACTERS = 256, 32 * 1024  # with more in a call, each stage takes milliseconds
_LARGE_ANSWER = 8 * 1024  # numbers; writing one takes about 100 ns
_SAMPLING, _STOP = SamplingParams(temperature=0.0), StopConditions(max_tokens=1)

Parse = Callable[[bytes, Exchange], PoolCall]


def pooling(parse: Parse) -> Handler:
    """Return the handler of a route whose bodies `parse` reads; `parse` runs in a thread if one is large."""
    return partial(answer, parse=parse)


async def answer(exchange: Exchange, parse: Parse) -> None:
    """Answer a request for vectors.

    Raises:
        TgiError: if it is refused or fails.
        ClientDisconnected: if the client disconnects.
    """
    context = exchange.context
    served = context.ready()
    body = await exchange.read_body()
    if len(body) <= PARSED_INLINE:
        call = parse(body, exchange)
    else:
        call = await context.text_threads.run_for(exchange.tenant, parse, body, exchange)
    size = sum(each.size for each in call.inputs)
    exchange.is_large |= len(call.inputs) > _MANY_INPUTS or size > _MANY_CHARACTERS
    exchange.large_objects.append(call)
    model = served_name(exchange, call.model)
    if not call.inputs:
        await exchange.respond(200, call.answer(Pooled(model, [], 0)))
        return
    num_needed = _num_needed(len(call.inputs), size, context.settings.max_concurrent_requests)
    with admitted(exchange, num_needed) as permit:
        [adapter] = await lease_adapters(exchange, served, [model])  # must be the first await
        work = _requests(exchange, served, call, adapter)
        requests = await (exchange.unless_gone(work) if exchange.is_large else work)
        exchange.large_objects.append(requests)
        vectors = await _compute(exchange, served.engine, requests, permit)
    pooled = Pooled(model, vectors, sum(len(request.prompt_ids) for request in requests))
    exchange.is_large |= sum(map(len, vectors)) > _LARGE_ANSWER

    def rendered() -> tuple[bytes, list[Header]]:
        content = call.answer(pooled)
        characters = sum(each.num_characters for each in call.inputs)
        return content, sync_headers(exchange, served.info, characters=characters, is_sum=len(vectors) > 1)

    content, headers = await exchange.work(rendered)
    await exchange.respond(200, content, headers=headers)


def _num_needed(num_inputs: int, size: int, limit: int) -> int:
    """Return how many permits a call needs to be admitted: at most a quarter of all.

    Args:
        size: The characters and token ids of its inputs together.
        limit: The number of all permits.
    """
    num_needed = max(-(-num_inputs // _INPUTS_PER_PERMIT), -(-size // _CHARACTERS_PER_PERMIT))
    return min(num_needed, max(limit // 4, 1))


def _max_running(num_calls: int, limit: int) -> int:
    """Return how many inputs of each call may run if there are so many calls.

    One call uses at most a quarter of the permits, and all together use three quarters, so that further
    requests find one.
    """
    return max(min(limit, limit * 3 // num_calls) // 4, 1)


async def _requests(
    exchange: Exchange, served: Served, call: PoolCall, adapter: Adapter | None
) -> list[GenerationRequest]:
    """Tokenise the inputs in threads, a batch at a time, so that other requests get their turn.

    The engine's requests are made in the same threads: 2,000 take 15 ms.
    """
    context = exchange.context
    priority = bounded_priority(call.priority, context.settings)
    salt = cache_salt_of(exchange, call.cache_salt)

    def made(begin: int) -> list[GenerationRequest]:
        return [
            GenerationRequest(
                request_id=exchange.request_id,
                prompt_ids=ids,
                sampling=_SAMPLING,
                stop=_STOP,
                priority=priority,
                cache_salt=salt,
                adapter=adapter,
                pooling=call.pooling,
                second_start=second_start,
            )
            for ids, second_start in tokenise(call, begin, served, context.settings)
        ]

    requests: list[GenerationRequest] = []
    num_tokens = 0
    while len(requests) < len(call.inputs):
        found = await context.text_threads.run_for(exchange.tenant, made, len(requests))
        num_tokens += sum(len(request.prompt_ids) for request in found)
        if num_tokens > MAX_TOKENS:
            where = call.inputs[len(requests)].where.partition("[")[0]
            raise TooManyPrompts(f"`{where}` takes at most {MAX_TOKENS} tokens together", param=where)
        requests += found
    return requests


async def _compute(
    exchange: Exchange, engine: Engine, requests: Sequence[GenerationRequest], permit: Permit
) -> list[Vector]:
    """Run all requests, as many at a time as the permits allow; cancel all if one fails."""
    exchange.context.num_pool_calls += 1
    try:
        return await exchange.unless_gone(_Window(exchange, engine, requests, permit).run())
    finally:
        exchange.context.num_pool_calls -= 1
        exchange.cancel_channels()


class _Window:
    """The requests of one call that run at the same time; when one ends, the next uses its permit.

    Others may displace a request that has not begun to run. Once one of the call's requests has run, those
    that are displaced are submitted again, as soon as there is capacity.
    """

    def __init__(
        self, exchange: Exchange, engine: Engine, requests: Sequence[GenerationRequest], permit: Permit
    ) -> None:
        self._exchange = exchange
        self._engine = engine
        self._requests = requests
        self._permit = permit
        self._left = deque(range(len(requests)))  # indices of the requests to submit
        self._num_running = 0
        self._was_displaced = False  # since the last request was submitted
        self._error: TgiError | None = None
        self._changed = asyncio.Event()

    async def run(self) -> list[Vector]:
        """Return the requests' vectors.

        Raises:
            TgiError: if one has failed.
        """
        while self._left or self._num_running:
            if self._left:
                self._submit(await self._next_permit())
            else:
                await self._next_change()
        vectors = []
        for channel in self._exchange.channels:
            assert channel.stats.vector is not None
            vectors.append(channel.stats.vector)
        return vectors

    def _submit(self, permit: Permit) -> None:
        """Submit the next request, which takes the place of its channel if it was displaced."""
        index, channels = self._left.popleft(), self._exchange.channels
        channel = submit(self._engine, self._requests[index], permit)
        channels[index : index + 1] = [channel]
        self._num_running += 1
        channel.attach(_Sink(self, index))

    def on_end(self) -> None:
        """Record that a request has finished."""
        self._num_running -= 1
        self._changed.set()

    def on_error(self, index: int, error: TgiError) -> None:
        """Record that a request was displaced, or that it has failed, and the call with it."""
        has_begun = any(channel.stats.scheduled_s is not None for channel in self._exchange.channels)
        if isinstance(error, Overloaded) and has_begun:
            self._num_running -= 1
            self._left.appendleft(index)
            self._was_displaced = True
        else:
            self._error = self._error or error
        self._changed.set()

    async def _next_permit(self) -> Permit:
        """Return a permit for one more request: part of the initial one, then new ones as requests end."""
        if self._permit.n:
            return self._permit.split(1)
        context = self._exchange.context
        limit = context.settings.max_concurrent_requests
        while self._num_running >= _max_running(context.num_pool_calls, limit):
            await self._next_change()
        if self._was_displaced:
            self._was_displaced = False
            await self._wait_for_capacity()
        while True:
            try:
                return self._engine.acquire(1, self._exchange.tenant, is_accepted=True)
            except Overloaded:  # another request got the capacity; an accepted call waits for more
                await self._wait_for_capacity()

    async def _wait_for_capacity(self) -> None:
        """Wait until one of the call's requests has ended, or for a moment if none runs."""
        if self._num_running:
            await self._next_change()
        else:
            await asyncio.sleep(_RETRY_S)

    async def _next_change(self) -> None:
        if self._error is None:
            self._changed.clear()
            await self._changed.wait()
        if self._error is not None:
            raise self._error


class _Sink:
    """Passes the end of one of a window's requests on."""

    __slots__ = ("_index", "_window")

    def __init__(self, window: _Window, index: int) -> None:
        self._window = window
        self._index = index

    def on_events(self, events: Sequence[TokenEvent]) -> None:
        """Note the end, which is the only event of a request for a vector."""
        self._window.on_end()

    def on_error(self, error: TgiError) -> None:
        """Note the error."""
        self._window.on_error(self._index, error)
