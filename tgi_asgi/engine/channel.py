"""A request's mailbox: the engine pushes events, and whoever wants them attaches a sink."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from tgi_asgi.engine.outbox import Outbox
from tgi_asgi.engine.output import ChoiceOutput
from tgi_asgi.engine.sequence import Sequence
from tgi_asgi.errors import TgiError
from tgi_asgi.types import GenerationRequest, Permit, RequestStats, TokenEvent


class RequestChannel(Outbox):
    """What the engine knows of a request, and where its events wait until they are taken.

    `attach` and `cancel` are for the taker; everything else is the engine's.
    """

    __slots__ = (
        "_has_begun", "_is_ended", "_on_cancel", "is_cancelled", "num_open", "outputs", "permit", "refusal",
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
        self.refusal: TgiError | None = None  # why it will not run (on) after all
        self.timer: asyncio.TimerHandle | None = None  # of its wait for the first step
        self._on_cancel = on_cancel
        self._is_ended = False
        self._has_begun = False

    @property
    def is_ended(self) -> bool:
        """Whether the last event or the error is here, taken or not."""
        return self._is_ended

    @property
    def is_urgent(self) -> bool:
        """Whether somebody waits for what is new: it is the first token, or the end."""
        return self._is_ended or not self._has_begun

    def cancel(self) -> None:
        """Give the request up; it ends with `IncompleteGeneration` unless it has ended already."""
        if not self.is_cancelled and not self._is_ended:
            self.is_cancelled = True
            self._on_cancel(self)

    def refuse(self, error: TgiError) -> bool:
        """End the request with an error, its taker's wish or not; tell whether it had not ended yet.

        The room of one that has not run is free at once.
        """
        if self.is_cancelled or self._is_ended or self.refusal is not None:
            return False
        self.refusal = error
        if self.stats.scheduled_s is None:
            self.permit.release()
        self._on_cancel(self)
        return True

    def push(self, event: TokenEvent) -> None:
        """Add an event; it is seen at the next `flush`."""
        self._events.append(event)
        if event.finish is not None:
            self.num_open -= 1
            self.stats.finishes.append(event.finish)
            if self.num_open == 0:
                self._is_ended = True

    def fail(self, error: TgiError) -> None:
        """End the request with an error, behind the events that wait."""
        if not self._is_ended:
            self._is_ended = True
            self._error = error
            self.flush()

    def flush(self) -> None:
        """Hand on what is new: one call of the sink."""
        self._has_begun |= bool(self._events)
        super().flush()
