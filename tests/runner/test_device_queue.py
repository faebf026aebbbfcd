"""The queue of a device's steps: order, failures, shutdown, and what it refuses."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.cuda.emulated_device import Prepared
from tests.support.waiting import LONGEST_S
from tgi_asgi.ops import DeviceQueue, DeviceRows, RowLimits
from tgi_asgi.runner.cuda_buffers import host_result, result_bytes, result_firsts
from tgi_asgi.runner.plan import StepRow

LIMITS = RowLimits(
    vocab_size=99, num_blocks=9, block_size=4, max_context=64, max_rows=8, max_tokens=32, windows=[None]
)


def rows_of(*samples: bool) -> DeviceRows:
    """Return rows that decode and then one of a prompt, which sample or not."""
    rows = DeviceRows(StepRow, LIMITS, False)
    *decodes, prompt = [StepRow(slot, None, 3, [[slot]], samples=each) for slot, each in enumerate(samples)]
    rows.read([*decodes, StepRow(prompt.slot, [1, 2], 0, [[7]], samples=prompt.samples)])
    return rows


def push(queue: DeviceQueue, number: int, prepared: Prepared, rows: DeviceRows, **changes: Any) -> None:
    given: dict[str, Any] = {
        "calls": prepared.address, "num_decodes": 4, "results": np.zeros(result_bytes(8, 2), np.uint8),
        "firsts": result_firsts(8, 2), "num_rows": 8, "max_top": 2,
    }  # fmt: skip
    queue.push_prepared(number, owner=prepared, rows=rows, **given | changes)


def calls_of(submit: Callable[[], None] = lambda: None, wait: Callable[[], None] = lambda: None) -> Prepared:
    return Prepared(submit, wait)


def test_results_are_those_of_the_rows_that_sample() -> None:
    """Two rows decode, in a graph of four decodes; the row of a prompt comes behind the padding."""
    memory = np.full(result_bytes(8, 2), 0xAB, np.uint8)
    queue = DeviceQueue()

    def sample() -> None:
        result = host_result(memory, 8, 2)
        result.token_ids[:] = np.arange(8) + 10
        result.is_finite[:] = np.arange(8) != 4
        result.logprobs[:] = np.where(np.arange(8) % 2 == 0, -np.arange(8) / 4, np.nan)
        result.top_ids[:] = np.arange(16).reshape(8, 2)
        result.top_logprobs[:] = -np.arange(16).reshape(8, 2) / 8
        result.num_top[:] = [9, 0, 0, 0, 1, 0, 0, 0]  # more than there is space for

    push(queue, 3, calls_of(wait=sample), rows_of(True, False, True), results=memory)
    queue.close()
    assert queue.take() is None
    queue.close_launched()
    assert queue.next() is None
    first = (10, 0.0, [(0, 0.0), (1, -0.125)], True)
    assert queue.done() == [(3, ([first, None, (14, -1.0, [(8, -1.0)], False)], {}, (0, 0)))]
    assert queue.done() == []


def test_steps_are_launched_awaited_and_returned_in_order() -> None:
    queue, seen = DeviceQueue(), list[tuple[str, int]]()
    for number in range(4):
        if number == 2:
            queue.push(number)
            continue
        calls = (lambda number=number, name=name: seen.append((name, number)) for name in ("launch", "wait"))
        push(queue, number, calls_of(*calls), rows_of(True, True))
    assert queue.take() == (2, None)
    assert not queue.is_idle
    queue.launched(2)
    queue.close()
    assert queue.take() is None
    queue.close_launched()
    assert queue.next() == (2, None)
    queue.finish(2)
    assert queue.next() is None
    assert queue.is_idle
    queue.wait_until_idle()
    assert seen == [("launch", 0), ("launch", 1), ("launch", 3), ("wait", 0), ("wait", 1), ("wait", 3)]
    assert [(number, outcome is None) for number, outcome in queue.done()] == [
        (0, False), (1, False), (2, True), (3, False),
    ]  # fmt: skip
    with pytest.raises(RuntimeError, match="closed"):
        queue.push(4)


@pytest.mark.parametrize("call", ["submit", "wait"])
def test_a_call_that_fails_is_told_to_the_thread_that_made_it(call: str) -> None:
    def fail() -> None:
        raise ValueError("no such device")

    queue = DeviceQueue()
    push(queue, 5, calls_of(**{call: fail}), rows_of(True, True))
    push(queue, 6, calls_of(), rows_of(True, True))
    queue.close()
    if call == "submit":
        assert queue.take() == (5, "no such device")
        queue.launched(5)
    assert queue.take() is None
    queue.close_launched()
    assert queue.next() == (5, None if call == "submit" else "no such device")
    queue.finish(5)
    assert queue.next() is None
    assert [(number, outcome is None) for number, outcome in queue.done()] == [(5, True), (6, False)]


def test_other_threads_run_while_calls_are_made() -> None:
    """The launcher's and the waiter's loops wait for each other and for the event loop's thread."""
    queue, begun = DeviceQueue(), threading.Event()
    numbers: dict[str, list[Any]] = {"take": [], "next": []}

    def work(name: str) -> None:
        while (found := getattr(queue, name)()) is not None:
            numbers[name].append(found)
            (queue.launched if name == "take" else queue.finish)(found[0])
        if name == "take":
            queue.close_launched()

    threads = [threading.Thread(target=work, args=(name,)) for name in numbers]
    for thread in threads:
        thread.start()
    libc = ctypes.CDLL(None)
    push(queue, 0, calls_of(begun.set, lambda: libc.usleep(2000)), rows_of(True, True))
    assert begun.wait(LONGEST_S)
    queue.push(1)
    queue.close()
    for thread in threads:
        thread.join(LONGEST_S)
        assert not thread.is_alive()
    assert numbers == {"take": [(1, None)], "next": [(1, None)]}
    assert [number for number, _ in queue.done()] == [0, 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"calls": 0}, "has calls"),
        ({"num_decodes": 1}, "do not fit"),
        ({"num_decodes": 8}, "do not fit"),
        ({"num_rows": 9}, "result"),
        ({"num_rows": -1}, "must have less"),
        ({"max_top": 2**31}, "must have less"),
        ({"firsts": (0, 32, 40, 72, 136, 10**6)}, "result 5"),
        ({"firsts": (0, 32, 41, 72, 136, 200)}, "result 2"),
        ({"firsts": (-4, 32, 40, 72, 136, 200)}, "result 0"),
        ({"results": np.zeros(8, np.uint8)}, "result"),
    ],
    ids=str,
)
def test_results_outside_of_their_memory_are_refused(changes: dict[str, Any], message: str) -> None:
    queue = DeviceQueue()
    with pytest.raises(ValueError, match=message):
        push(queue, 0, calls_of(), rows_of(True, True, True), **changes)
    queue.close()
    assert queue.take() is None
