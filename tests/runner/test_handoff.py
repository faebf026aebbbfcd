"""The queue between the event loop and the runner's thread: order, shutdown, and steps without Python."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch

from tests.support.checkpoints import load_model, make_model, save
from tests.support.memory import resident_bytes
from tests.support.runner_driver import GREEDY, Job, generate
from tests.support.small_engine import NotingRunner, noting_runner
from tests.support.waiting import LONGEST_S, until
from tgi_asgi import _C, ops
from tgi_asgi.models.family import Model
from tgi_asgi.runner.handoff import StepHandoff
from tgi_asgi.runner.inputs import PlanError
from tgi_asgi.runner.plan import SlotStart, StepPlan, StepResult, StepRow
from tgi_asgi.runner.runner import HostRunner
from tgi_asgi.types import SamplingParams

PROMPT = list(range(20, 45))
SEEDED = SamplingParams(temperature=1.0, seed=3, logprobs=2, presence_penalty=0.4)


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    ops.configure_threads(2, nice=0, pin=False)
    yield
    ops.configure_threads(2, nice=0, pin=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    model = make_model(num_attention_heads=2, num_key_value_heads=1)
    return load_model(save(model, tmp_path_factory.mktemp("model")), max_positions=256)


def start_plan(slot: int = 0, sampling: SamplingParams = GREEDY) -> StepPlan:
    row = StepRow(slot, PROMPT, 0, [[2 * slot, 2 * slot + 1]], samples=True)
    return StepPlan(0, [row], [SlotStart(slot, sampling, 0, PROMPT)])


def continue_plan(index: int, slot: int = 0) -> StepPlan:
    row = StepRow(slot, None, len(PROMPT) + index, [[2 * slot, 2 * slot + 1]], samples=True)
    return StepPlan(1 + index, [row])


@pytest.fixture
def noting(model: Model) -> Iterator[NotingRunner]:
    runner = noting_runner(model, 64, max_context=256)
    yield runner
    runner.close()


async def test_steps_that_decode_need_no_python(noting: NotingRunner) -> None:
    runner = noting
    await runner.submit(start_plan())
    runner.forbids_python = True
    results = [await runner.submit(continue_plan(index)) for index in range(3)]
    assert [result.step_id for result in results] == [1, 2, 3]
    for plan in (start_plan(1), StepPlan(4, continue_plan(3).rows, copies=[(0, 9)])):
        with pytest.raises(AssertionError, match="Python"):
            await runner.submit(plan)


async def test_the_second_chunk_of_a_prompt_needs_none(noting: NotingRunner) -> None:
    runner = noting
    whole = await runner.submit(start_plan(sampling=SEEDED))
    start = SlotStart(1, SEEDED, 0, PROMPT)
    await runner.submit(StepPlan(0, [StepRow(1, PROMPT[:9], 0, [[4, 5]], samples=False)], [start]))
    runner.forbids_python = True
    middle = await runner.submit(StepPlan(1, [StepRow(1, PROMPT[9:16], 9, [[4, 5]], samples=False)]))
    assert middle.sampled == [None]
    last = await runner.submit(StepPlan(2, [StepRow(1, PROMPT[16:], 16, [[4, 5]], samples=True)]))
    assert last.sampled == whole.sampled


async def test_a_step_samples_the_same_either_way(
    make_runner: Callable[[], HostRunner], monkeypatch: pytest.MonkeyPatch
) -> None:
    by_queue = [Job(PROMPT[: 3 + n], 12, SEEDED if n % 2 else GREEDY) for n in range(5)]
    by_python = [Job(job.prompt_ids, job.num_tokens, job.sampling) for job in by_queue]
    await generate(make_runner(), by_queue)
    slow = make_runner()
    monkeypatch.setattr(slow, "_has_only_rows", lambda plan: False)
    await generate(slow, by_python)
    assert [job.sampled for job in by_queue] == [job.sampled for job in by_python]
    assert by_queue[1].sampled[5].top is not None


async def test_rows_out_of_bounds_fail_their_step_only(runner: HostRunner) -> None:
    await runner.submit(start_plan())
    bad = StepPlan(1, [StepRow(0, None, len(PROMPT), [[0, 64]], samples=True)])
    first, failing = runner.submit(continue_plan(0)), runner.submit(bad)
    with pytest.raises(PlanError, match="block"):
        await failing
    assert (await first).sampled[0] is not None
    assert (await runner.submit(continue_plan(1))).step_id == 2


async def test_a_step_that_cannot_be_computed_fails_alone(
    runner: HostRunner, caplog: pytest.LogCaptureFixture
) -> None:
    await runner.submit(start_plan())
    ops.configure_threads(3, nice=0, pin=False)  # more than the step was recorded for
    with pytest.raises(RuntimeError, match="recorded for 2 threads, not 3"):
        await runner.submit(continue_plan(0))
    assert "step 1 failed" in caplog.text
    ops.configure_threads(2, nice=0, pin=False)
    assert (await runner.submit(continue_plan(0))).sampled[0] is not None


async def test_a_slot_that_never_started_fails(runner: HostRunner) -> None:
    with pytest.raises(RuntimeError, match="no slot was ever started"):
        await runner.submit(continue_plan(0))


def test_a_runner_serves_one_loop_after_another(runner: HostRunner) -> None:
    async def sample(plan: StepPlan) -> int:
        sampled = (await runner.submit(plan)).sampled[0]
        assert sampled is not None
        return sampled.token_id

    first = [asyncio.run(sample(plan)) for plan in (start_plan(), continue_plan(0))]
    assert [asyncio.run(sample(plan)) for plan in (start_plan(1), continue_plan(0, 1))] == first


@pytest.mark.parametrize("num_left", [1, 2])
def test_a_loop_that_ends_with_steps_in_flight_leaves_nothing_to_the_next(num_left: int) -> None:
    handoff = StepHandoff()
    may_work = threading.Event()
    finished = threading.Semaphore(0)

    def work() -> None:
        may_work.wait(10)
        while (step := handoff.take()) is not None:
            handoff.finish(step, StepResult(step.plan.step_id, []))
            finished.release()

    async def leave() -> None:
        for index in range(num_left):
            handoff.submit(StepPlan(index, [])).add_done_callback(print)

    async def sample() -> StepResult:
        future = handoff.submit(StepPlan(9, []))
        assert finished.acquire(timeout=10)  # so that new and old results arrive together
        return await asyncio.wait_for(future, LONGEST_S)

    thread = threading.Thread(target=work)
    thread.start()
    asyncio.run(leave())
    may_work.set()
    for _ in range(num_left):
        assert finished.acquire(timeout=10)
    try:
        assert asyncio.run(sample()) == StepResult(9, [])
    finally:
        handoff.close()
        thread.join(10)
        handoff.end()


async def test_close_delivers_the_steps_in_flight(runner: HostRunner) -> None:
    await runner.submit(start_plan())
    futures = [runner.submit(continue_plan(index)) for index in range(2)]
    runner.close()
    assert [future.result().step_id for future in futures] == [1, 2]
    runner.close()


async def test_a_row_that_is_not_finite_is_flagged_alone(runner: HostRunner) -> None:
    """Poison the keys and values of one context, but not of the other."""
    await asyncio.gather(*(runner.submit(start_plan(slot)) for slot in range(2)))
    rows = [
        StepRow(0, None, len(PROMPT), [[0, 1]], samples=True),
        StepRow(1, None, len(PROMPT), [[2, 3]], samples=True),
    ]
    expected = await runner.submit(StepPlan(1, rows[1:]))
    await runner.submit(start_plan(1))
    assert isinstance(runner._kv_pool, ops.KvPool)
    runner._kv_pool.native.memory()[:2] = 0xFF  # NaN
    result = await runner.submit(StepPlan(2, rows))
    [ill, healthy] = result.sampled
    assert ill is not None and healthy is not None
    assert not ill.is_finite
    assert healthy == expected.sampled[0]


async def test_steps_leave_in_the_order_in_which_they_came(runner: HostRunner) -> None:
    """Mix steps that run in Python with steps that do not."""
    await runner.submit(start_plan())
    done: list[int] = []
    plans = [continue_plan(0), start_plan(1), continue_plan(1), continue_plan(0, 1), start_plan(2)]
    previous: asyncio.Future[StepResult] | None = None
    for number, plan in enumerate(plans):
        plan.step_id = number
        future = runner.submit(plan)
        future.add_done_callback(lambda future: done.append(future.result().step_id))
        if previous is not None:
            await previous  # two are in flight
        previous = future
    await future
    await asyncio.sleep(0)
    assert done == [0, 1, 2, 3, 4]


async def test_a_queue_without_a_program_gives_all_to_its_taker() -> None:
    handoff = StepHandoff()
    taken: list[int] = []

    def work() -> None:
        while (step := handoff.take()) is not None:
            taken.append(step.plan.step_id)
            handoff.finish(step, StepResult(step.plan.step_id, []) if step.plan.step_id else ValueError("no"))

    thread = threading.Thread(target=work)
    thread.start()
    failing, good = handoff.submit(StepPlan(0, [])), handoff.submit(StepPlan(5, []))
    with pytest.raises(ValueError, match="no"):
        await failing
    assert await good == StepResult(5, [])
    handoff.close()
    thread.join(10)
    handoff.end()
    handoff.end()
    assert taken == [0, 5]


class PanicException(BaseException): ...


def panic() -> None:
    raise PanicException("called `Option::unwrap()` on a `None` value")


@pytest.mark.parametrize(
    ("fail", "kind", "message"),
    [
        pytest.param(panic, RuntimeError, "unwrap", id="no `Exception`, as libraries written in Rust raise"),
        # The engine runs a step that lacked memory again in smaller parts.
        pytest.param(lambda: torch.empty(1 << 60), MemoryError, "allocate", id="torch, without memory"),
    ],
)
async def test_what_a_library_raises_fails_its_step_alone(
    fail: Callable[[], object], kind: type[Exception], message: str
) -> None:
    def compute(plan: StepPlan) -> StepResult:
        if plan.step_id == 0:
            fail()
        return StepResult(plan.step_id, [])

    handoff = StepHandoff()
    thread = threading.Thread(target=handoff.serve, args=(compute,))
    thread.start()
    try:
        failing, good = handoff.submit(StepPlan(0, [])), handoff.submit(StepPlan(1, []))
        with pytest.raises(kind, match=message):
            await asyncio.wait_for(failing, LONGEST_S)
        assert await good == StepResult(1, [])
    finally:
        handoff.close()
        thread.join(LONGEST_S)
        handoff.end()


async def test_an_idle_thread_holds_no_plan() -> None:
    """A plan has images and adapters, which must leave the memory when they are dropped elsewhere."""
    handoff = StepHandoff()
    thread = threading.Thread(target=handoff.serve, args=(lambda plan: StepResult(plan.step_id, []),))
    thread.start()
    try:
        plan = StepPlan(0, [StepRow(0, [1], 0, [[1]], samples=True, adapter=threading.Event())])
        adapter = weakref.ref(plan.rows[0].adapter)
        await handoff.submit(plan)
        del plan
        await until(lambda: adapter() is None)
    finally:
        handoff.close()
        thread.join(LONGEST_S)
        handoff.end()


async def test_a_thread_that_is_faster_than_the_loop_finds_its_step() -> None:
    handoff = StepHandoff()
    taken = threading.Event()

    class Slow:
        """A queue whose `push` returns only after the thread has taken the step."""

        def push(self, number: int) -> None:
            steps.push(number)
            assert taken.wait(10)

        def __getattr__(self, name: str) -> object:
            return getattr(steps, name)

    def work() -> None:
        step = handoff.take()
        taken.set()
        assert step is not None
        handoff.finish(step, StepResult(step.plan.step_id, []))

    steps = handoff.steps
    handoff._steps = Slow()  # type: ignore[assignment]
    thread = threading.Thread(target=work)
    thread.start()
    try:
        assert await handoff.submit(StepPlan(3, [])) == StepResult(3, [])
    finally:
        handoff.end()
        thread.join(10)


def test_rows_are_refused_without_a_program() -> None:
    with pytest.raises(ValueError, match="computes nothing"):
        ops.StepQueue().push_rows(0, [StepRow(0, [1], 0, [[1]], samples=True)])
    with pytest.raises(ValueError, match="program and limits"):
        ops.StepQueue(_C.Program(max_tokens=1, max_sequences=1, max_rows=1, max_context=16))


def test_a_drafter_has_the_slots_of_the_rows() -> None:
    program = _C.Program(max_tokens=1, max_sequences=1, max_rows=1, max_context=16)
    limits = ops.RowLimits(
        vocab_size=8, num_blocks=4, block_size=16, max_context=16, max_rows=2, max_tokens=1, windows=(None,)
    )
    steps = ops.StepQueue(program, limits)
    with pytest.raises(ValueError, match="must have the slots of a queue's rows, got 1"):
        steps.set_drafter(ops.Drafter(num_slots=1, shortest=2, longest=4))
    steps.set_drafter(ops.Drafter(num_slots=2, shortest=2, longest=4))
    with pytest.raises(ValueError, match="must have the slots of a queue's rows, got 1"):
        steps.set_sampling(ops.SampleState(1, 8).arrays)


def test_a_closed_queue_takes_no_steps() -> None:
    steps = ops.StepQueue()
    steps.close()
    with pytest.raises(RuntimeError, match="closed"):
        steps.push(0)
    assert steps.compute_rows() is None


async def test_an_idle_thread_returns_the_memory_of_dropped_tensors() -> None:
    size = 64 << 20
    rows = _C.new_rows(size // 4096, 1024)
    rows[:] = 1.0
    del rows
    held = resident_bytes()
    steps = ops.StepQueue(idle_s=0.05)
    thread = threading.Thread(target=steps.compute_rows)
    thread.start()
    try:
        await until(lambda: resident_bytes() < held - 0.9 * size)
    finally:
        steps.close()
        thread.join(LONGEST_S)
