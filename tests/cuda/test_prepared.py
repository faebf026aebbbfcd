"""Steps that need no Python once they are submitted: which these are, what they give, how they fail."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import transformers

from tests.cuda.emulated_device import EmulatedDevice
from tests.cuda.emulated_runner import FP16, PROMPT, SHAPE, make_device, make_runner
from tests.support.checkpoints import load_model, make_model, save
from tests.support.letters import letters_grammar
from tests.support.runner_driver import GREEDY, Job, generate
from tgi_asgi.models.family import Model
from tgi_asgi.ops.cuda_quant import Repacking
from tgi_asgi.runner.cuda import CudaRunner
from tgi_asgi.runner.inputs import PlanError
from tgi_asgi.runner.plan import DeviceLost, SlotStart, StepPlan, StepRow
from tgi_asgi.text.constrain import source as sources
from tgi_asgi.types import SamplingParams

SEEDED = SamplingParams(temperature=1.2, seed=3, logprobs=3, presence_penalty=0.4)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    reference: transformers.PreTrainedModel = make_model(**SHAPE)
    files = save(reference, tmp_path_factory.mktemp("model"), FP16)
    return load_model(files, Repacking(FP16), max_positions=256)


@pytest.fixture
def device() -> EmulatedDevice:
    return make_device()


@pytest.fixture
def runner(model: Model, device: EmulatedDevice) -> Iterator[CudaRunner]:
    runner = make_runner(model, device, max_sequences=5)
    yield runner
    runner.close()


@pytest.fixture
def are_prepared(runner: CudaRunner, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each plan needed no Python."""
    found: list[bool] = []
    steps = runner._prepared_steps
    assert steps is not None
    push = steps.push

    def note(step: Any) -> bool:
        found.append(push(step))
        return found[-1]

    monkeypatch.setattr(steps, "push", note)
    return found


def jobs_of_all_kinds() -> list[Job]:
    return [
        Job(PROMPT, 9, SEEDED),
        Job(PROMPT[:3], 4),
        Job([7, 8], 12, replace(SEEDED, logprobs=None, seed=4)),
        Job(PROMPT[5:], 7, SamplingParams(temperature=0.0, logprobs=0)),
    ]


