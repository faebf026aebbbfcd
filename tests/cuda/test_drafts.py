"""Drafts on a GPU never change an answer: requests with and without, on emulated kernels."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import random
import threading
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest

from tests.cuda.emulated_device import EmulatedDevice, Event
from tests.cuda.emulated_runner import (
    FP16,
    make_device,
    require_emulation,
    save_with_tokenizer,
    spec_of_steps,
)
from tests.support import real_engine
from tests.support.checkpoints import load_model, make_model, save
from tests.support.kv import plain_limits, plain_size
from tests.support.letters import AUTO, letters_grammar
from tests.support.random_requests import answers_of, random_request
from tests.support.small_engine import serving_with
from tgi_asgi.engine.budget import TokenBudget
from tgi_asgi.engine.engine import Engine
from tgi_asgi.models.family import Model
from tgi_asgi.ops.cuda_quant import Repacking
from tgi_asgi.ops.cuda_sample_state import CudaSampleState
from tgi_asgi.runner import cuda_drafts
from tgi_asgi.runner.cuda import CudaRunner
from tgi_asgi.runner.cuda_device import Command
from tgi_asgi.runner.cuda_drafts import CudaDrafts, LaidStep, _decode
from tgi_asgi.runner.cuda_sampler import CudaSampler
from tgi_asgi.runner.handoff import PendingStep
from tgi_asgi.runner.plan import StepPlan
from tgi_asgi.settings import Settings
from tgi_asgi.settings.speculation import Speculation
from tgi_asgi.text.constrain import source as sources
from tgi_asgi.text.constrain.grammar import Grammar
from tgi_asgi.types import GenerationRequest, SamplingParams, StopConditions

pytestmark = pytest.mark.thorough

LONGEST = 192
VOCAB = 160
NUM_REQUESTS = 7
LIMIT_S = 120.0  # of an answer; in emulation a step takes 50 ms


@pytest.fixture(autouse=True)
def drafts_are_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draft as many tokens as possible regardless of their cost."""
    monkeypatch.setattr(TokenBudget, "cost_s", property(lambda budget: (1.0, 0.0)))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    made = make_model(hidden_size=128, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=1)
    return load_model(save(made, tmp_path_factory.mktemp("model"), FP16), Repacking(FP16), max_positions=256)


@pytest.fixture(scope="module")
def grammars() -> list[Grammar]:
    schema = {"enum": ["alpha beta gamma", "alpha beta delta"]}
    texts = [sources.regex("[a-z]{5,9}(-ab-ab){2,6}[0-9]"), AUTO, sources.json_schema(schema)]
    return [letters_grammar(text, VOCAB) for text in texts]


def serving(
    model: Model, speculation: Speculation | None, num_blocks: int, device: EmulatedDevice | None = None
) -> AbstractAsyncContextManager[Engine]:
    size = plain_size(num_blocks, "float16")
    limits = plain_limits(max_sequences=8, max_tokens=128, max_context=LONGEST)
    spec = spec_of_steps(limits, is_batch_invariant=True)  # drafts would otherwise change the last bits
    spec = dataclasses.replace(spec, speculation=speculation)
    runner = CudaRunner(model, device or make_device(), lambda free_bytes: size, spec)
    return serving_with(runner, VOCAB, Settings(max_batch_prefill_tokens=64))


def request_of(rng: random.Random, number: int, grammars: list[Grammar]) -> GenerationRequest:
    """Return a random request, most without what takes 50 ms a token in emulation."""
    request = random_request(rng, number, grammars)
    if number % 4:
        sampling = dataclasses.replace(request.sampling, top_k=0, top_p=1.0, min_p=0.0, typical_p=1.0)
        request = dataclasses.replace(request, sampling=sampling)
    return request


@pytest.mark.parametrize(
    ("seed", "num_drafts", "num_blocks", "at_once"),
    [pytest.param(1, 8, 40, 3, marks=pytest.mark.soak), (2, 3, 30, 8), (3, 16, 16, 6)],
)
async def test_answers_are_the_same_with_and_without_drafts(
    model: Model, grammars: list[Grammar], seed: int, num_drafts: int, num_blocks: int, at_once: int
) -> None:
    """Greedy and sampled, with penalties, grammars, several choices, stop strings, and slots used again."""
    rng = random.Random(seed)
    requests = [request_of(rng, number, grammars) for number in range(NUM_REQUESTS)]
    async with serving(model, None, 80) as engine:
        expected = await answers_of(engine, requests, 8, LIMIT_S)
    async with serving(model, Speculation(num_drafts, shortest=1 + seed % 3), num_blocks) as engine:
        found = await answers_of(engine, requests, at_once, LIMIT_S)
        stats = engine.stats
    for request, ours, theirs in zip(requests, found, expected, strict=True):
        assert ours == theirs, request
    assert NUM_REQUESTS < stats.accepted_draft_tokens < stats.draft_tokens


