"""A request's events on their way to their consumer, from an engine in this process or in another."""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod

from tgi_asgi.errors import TgiError
from tgi_asgi.types import GenerationRequest, Sink, TokenEvent

logger = logging.getLogger(__name__)


class Outbox(ABC):
    """A buffer where events wait until a sink is attached, and from then on until the next `flush`."""

    __slots__ = ("_error", "_events", "_sink", "request")

    def __init__(self, request: GenerationRequest) -> None:
        self.request = request
        self._events: list[TokenEvent] = []
        self._error: TgiError | None = None
        self._sink: Sink | None = None

    def attach(self, sink: Sink) -> None:
        """Call `sink` from now on, first with the events that are waiting."""
        assert self._sink is None, "a channel takes one sink"
        self._sink = sink
        self.flush()

    @abstractmethod
    def cancel(self) -> None:
        """Cancel the request."""

    def flush(self) -> None:
        """Pass new events on, in one call of the sink."""
        if self._sink is None:
            return
        # A faulty sink affects only its own request; no other request may lose tokens because of it.
        try:
            if self._events:
                events, self._events = self._events, []
                self._sink.on_events(events)
            if self._error is not None:
                error, self._error = self._error, None
                self._sink.on_error(error)
        except (Exception, asyncio.CancelledError):  # not the caller's: nothing is awaited here
            logger.exception("request %s: its sink raised; the request is cancelled", self.request.request_id)
            self.cancel()
