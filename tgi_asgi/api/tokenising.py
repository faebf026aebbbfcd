"""The lifecycle of a request that only counts or shows tokens: read, take a place, work in a thread, answer.

    route = Route("POST", "/tokenize", tokenising(tokenize), ...)

`tokenize` is a function from a body to the answer's, or to work that remains once images are loaded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import msgspec
from msgspec import Struct

from tgi_asgi.api.exchange import Exchange, Handler
from tgi_asgi.api.images import check_images, load_images
from tgi_asgi.api.life import admitted
from tgi_asgi.api.prompt_images import Images
from tgi_asgi.api.served import Served
from tgi_asgi.errors import Overloaded
from tgi_asgi.system import return_freed_memory

_PART = 4096  # tokens
_HUGE = 1 << 20  # bytes of a body whose tokens take so much memory that the system gets it back


@dataclass(frozen=True, slots=True)
class WithImages:
    """Work that continues once a prompt's images have been loaded."""

    images: Images
    rest: Callable[[], bytes]


Tokenise = Callable[[bytes, Exchange], bytes | WithImages]  # turns a body into the answer


def tokenising(work: Tokenise) -> Handler:
    """Return the handler of a route that tokenises without generating.

    `work` runs in a thread; `--max-concurrent-requests` bounds how many such requests there are at a time.
    """

    async def handle(exchange: Exchange) -> None:
        body = await exchange.read_body()
        try:
            served = exchange.context.ready()
            with _place(exchange):
                answer = await exchange.unless_gone(_answer(exchange, served, work, body))
        finally:
            if len(body) > _HUGE:
                exchange.context.count_threads.start(return_freed_memory)
        await exchange.respond(200, answer)

    return handle


@contextlib.contextmanager
def _place(exchange: Exchange) -> Iterator[None]:
    """Hold one of the places of requests that only tokenise; the server does not end before it is left.

    There are as many as permits, but apart from them, as in TGI: clients count tokens to decide what to send,
    which does not become wrong because the server generates as much as it can. An API key that holds less
    than its share gets one even if other keys hold all of them.

    Raises:
        Overloaded, Unavailable: if there is no place; nothing is held then.
    """
    context, key = exchange.context, exchange.tenant
    num_places, by_key = context.settings.max_concurrent_requests, context.tokenising_keys
    share = 0 if key is None else num_places // len(by_key.keys() | {key})
    if by_key.total() >= num_places and by_key[key] >= share:
        raise Overloaded
    with admitted(exchange, 0):
        by_key[key] += 1
        try:
            yield
        finally:
            by_key[key] -= 1
            if not by_key[key]:
                del by_key[key]


async def _answer(exchange: Exchange, served: Served, work: Tokenise, body: bytes) -> bytes:
    """Return the answer; what waits for a thread does not begin if this is cancelled."""
    context = exchange.context
    # A large body may take ten seconds: such requests wait for each other, not others for them.
    threads = context.count_threads if exchange.is_large else context.text_threads
    answer = await threads.run_for(exchange.tenant, work, body, exchange)
    if isinstance(answer, WithImages):
        check_images([answer.images], context.settings.max_images)
        await load_images(exchange, served, answer.images)
        answer = await threads.run_for(exchange.tenant, answer.rest)
    return answer


def after_images(images: Images | None, count: Callable[[], bytes]) -> bytes | WithImages:
    """Return the result of `count`, at once or after images have been loaded."""
    return WithImages(images, count) if images else count()


def array_of(tokens: Iterable[Struct]) -> bytes:
    """Return tokens as a JSON array.

    Written in parts, because objects take several times the memory of their JSON, and the largest body has 4
    million tokens.
    """
    rest, parts = iter(tokens), []
    while part := list(islice(rest, _PART)):
        parts.append(msgspec.json.encode(part)[1:-1])
    return b"[" + b",".join(parts) + b"]"
