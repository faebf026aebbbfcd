"""Permits that a request holds between its admission and the engine's taking over."""

from __future__ import annotations

from types import TracebackType

from tgi_asgi.types import Engine, Permit


class Admission:
    """Takes room for all of a request's prompts at once, and gives back what the engine did not take.

        with Admission(engine, n, num_prompts) as admission:
            channels = [engine.submit(request, admission.take()) for request in requests]

    Raises:
        Overloaded, Unavailable: there is no room; nothing is held then.
    """

    def __init__(self, engine: Engine, n: int, num_prompts: int = 1) -> None:
        self._permits: list[Permit] = []
        try:
            for _ in range(num_prompts):
                self._permits.append(engine.acquire(n))
        except BaseException:
            self.release()
            raise

    def take(self) -> Permit:
        """Return one permit, to be handed to the engine at once."""
        return self._permits.pop()

    def release(self) -> None:
        """Give back the permits that were not taken."""
        while self._permits:
            self._permits.pop().release()

    def __enter__(self) -> Admission:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
