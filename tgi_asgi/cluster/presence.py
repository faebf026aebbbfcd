"""State shared by a process's routers and its ingress: which replicas exist, and which one a call is for.

Separate from `routing.py`, of which Ray makes copies: this module exists once per process.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Listener = Callable[[Sequence[str]], None]  # called from any thread, one call at a time; must not block


@dataclass(frozen=True, slots=True)
class Wanted:
    """First argument of every call: the replicas that it is for, best first; any other is worse."""

    order: tuple[str, ...] = ()


class Presence:
    """Known replicas of each deployment (application name, deployment name), as last reported by routers."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[tuple[str, str], tuple[str, ...]] = {}
        self._listeners: dict[tuple[str, str], list[Listener]] = {}

    def publish(self, deployment: tuple[str, str], replicas: Sequence[str]) -> None:
        """Record a router's current replicas and notify the listeners."""
        with self._lock:  # also during the calls, so that no listener ends with an older list
            self._known[deployment] = tuple(replicas)
            for listener in self._listeners.get(deployment, ()):
                listener(replicas)

    def subscribe(self, deployment: tuple[str, str], listener: Listener) -> None:
        """Call the listener with the known replicas now and on every change."""
        with self._lock:
            self._listeners.setdefault(deployment, []).append(listener)
            listener(self._known.get(deployment, ()))


shared = Presence()
