"""Slow work in threads: API keys take turns."""

from __future__ import annotations

import asyncio
import threading

from tgi_asgi.api.thread_pools import FairQueue, ThreadPool


async def test_a_tenant_waits_for_none_of_the_calls_that_another_has_queued() -> None:
    pool, go_on = ThreadPool(1, "test"), threading.Event()
    ended: list[str] = []

    async def call(tenant: str, name: str) -> None:
        await pool.run_for(tenant, go_on.wait)
        ended.append(name)

    async with asyncio.TaskGroup() as group:
        for number in range(20):
            group.create_task(call("a", f"a{number}"))
        await asyncio.sleep(0)
        for number in range(2):
            group.create_task(call("b", f"b{number}"))
        await asyncio.sleep(0)
        go_on.set()
    assert len(ended) == 22
    assert ended.index("b0") <= 4, "it waits for those that have begun, and at most one more"
    assert ended.index("b1") <= 6
    assert [name for name in ended if name[0] == "a"] == [f"a{number}" for number in range(20)]
    pool.close()


async def test_callers_that_are_cancelled_use_up_no_turn() -> None:
    queue = FairQueue(1)
    await queue.enter("a")
    waiting = [asyncio.create_task(queue.enter(tenant)) for tenant in "aabbc"]
    await asyncio.sleep(0)
    waiting[0].cancel()  # while it waits
    await asyncio.sleep(0)
    queue.leave()  # it is still a's turn
    waiting[1].cancel()  # before it learns of it
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert waiting[1].cancelled()
    assert [task.done() for task in waiting] == [True, True, True, False, False]
    for task in (waiting[4], waiting[3]):
        queue.leave()
        await task
    queue.leave()
    await queue.enter("d")


async def test_a_tenant_whose_callers_are_cancelled_waits_for_no_more_of_others() -> None:
    queue = FairQueue(1)
    await queue.enter("b")
    given_up = [asyncio.create_task(queue.enter("a")) for _ in range(5)]
    waiting = [asyncio.create_task(queue.enter(tenant)) for tenant in "abbb"]
    await asyncio.sleep(0)
    for task in given_up:
        task.cancel()
    await asyncio.wait(given_up)
    queue.leave()
    await asyncio.sleep(0)
    assert [task.done() for task in waiting] == [True, False, False, False]
    for task in waiting[1:]:
        queue.leave()
        await task
