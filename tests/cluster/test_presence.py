"""Which replicas exist: what routers report, in their threads, to the ingress of their process."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from tgi_asgi.cluster.presence import Presence

MODEL = ("app", "model")


def test_a_listener_gets_what_is_known_and_every_change() -> None:
    presence, seen = Presence(), list[Sequence[str]]()
    presence.publish(MODEL, ["a"])
    presence.publish(("app", "other model"), ["x"])
    presence.subscribe(MODEL, seen.append)
    presence.publish(MODEL, ["a", "b"])
    assert list(map(list, seen)) == [["a"], ["a", "b"]]


def test_a_change_while_a_listener_subscribes_is_not_overwritten() -> None:
    presence, seen = Presence(), list[Sequence[str]]()
    router = threading.Thread(target=presence.publish, args=(MODEL, ["a"]))

    def listen(replicas: Sequence[str]) -> None:
        if not router.ident:  # the first call, with the replicas known so far
            router.start()
            router.join(0.05)  # long enough for a report that does not wait for this call to end
        seen.append(replicas)

    presence.subscribe(MODEL, listen)
    router.join()
    assert list(map(list, seen)) == [[], ["a"]]
