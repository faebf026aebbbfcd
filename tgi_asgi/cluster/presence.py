"""What a process' routers and its ingress tell each other: who is there, and whom a call is for.

Apart from `routing.py`, which Ray copies to wherever it is needed: this module is there once a process.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Listener = Callable[[Sequence[str]], None]  # called from any thread


@dataclass(frozen=True, slots=True)
class Wanted:
    """The first argument of every call: the replicas that it is for, the best first; any other is worse."""

    order: tuple[str, ...] = ()


class Presence:
    """Who is there of each deployment (its application's name and its own), as routers have heard last."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[tuple[str, str], tuple[str, ...]] = {}
        self._listeners: dict[tuple[str, str], list[Listener]] = {}

    def tell(self, deployment: tuple[str, str], replicas: Sequence[str]) -> None:
        """Take what a router has heard."""
        with self._lock:
            self._known[deployment] = tuple(replicas)
            listeners = list(self._listeners.get(deployment, ()))
        for listener in listeners:
            listener(replicas)

    def listen(self, deployment: tuple[str, str], listener: Listener) -> None:
        """Hear of changes from now on, first of what is known."""
        with self._lock:
            self._listeners.setdefault(deployment, []).append(listener)
            known = self._known.get(deployment, ())
        listener(known)


shared = Presence()