def repetitive(max_tokens: int = 20) -> list[GenerationRequest]:
    """Make requests whose answers repeat themselves, more or less; the longer, the more drafts are right."""
    few = tuple((token, 20.0) for token in range(20, 24))
    ways = [
        SamplingParams(temperature=0.0, logprobs=2, logit_bias=few),
        SamplingParams(temperature=0.5, seed=1, logit_bias=few[:2]),
        SamplingParams(temperature=0.0, repetition_penalty=1.1, frequency_penalty=0.3, logit_bias=few),
        SamplingParams(temperature=0.3, seed=2, presence_penalty=0.2, logit_bias=few),
        SamplingParams(temperature=3.0, seed=3),
    ]
    return [
        GenerationRequest(
            f"r{number}",
            [2 + index % (3 + number) for index in range(30)],
            way,
            StopConditions(
                max_tokens, min_tokens=max_tokens * 5 // 8, stop_token_ids=frozenset({20 + number})
            ),
        )
        for number, way in enumerate(ways)
    ]


class LateEvent(Event):
    """Passes once the device does more, or nothing for a while: the last step has no next one."""

    def __init__(self, device: LateDevice) -> None:
        self._device, self.at = device, 0

    def synchronize(self) -> None:
        with self._device.changed:
            self._device.changed.wait_for(lambda: self._device.num_finished >= self.at, 0.05)


class LateDevice(EmulatedDevice):
    """A device that finishes what was submitted when more is, or when told to."""

    def __init__(self) -> None:
        super().__init__()
        self.num_submitted = self.num_finished = 0
        self.changed = threading.Condition()

    def event(self) -> Event:
        return LateEvent(self)

    def submit(self, commands: Sequence[Command]) -> None:
        super().submit(commands)
        self.finish()
        self.num_submitted += 1
        for command in commands:
            if isinstance(command, LateEvent):
                command.at = self.num_submitted

    def finish(self) -> None:
        with self.changed:
            self.num_finished = self.num_submitted
            self.changed.notify_all()


@pytest.fixture(scope="module")
def undrafted(model: Model) -> list[tuple[object, ...]]:
    """The answers to `repetitive`, each token computed in a step of its own."""

    async def ask() -> list[tuple[object, ...]]:
        return await answers_without_drafts(model, repetitive())

    return asyncio.run(ask())


async def answers_without_drafts(model: Model, requests: list[GenerationRequest]) -> list[tuple[object, ...]]:
    async with serving(model, None, 80) as engine:
        return await answers_of(engine, requests, 4, LIMIT_S)


async def test_drafts_save_steps(model: Model) -> None:
    [request, *_] = repetitive()
    request = dataclasses.replace(request, stop=StopConditions(max_tokens=48, ignore_eos=True))
    steps = []
    for speculation in (None, Speculation(8)):
        async with serving(model, speculation, 80) as engine:
            await answers_of(engine, [request], 1, LIMIT_S)
            steps.append(engine.stats.steps)
    assert steps[0] >= 48
    assert steps[1] < 48 / 2