async def test_they_give_the_same_as_steps_in_python(
    runner: CudaRunner, are_prepared: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    found, wanted = jobs_of_all_kinds(), jobs_of_all_kinds()
    await generate(runner, found, chunk=5)
    assert sum(are_prepared) > 10 and not are_prepared[0]
    monkeypatch.setattr(runner, "_prepared_steps", None)
    await generate(runner, wanted, chunk=5)
    assert [job.sampled for job in found] == [job.sampled for job in wanted]
    tops = [sampled.top for sampled in found[0].sampled]
    assert [len(top or ()) for top in tops] == [3] * 9


async def test_neither_thread_needs_python(runner: CudaRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    start = StepPlan(0, [StepRow(0, PROMPT, 0, [[0, 1]], samples=True)], [SlotStart(0, GREEDY, 0, PROMPT)])
    await runner.submit(start)

    def fail(*given: Any) -> None:
        raise AssertionError("this step went through Python")

    for name in ("_launch", "_finish"):
        monkeypatch.setattr(runner, name, fail)
    for index in range(4):
        row = StepRow(0, None, len(PROMPT) + index, [[0, 1]], samples=True)
        result = await runner.submit(StepPlan(1 + index, [row]))
        assert result.step_id == 1 + index and result.sampled[0] is not None
    silent = StepRow(0, [5, 6], len(PROMPT) + 4, [[0, 1]], samples=False)
    assert (await runner.submit(StepPlan(9, [silent]))).sampled == [None]


async def test_what_needs_python_has_it(runner: CudaRunner, are_prepared: list[bool]) -> None:
    """A slot's grammar counts from the plan that starts it to the one that starts the next sequence."""
    grammar = letters_grammar(sources.regex("[a-z]{9}"), 160)
    starts = [SlotStart(0, GREEDY, 0, [5]), SlotStart(1, GREEDY, 0, [6], grammar=grammar)]
    prompts = [StepRow(0, [5], 0, [[0]], samples=True), StepRow(1, [6], 0, [[1]], samples=True)]
    plain, constrained = (StepRow(slot, None, 1, [[slot]], samples=True) for slot in (0, 1))
    scored = StepRow(0, [7, 8], 0, [[0]], samples=False, prompt_logprobs=0)
    free, more = SlotStart(1, GREEDY, 0, [6]), StepRow(0, [4] * 3, 4, [[0]], samples=True)
    plans = [
        (StepPlan(0, prompts, starts), False), (StepPlan(1, [plain]), True),
        (StepPlan(2, [constrained]), False), (StepPlan(3, [scored]), False),
        (StepPlan(4, [], copies=[(0, 9)]), False), (StepPlan(5, [prompts[1]], [free]), False),
        (StepPlan(6, [constrained]), True), (StepPlan(7, [more]), True),
    ]  # fmt: skip
    for plan, _ in plans:
        await runner.submit(plan)
    assert are_prepared == [expected for _, expected in plans]


async def test_rows_out_of_bounds_are_refused_at_once_and_take_no_place(
    runner: CudaRunner, are_prepared: list[bool]
) -> None:
    await runner.submit(
        StepPlan(0, [StepRow(0, [5], 0, [[0]], samples=True)], [SlotStart(0, GREEDY, 0, [5])])
    )
    places = []
    for plan_id, token in enumerate([3, 160, 3, 160, 160, 3], start=1):
        plan = StepPlan(plan_id, [StepRow(0, [token], plan_id, [[0]], samples=True)])
        places.append(runner._handoff._num_accepted)
        if token < 160:
            await runner.submit(plan)
            continue
        future = runner.submit(plan)
        assert future.done()
        with pytest.raises(PlanError):
            await future
    assert places == [1, 2, 2, 3, 3, 3] and are_prepared == [False, True, True, True]


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        ("CUDA out of memory", MemoryError), ("CUDA error: an illegal access", DeviceLost),
        ("a passing fault", RuntimeError),
    ],
)  # fmt: skip
async def test_a_step_that_fails_says_why(
    runner: CudaRunner, device: EmulatedDevice, are_prepared: list[bool], message: str, kind: type[Exception]
) -> None:
    await runner.submit(
        StepPlan(0, [StepRow(0, [5], 0, [[0]], samples=True)], [SlotStart(0, GREEDY, 0, [5])])
    )
    row = StepRow(0, [6], 1, [[0]], samples=True)
    device.failure = RuntimeError(message)
    for step_id in (1, 2):
        with pytest.raises(kind, match=message):
            await runner.submit(StepPlan(step_id, [row]))
    device.failure = None
    assert are_prepared == ([False, True] if kind is DeviceLost else [False, True, True])
    if kind is DeviceLost:
        with pytest.raises(DeviceLost):
            await runner.submit(StepPlan(3, [row]))
        assert len(are_prepared) == 2, "no step is prepared for a device that is lost"
    else:
        assert (await runner.submit(StepPlan(3, [row]))).sampled[0] is not None


async def test_closing_finishes_what_is_in_flight(model: Model, device: EmulatedDevice) -> None:
    runner = make_runner(model, device, max_sequences=5)
    first = StepPlan(0, [StepRow(0, [5], 0, [[0]], samples=True)], [SlotStart(0, GREEDY, 0, [5])])
    await runner.submit(first)
    rows = [StepRow(0, None, position, [[0]], samples=True) for position in (1, 2)]
    futures = [runner.submit(StepPlan(1 + index, [row])) for index, row in enumerate(rows)]
    runner.close()
    assert [(await future).sampled[0] is not None for future in futures] == [True, True]
    with pytest.raises(RuntimeError, match="closed"):
        runner.submit(first)
