"""The lifecycle of a request that only counts or shows tokens: read, take a permit, work in a thread, answer.

    route = Route("POST", "/tokenize", tokenising(tokenize), ...)

`tokenize` is a function from a body to the answer's, or to work that remains once images are loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tgi_asgi.api.call import Images
from tgi_asgi.api.context import Served
from tgi_asgi.api.exchange import Exchange
from tgi_asgi.api.images import check_images, load_images
from tgi_asgi.api.life import Handler, admitted
from tgi_asgi.system import return_freed_memory

_HUGE = 1 << 20  # bytes of a body whose tokens take so much memory that the system gets it back


@dataclass(frozen=True, slots=True)
class WithImages:
    """Work that continues once a prompt's images have been loaded."""

    images: Images
    rest: Callable[[], bytes]


def tokenising(work: Callable[[bytes, Exchange], bytes | WithImages]) -> Handler:
    """Return the handler of a route that tokenises without generating; `work` turns a body into the answer.

    `work` runs in a thread, under a permit, because tokenising is subject to admission.
    """

    async def handle(exchange: Exchange) -> None:
        body = await exchange.read_body()
        try:
            served = exchange.context.ready()
            with admitted(exchange, 1):
                answer = await exchange.unless_gone(_answer(exchange, served, work, body))
        finally:
            if len(body) > _HUGE:
                exchange.context.count_threads.start(return_freed_memory)
        await exchange.respond(200, answer)

    return handle


async def _answer(
    exchange: Exchange, served: Served, work: Callable[[bytes, Exchange], bytes | WithImages], body: bytes
) -> bytes:
    """Return the answer; what waits for a thread does not begin if this is cancelled."""
    context = exchange.context
    # A large body may take ten seconds: such requests wait for each other, not others for them.
    threads = context.count_threads if exchange.is_large else context.text_threads
    answer = await threads.run(work, body, exchange)
    if isinstance(answer, WithImages):
        check_images([answer.images], context.settings.max_images)
        await load_images(exchange, served, answer.images)
        answer = await threads.run(answer.rest)
    return answer


def after_images(images: Images | None, count: Callable[[], bytes]) -> bytes | WithImages:
    """Return the result of `count`, at once or after images have been loaded."""
    return WithImages(images, count) if images is not None and images.sources else count()
