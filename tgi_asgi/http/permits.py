"""Permits that a request holds between its admission and the engine's taking over."""

from __future__ import annotations

from types import TracebackType

from tgi_asgi.http.exchange import Exchange
from tgi_asgi.types import Channel, Engine, GenerationRequest


class Permits:
    """Takes room for all choices of a call at once, and gives back what the engine did not take.

        with Permits(exchange, engine, sum(request.n for request in requests)) as permits:
            channels = [permits.submit(request) for request in requests]

    At once, because to find room others may have to go, and they should not for a call that is refused.

    Raises:
        Overloaded, Unavailable: there is no room; nothing is held then.
    """

    def __init__(self, exchange: Exchange, engine: Engine, num_choices: int) -> None:
        self._engine = engine
        self._permit = engine.acquire(num_choices, exchange.tenant)

    def submit(self, request: GenerationRequest) -> Channel:
        """Hand a request to the engine, with its part of the room."""
        part = self._permit.split(request.n)
        try:
            return self._engine.submit(request, part)
        except BaseException:
            part.release()
            raise

    def __enter__(self) -> Permits:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._permit.release()
