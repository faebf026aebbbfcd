"""`Adapters`: loading, leases, capacity, removal, failures."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass, field

import pytest

from tests.support.waiting import LONGEST_S, until
from tgi_asgi.engine.adapters import Adapters, Lease
from tgi_asgi.errors import InvalidRequest, ModelLoadError, Overloaded, Unavailable, UnknownAdapter
from tgi_asgi.formats.sources import AdapterSource


@dataclass
class Weights:
    """The weights that the script below loads; live instances are counted."""

    digest: bytes
    weights: object = field(default_factory=object)
    rank: int = 8
    num_bytes: int = 1000


class Script:
    """A loader that tests can block and make fail."""

    def __init__(self) -> None:
        self.loaded: list[str] = []
        self.failures: dict[str, BaseException] = {}
        self.go_on = threading.Event()
        self.go_on.set()

    def __call__(self, source: AdapterSource) -> Weights:
        assert self.go_on.wait(10)
        if source.name in self.failures:
            raise self.failures[source.name]
        self.loaded.append(source.name)
        return Weights(source.location.encode())


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def sources(names: str) -> list[AdapterSource]:
    return [AdapterSource(name, f"/{name}") for name in names]


async def settled(adapters: Adapters, *names: str) -> None:
    """Wait until these adapters have been loaded."""
    await until(lambda: set(names) <= set(adapters.names))


async def test_an_adapter_is_loaded_once_and_its_key_is_of_its_contents() -> None:
    script = Script()
    adapters = Adapters(script, sources("ab"), max_loaded=4)
    adapters.start()
    await settled(adapters, "a", "b")
    first, second = await adapters.lease("a"), await adapters.lease("a")
    assert first.adapter is second.adapter
    assert first.adapter.key == b"/a".hex()
    assert sorted(script.loaded) == ["a", "b"]
    adapters.close()


async def test_names_of_one_content_share_its_weights() -> None:
    """A step may have a number of contents, and a device has as many places: names do not count."""
    adapters = Adapters(Script(), [AdapterSource(name, "/same") for name in "ab"], max_loaded=4)
    adapters.start()
    await settled(adapters, "a", "b")
    first, second = await adapters.lease("a"), await adapters.lease("b")
    assert first.adapter.key == second.adapter.key
    assert first.adapter.weights is second.adapter.weights
    removal = asyncio.create_task(adapters.remove("a"))
    await asyncio.sleep(0)
    await adapters.add("c", "/same")
    assert (await adapters.lease("c")).adapter.weights is first.adapter.weights
    first.release()
    await removal
    adapters.close()


async def test_one_that_loads_for_the_first_time_is_not_there_yet() -> None:
    script = Script()
    script.go_on.clear()
    adapters = Adapters(script, sources("a"), max_loaded=4)
    adapters.start()
    await asyncio.sleep(0)
    assert "a" in adapters and adapters.names == []
    with pytest.raises(Unavailable, match="'a' is loading") as refused:
        await adapters.lease("a")
    assert refused.value.retry_after_s > 0
    script.go_on.set()
    await settled(adapters, "a")
    assert (await adapters.lease("a")).adapter.name == "a"
    with pytest.raises(UnknownAdapter):
        await adapters.lease("b")
    adapters.close()


async def test_the_one_used_least_recently_leaves_and_is_read_again() -> None:
    script = Script()
    adapters = Adapters(script, sources("ab"), max_loaded=2)
    adapters.start()
    await settled(adapters, "a", "b")
    (await adapters.lease("b")).release()
    (await adapters.lease("a")).release()
    await adapters.add("c", "/c")
    assert adapters.num_loaded == 2
    assert adapters.names == ["a", "b", "c"], "an evicted adapter must still be listed"
    lease = await adapters.lease("b")  # waits until b has been read again
    assert lease.adapter.key == b"/b".hex()
    assert script.loaded[2:] == ["c", "b"]
    assert adapters.num_loaded == 2
    adapters.close()


async def test_one_that_a_request_waits_for_does_not_leave_before_the_request_has_it() -> None:
    """If memory is short, the next adapter to be read must not take the place of one that was just read."""
    script, asked = Script(), list[asyncio.Task[Lease]]()

    def clock() -> float:  # read at the end of a read, before the request that waits for it goes on
        if waiting is not None and not asked:
            asked.append(asyncio.create_task(adapters.lease("b")))
        return 0.0

    waiting: asyncio.Task[Lease] | None = None
    adapters = Adapters(script, sources("ab"), max_loaded=1, clock=clock)
    adapters.start()
    await settled(adapters, "a", "b")  # b has replaced a
    script.go_on.clear()
    reading = asyncio.create_task(adapters.lease("a"))
    await asyncio.sleep(0.01)
    waiting = reading
    script.go_on.set()
    assert (await waiting).adapter.name == "a"
    with pytest.raises(Overloaded, match="All 1 adapters"):
        await asked[0]
    adapters.close()


async def test_requests_that_wait_for_the_same_one_read_it_once_and_then_let_it_go() -> None:
    script = Script()
    adapters = Adapters(script, sources("ab"), max_loaded=1)
    adapters.start()
    await settled(adapters, "a", "b")  # b has replaced a
    script.go_on.clear()
    waiting = [asyncio.create_task(adapters.lease("a")) for _ in range(2)]
    await asyncio.sleep(0.01)
    script.go_on.set()
    for lease in await asyncio.gather(*waiting):
        lease.release()
    assert script.loaded == ["a", "b", "a"]
    await asyncio.wait_for(adapters.remove("a"), LONGEST_S)
    adapters.close()


async def test_one_that_is_removed_while_it_is_read_is_counted_until_then() -> None:
    script = Script()
    adapters = Adapters(script, sources("a"), max_loaded=1)
    script.go_on.clear()
    adapters.start()
    await asyncio.sleep(0.01)
    removal = asyncio.create_task(adapters.remove("a"))
    await asyncio.sleep(0.01)
    assert not removal.done() and adapters.num_loaded == 1
    script.go_on.set()
    await removal
    assert adapters.num_loaded == 0
    adapters.close()


async def test_closing_cancels_what_is_being_read() -> None:
    script = Script()
    adapters = Adapters(script, sources("a"), max_loaded=1)
    script.go_on.clear()
    reading = adapters.start()
    await asyncio.sleep(0.01)
    adapters.close()
    script.go_on.set()
    await asyncio.wait({reading})
    assert reading.cancelled()


async def test_what_is_in_use_does_not_leave() -> None:
    script = Script()
    adapters = Adapters(script, sources("a"), max_loaded=1)
    adapters.start()
    await settled(adapters, "a")
    lease = await adapters.lease("a")
    with pytest.raises(Overloaded, match="All 1 adapters"):
        await adapters.add("b", "/b")
    assert "b" not in adapters
    lease.release()
    lease.release()
    await adapters.add("b", "/b")
    with pytest.raises(InvalidRequest, match="taken"):
        await adapters.add("b", "/elsewhere")
    adapters.close()


async def test_a_removed_adapter_is_unknown_at_once_and_stays_until_it_is_let_go_of() -> None:
    adapters = Adapters(Script(), sources("a"), max_loaded=1)
    adapters.start()
    await settled(adapters, "a")
    lease = await adapters.lease("a")
    removal = asyncio.create_task(adapters.remove("a"))
    await asyncio.sleep(0.01)
    assert "a" not in adapters and not removal.done()
    assert lease.adapter.name == "a"
    with pytest.raises(UnknownAdapter):
        await adapters.remove("a")
    lease.release()
    await removal
    assert adapters.num_loaded == 0
    adapters.close()


async def test_a_broken_one_fails_alone_and_is_tried_again_later(
    caplog: pytest.LogCaptureFixture,
) -> None:
    script, clock = Script(), Clock()
    script.failures = {"a": ModelLoadError("tensor 'x' is short"), "c": OSError("disk")}
    adapters = Adapters(script, sources("ab"), max_loaded=4, clock=clock)
    adapters.start()
    await settled(adapters, "b")
    assert "tensor 'x' is short" in caplog.text
    for _ in range(2):
        with pytest.raises(InvalidRequest, match="'a' could not be loaded") as refused:
            await adapters.lease("a")
        assert "tensor" not in refused.value.message, "details belong in the log"
    del script.failures["a"]
    with pytest.raises(InvalidRequest):
        await adapters.lease("a")  # too soon for another attempt
    clock.now += 31
    assert (await adapters.lease("a")).adapter.name == "a"
    with pytest.raises(OSError, match="disk"):
        await adapters.add("c", "/c")
    assert "c" not in adapters
    adapters.close()


async def test_one_that_takes_long_after_a_failure_is_loading_and_has_not_failed_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tgi_asgi.engine.adapters._WAIT_S", 0.01)
    script, clock = Script(), Clock()
    script.failures["a"] = ModelLoadError("the disk is away")
    adapters = Adapters(script, sources("a"), max_loaded=2, clock=clock)
    await adapters.start()
    with pytest.raises(InvalidRequest):
        await adapters.lease("a")
    script.failures.clear()
    script.go_on.clear()
    clock.now += 31
    with pytest.raises(Unavailable, match="is loading"):
        await adapters.lease("a")
    script.go_on.set()
    await settled(adapters, "a")
    assert (await adapters.lease("a")).adapter.name == "a"
    adapters.close()


async def test_the_administrator_is_told_why_an_adapter_cannot_be_served() -> None:
    script = Script()
    script.failures["a"] = ModelLoadError("tensor 'x' is short")
    adapters = Adapters(script, max_loaded=4, taken=("base",))
    with pytest.raises(InvalidRequest, match="cannot be served: tensor 'x' is short"):
        await adapters.add("a", "/a")
    with pytest.raises(InvalidRequest, match="taken"):
        await adapters.add("base", "/a")
    assert adapters.names == []
    adapters.close()


async def test_a_replacement_takes_the_name_once_it_has_been_read() -> None:
    script = Script()
    adapters = Adapters(script, sources("a"), max_loaded=4)
    adapters.start()
    await settled(adapters, "a")
    old = await adapters.lease("a")
    script.go_on.clear()
    replacement = asyncio.create_task(adapters.replace("a", "/new"))
    await asyncio.sleep(0.01)
    assert adapters.names == ["a"]
    (await adapters.lease("a")).release()
    meanwhile = await adapters.lease("a")
    assert meanwhile.adapter is old.adapter, "the old adapter must serve while the new one is read"
    script.go_on.set()
    while (lease := await adapters.lease("a")).adapter is old.adapter:
        lease.release()
        await asyncio.sleep(0.001)
    assert lease.adapter.key == b"/new".hex()
    assert not replacement.done() and adapters.num_loaded == 2
    old.release()
    await asyncio.sleep(0.01)
    assert not replacement.done(), "another request still holds a lease"
    meanwhile.release()
    await replacement
    assert adapters.num_loaded == 1
    adapters.close()


async def test_a_replacement_that_cannot_be_read_leaves_the_old_one() -> None:
    script = Script()
    adapters = Adapters(script, sources("a"), max_loaded=4)
    adapters.start()
    await settled(adapters, "a")
    script.failures["a"] = ModelLoadError("no such directory")
    with pytest.raises(InvalidRequest, match="cannot be served: no such directory"):
        await adapters.replace("a", "/nowhere")
    assert (await adapters.lease("a")).adapter.key == b"/a".hex()
    assert adapters.num_loaded == 1
    script.failures["b"] = ModelLoadError("no such directory")
    with pytest.raises(InvalidRequest, match="cannot be served"):
        await adapters.replace("b", "/nowhere")  # there is no old adapter, so this behaves like `add`
    assert "b" not in adapters
    adapters.close()


async def test_a_replacement_of_a_name_that_is_unloaded_meanwhile_is_dropped() -> None:
    script = Script()
    adapters = Adapters(script, sources("a"), max_loaded=4)
    adapters.start()
    await settled(adapters, "a")
    script.go_on.clear()
    replacement = asyncio.create_task(adapters.replace("a", "/new"))
    await asyncio.sleep(0.01)
    await adapters.remove("a")
    script.go_on.set()
    with pytest.raises(UnknownAdapter) as refused:
        await replacement
    assert refused.value.param == "lora_name"
    assert adapters.names == [] and adapters.num_loaded == 0
    adapters.close()


async def test_a_request_that_waits_for_one_that_is_replaced_gets_the_new_one() -> None:
    script = Script()
    adapters = Adapters(script, sources("ab"), max_loaded=1)
    adapters.start()
    await settled(adapters, "a", "b")  # b is in memory
    await adapters.replace("b", "/old")
    script.go_on.clear()
    waiting = asyncio.create_task(adapters.lease("a"))
    await asyncio.sleep(0.01)
    adapters._max_loaded = 2  # so that the replacement is read afterwards
    replacement = asyncio.create_task(adapters.replace("a", "/new"))
    await asyncio.sleep(0.01)
    script.go_on.set()
    assert (await waiting).adapter.key in (b"/a".hex(), b"/new".hex())
    await asyncio.sleep(0.01)
    assert (await adapters.lease("a")).adapter.key == b"/new".hex()
    replacement.cancel()
    adapters.close()


async def test_one_that_fails_does_not_take_the_name_from_its_successor() -> None:
    script = Script()
    script.go_on.clear()
    script.failures["r"] = ModelLoadError("values that are not finite")
    adapters = Adapters(script, max_loaded=4)
    first = asyncio.create_task(adapters.add("r", "/bad"))
    await asyncio.sleep(0.01)
    removal = asyncio.create_task(adapters.remove("r"))
    await asyncio.sleep(0.01)
    second = asyncio.create_task(adapters.add("r", "/good"))
    await asyncio.sleep(0.01)
    real, calls = script.failures, 0

    class Once(dict[str, BaseException]):
        def __contains__(self, name: object) -> bool:
            nonlocal calls
            calls += 1
            return calls == 1

    script.failures = Once(real)
    script.go_on.set()
    with pytest.raises(InvalidRequest, match="not finite"):
        await first
    await second
    await removal
    assert adapters.names == ["r"]
    assert (await adapters.lease("r")).adapter.key == b"/good".hex()
    adapters.close()


async def test_a_failed_add_whose_caller_has_gone_leaves_no_name() -> None:
    script = Script()
    script.go_on.clear()
    script.failures["a"] = ModelLoadError("damaged")
    adapters = Adapters(script, max_loaded=4)
    adding = asyncio.create_task(adapters.add("a", "/a"))
    await asyncio.sleep(0.01)
    adding.cancel()
    await asyncio.wait({adding})
    script.go_on.set()
    while "a" in adapters:
        await asyncio.sleep(0.001)
    del script.failures["a"]
    await adapters.add("a", "/a")
    adapters.close()


class Panic(BaseException):
    """What a library written in Rust raises; it is not an `Exception`."""


async def test_one_whose_reader_panics_leaves_no_name() -> None:
    script = Script()
    script.failures["a"] = Panic()
    adapters = Adapters(script, max_loaded=4)
    with pytest.raises(Panic):
        await adapters.add("a", "/a")
    script.failures.clear()
    await adapters.add("a", "/a")
    assert adapters.names == ["a"]
    adapters.close()


async def test_those_that_leave_are_counted_until_nobody_uses_them() -> None:
    adapters = Adapters(Script(), max_loaded=2)
    leases, removals = [], []
    for name in "ab":
        await adapters.add(name, f"/{name}")
        leases.append(await adapters.lease(name))
        removals.append(asyncio.create_task(adapters.remove(name)))
        await asyncio.sleep(0.001)
    assert adapters.names == [] and adapters.num_loaded == 2
    with pytest.raises(Overloaded, match="All 2 adapters"):
        await adapters.add("c", "/c")
    removals[0].cancel()  # the caller has gone; the removal continues
    leases[0].release()
    await asyncio.sleep(0.01)
    assert adapters.num_loaded == 1
    await adapters.add("c", "/c")
    leases[1].release()
    await removals[1]
    assert adapters.num_loaded == 1
    adapters.close()


async def test_more_than_memory_holds_are_all_read_in_turn_and_the_broken_ones_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    script = Script()
    script.failures["x"] = ModelLoadError("tensor 'y' is short")
    adapters = Adapters(script, sources("xabcd"), max_loaded=2)
    adapters.start()
    with pytest.raises(Unavailable, match="'d' is loading"):
        await adapters.lease("d")
    await settled(adapters, *"abcd")
    assert script.loaded == [*"abcd"]
    assert adapters.names == [*"abcd"] and adapters.num_loaded == 2
    assert "tensor 'y' is short" in caplog.text
    assert (await adapters.lease("a")).adapter.name == "a"
    adapters.close()


async def test_one_that_found_no_room_at_the_start_is_overloaded_and_then_read() -> None:
    script = Script()
    adapters = Adapters(script, sources("ab"), max_loaded=1)
    script.go_on.clear()
    adapters.start()
    await asyncio.sleep(0.01)
    script.go_on.set()
    while "a" not in adapters.names:
        await asyncio.sleep(0)
    lease = await adapters.lease("a")  # b may already have evicted it: then a is read again
    await asyncio.sleep(0.02)
    for _ in range(3):
        with pytest.raises(Overloaded, match="All 1 adapters"):
            await adapters.lease("b")
    lease.release()
    assert (await adapters.lease("b")).adapter.name == "b"
    adapters.close()