async def test_steps_are_launched_before_the_last_one_is_known_unless_drafts_are_likely(
    model: Model, undrafted: list[tuple[object, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a device whose steps end when the next one has been submitted, or when it waits for them."""
    require_emulation("a real one is late by itself")
    make_device()
    device, were_idle = LateDevice(), list[bool]()
    must_wait, lay_out = CudaDrafts.must_wait, CudaDrafts.lay_out

    def tell(drafts: CudaDrafts, plan: StepPlan) -> bool:
        waits = must_wait(drafts, plan)
        if waits:
            device.finish()
        return waits

    def note(drafts: CudaDrafts, plan: StepPlan, *given: Any, is_idle: bool) -> LaidStep:
        were_idle.append(is_idle)
        return lay_out(drafts, plan, *given, is_idle=is_idle)

    monkeypatch.setattr(CudaDrafts, "must_wait", tell)
    monkeypatch.setattr(CudaDrafts, "lay_out", note)
    async with serving(model, Speculation(8), 80, device) as engine:
        assert await answers_of(engine, repetitive(), 2, LIMIT_S) == undrafted
        assert engine.stats.accepted_draft_tokens > 10
    assert were_idle.count(False) > 3
    assert were_idle.count(True) > 3


async def test_sequences_that_lose_their_blocks_resume_with_drafts(model: Model) -> None:
    """Other kernels recompute their tokens, so the best token must be better by more than rounding."""
    biases = tuple((20 + index, 40.0 - 8 * index) for index in range(5))
    way = SamplingParams(temperature=0.0, frequency_penalty=1.9, logit_bias=biases)
    requests = [dataclasses.replace(request, sampling=way) for request in repetitive()]
    async with serving(model, None, 80) as engine:
        expected = await answers_of(engine, requests, 4, LIMIT_S)
    async with serving(model, Speculation(8), 9) as engine:  # blocks of 16 tokens
        assert await answers_of(engine, requests, 4, LIMIT_S) == expected
        assert engine.stats.preemptions > 0
        assert engine.stats.accepted_draft_tokens > 10


def wrong_tables(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Return the steps and places of rows that were computed with another block table than the plan's."""
    found: list[tuple[int, int]] = []
    launch, fill = CudaRunner._launch, CudaRunner._fill
    laid_out: dict[int, Sequence[int]] = {}  # block tables by place in the step

    def filled(runner: CudaRunner, plan: StepPlan, *given: Any) -> Any:
        shape, layout, laid = fill(runner, plan, *given)
        rows, num_decodes = (plan if laid is None else laid.plan).rows, layout.rows.num_decodes
        gap = shape.num_decodes - num_decodes
        laid_out.clear()
        for at, row in enumerate(rows):
            end = row.start + row.num_tokens  # if it may have drafts, and has none
            blocks = row.block_tables[0][: -(-end // runner.traits.block_size)]
            laid_out[at if at < num_decodes else at + gap] = list(blocks)
        return shape, layout, laid

    def launched(runner: CudaRunner, step: PendingStep) -> Any:
        done = launch(runner, step)
        for at, blocks in laid_out.items():
            if runner._steps._tables[at, : len(blocks)].tolist() != blocks:
                found.append((step.plan.step_id, at))
        return done

    monkeypatch.setattr(CudaRunner, "_fill", filled)
    monkeypatch.setattr(CudaRunner, "_launch", launched)
    return found


@pytest.mark.parametrize("is_computed", [True, False])
async def test_a_step_that_fails_with_drafts_loses_nothing(
    model: Model, undrafted: list[tuple[object, ...]], monkeypatch: pytest.MonkeyPatch, is_computed: bool
) -> None:
    """Whether or not the device has computed it: its slots start again, and all block tables go up."""
    device = make_device()
    submit, drafted = device.submit, CudaSampler.drafted
    counts = itertools.count()  # of steps with drafts
    failing: list[int] = []
    wrong = wrong_tables(monkeypatch)

    def note(sampler: CudaSampler, *given: Any) -> Any:
        if (number := next(counts)) in (0, 3):  # a row that fails alone would lose its request
            failing.append(number)
        return drafted(sampler, *given)

    def fail_at_times(commands: Sequence[Command]) -> None:
        if is_computed or not failing:
            submit(commands)
        if failing:
            failing.clear()
            raise RuntimeError("a step failed")

    async with serving(model, Speculation(8), 80, device) as engine:
        monkeypatch.setattr(CudaSampler, "drafted", note)
        monkeypatch.setattr(device, "submit", fail_at_times)
        assert await answers_of(engine, repetitive(), 4, LIMIT_S) == undrafted
        assert engine.stats.failed_steps == 2
        assert engine.stats.accepted_draft_tokens > 10
    assert not wrong


async def test_rows_with_drafts_have_the_adapters_of_their_sequences(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tgi_asgi.runner.load.find_device", make_device)
    shape = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1}
    files = save_with_tokenizer(make_model(**shape, vocab_size=VOCAB), tmp_path / "model")
    settings: dict[str, Any] = {
        "max_batch_size": 4, "max_batch_prefill_tokens": 64, "max_total_tokens": 128, "batch_invariant": True
    }  # fmt: skip
    views = []
    for number, speculate in enumerate((0, 4)):
        folder = tmp_path / str(number)
        async with real_engine.serving(files, folder, **settings, speculate=speculate) as (engine, adapters):
            requests = [
                dataclasses.replace(request, adapter=adapter)
                for request, adapter in zip(repetitive(32), adapters, strict=False)
            ]
            views.append(list(map(real_engine.client_view, await real_engine.all_at_once(engine, requests))))
    assert views[0] == views[1]
    assert engine.stats.accepted_draft_tokens > 10
    assert len({str(view) for view in views[0]}) == 4


def _nothing(*given: Any) -> None:
    pass


FAULTS: dict[str, tuple[Any, str, Any]] = {
    "slots do not move on": (CudaSampleState, "accept_drafts", _nothing),
    "copies are not made": (CudaSampleState, "prepare_drafts", _nothing),
    "a sample after a wrong draft counts": (
        cuda_drafts,
        "_are_accepted",
        lambda drafts, _: [True] * len(drafts),
    ),
    "rows begin too early": (CudaDrafts, "_begins", lambda _, plan: [row.start for row in plan.rows]),
    "drafts are one too far on": (
        cuda_drafts,
        "_decode",
        lambda row, slot, ids, start: _decode(row, slot, ids, start + (ids is not None)),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_fault_would_change_answers(
    model: Model, undrafted: list[tuple[object, ...]], monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setattr(*FAULTS[fault])
    async with serving(model, Speculation(8), 80) as engine:
        assert await answers_of(engine, repetitive(), 4, LIMIT_S) != undrafted


async def test_a_step_that_did_not_wait_for_drafts_in_flight_would_change_answers(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as the step of a prompt that joins, which has no drafts."""
    require_emulation("a real one may be early")
    make_device()
    must_wait, requests = CudaDrafts.must_wait, repetitive(32)
    undrafted = await answers_without_drafts(model, requests)

    def forget(drafts: CudaDrafts, plan: StepPlan) -> bool:
        drafts.are_in_flight = False
        return must_wait(drafts, plan)

    monkeypatch.setattr(CudaDrafts, "must_wait", forget)
    async with serving(model, Speculation(8), 80, LateDevice()) as engine:
        assert await answers_of(engine, requests, 2, LIMIT_S) != undrafted
