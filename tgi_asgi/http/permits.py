"""Permits that a request holds between its admission and the engine's taking over."""

from __future__ import annotations

from types import TracebackType

from tgi_asgi.http.exchange import Exchange
from tgi_asgi.types import Channel, Engine, GenerationRequest, Permit


class Permits:
    """Takes room for all of a request's prompts at once, and gives back what the engine did not take.

        with Permits(exchange, engine, n, num_prompts) as permits:
            channels = [permits.submit(request) for request in requests]

    Raises:
        Overloaded, Unavailable: there is no room; nothing is held then.
    """

    def __init__(self, exchange: Exchange, engine: Engine, n: int, num_prompts: int = 1) -> None:
        self._engine = engine
        self._permits: list[Permit] = []
        try:
            for _ in range(num_prompts):
                self._permits.append(engine.acquire(n, exchange.tenant))
        except BaseException:
            self.release()
            raise

    def submit(self, request: GenerationRequest) -> Channel:
        """Hand a request to the engine, with one of the permits."""
        channel = self._engine.submit(request, self._permits[-1])
        self._permits.pop()
        return channel

    def release(self) -> None:
        """Give back the permits that were not used."""
        while self._permits:
            self._permits.pop().release()

    def __enter__(self) -> Permits:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
