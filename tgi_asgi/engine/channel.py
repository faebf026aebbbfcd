"""A request's mailbox: the engine pushes events, and the consumer attaches a sink."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from tgi_asgi.engine.outbox import Outbox
from tgi_asgi.engine.output import ChoiceOutput
from tgi_asgi.engine.sequence import Sequence
from tgi_asgi.errors import TgiError
from tgi_asgi.types import GenerationRequest, Permit, RequestStats, TokenEvent


class RequestChannel(Outbox):
    """The engine's record of a request, and the buffer for its events.

    `attach` and `cancel` are for the consumer; everything else is for the engine.
    """

    __slots__ = (
        "_has_begun", "_on_cancel", "is_cancelled", "is_ended", "num_open", "outputs", "permit", "refusal",
        "sequences", "stats", "timer",
    )  # fmt: skip

    def __init__(
        self,
        request: GenerationRequest,
        permit: Permit,
        on_cancel: Callable[[RequestChannel], None],
        arrival_s: float,
    ) -> None:
        super().__init__(request)
        self.stats = RequestStats(arrival_s)
        self.permit = permit
        self.sequences: list[Sequence] = []
        self.outputs: list[ChoiceOutput] = []
        self.num_open = request.n
        self.is_cancelled = False
        self.refusal: TgiError | None = None  # why it will not start or continue
        self.timer: asyncio.TimerHandle | None = None  # limits its wait for the first step
        self._on_cancel = on_cancel
        self.is_ended = False  # the last event or the error is here, delivered or not
        self._has_begun = False

    @property
    def is_urgent(self) -> bool:
        """Whether the consumer waits for the new events: they hold the first token or the end."""
        return self.is_ended or not self._has_begun

    def cancel(self) -> None:
        """Cancel the request; it ends with `IncompleteGeneration` unless it has ended already."""
        if not self.is_cancelled and not self.is_ended:
            self.is_cancelled = True
            self._on_cancel(self)

    def refuse(self, error: TgiError) -> bool:
        """End the request with an error on the server's side; return whether it was still open.

        The permit of a request that has not run is released at once.
        """
        if self.is_cancelled or self.is_ended or self.refusal is not None:
            return False
        self.refusal = error
        if self.stats.scheduled_s is None:
            self.permit.release()
        self._on_cancel(self)
        return True

    def push(self, event: TokenEvent) -> None:
        """Add an event; it is delivered at the next `flush`."""
        self._events.append(event)
        if event.finish is not None:
            self.num_open -= 1
            self.stats.finishes.append(event.finish)
            if self.num_open == 0:
                self.is_ended = True

    def fail(self, error: TgiError) -> None:
        """End the request with an error, after the events that are waiting."""
        if not self.is_ended:
            self.is_ended = True
            self._error = error
            self.flush()

    def flush(self) -> None:
        """Pass new events on, in one call of the sink."""
        self._has_begun |= bool(self._events)
        super().flush()
        if self.is_ended and self._error is None:  # nothing follows
            self._sink = None  # it knows this channel: a cycle would keep the request's adapter in memory
