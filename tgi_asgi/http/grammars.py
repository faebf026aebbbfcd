"""Compile the grammars of requests, off the event loop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tgi_asgi.errors import InvalidRequest
from tgi_asgi.http.context import ServerContext
from tgi_asgi.text.constrain.source import GrammarSource

if TYPE_CHECKING:
    from tgi_asgi.text.constrain.grammar import Grammar


async def compile_grammar(context: ServerContext, source: GrammarSource) -> Grammar:
    """Compile in a worker thread.

    Raises:
        InvalidRequest: grammars are switched off, or this one is refused.
    """
    if context.settings.disable_grammar_support:
        raise InvalidRequest("grammar is not supported")
    return await context.in_thread(context.grammar_compiler().compile, source)


@contextmanager
def naming(param: str) -> Iterator[None]:
    """Say in a refusal of a grammar which field it came from."""
    try:
        yield
    except InvalidRequest as error:
        if error.param is not None:
            raise
        raise InvalidRequest(f"`{param}`: {error.message}", param=param) from None
