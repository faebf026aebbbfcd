"""How late the event loop is: the one figure that tells whether something blocks it."""

from __future__ import annotations

import asyncio

from tgi_asgi.engine.stats import Histogram

INTERVAL_S = 0.1


class LoopLag:
    """Measure, ten times a second, how much later than due a timer runs. `stop` ends it."""

    def __init__(self, histogram: Histogram) -> None:
        self._histogram = histogram
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Begin, on the running loop."""
        loop = asyncio.get_running_loop()
        due_s = loop.time() + INTERVAL_S
        self._timer = loop.call_at(due_s, self._tick, loop, due_s)

    def stop(self) -> None:
        """End. Idempotent."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _tick(self, loop: asyncio.AbstractEventLoop, due_s: float) -> None:
        self._histogram.observe(max(loop.time() - due_s, 0.0))
        self.start()
