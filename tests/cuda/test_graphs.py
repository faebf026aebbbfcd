"""The CUDA runner's graphs: replayed for other slots, parameters and masks they compute what calls would."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from tests.cuda.emulated_device import EmulatedDevice, Event, Graph
from tests.cuda.emulated_runner import spec_of_steps
from tests.emulation import bindings, library
from tests.support.checkpoints import load_model, make_model, save
from tests.support.kv import plain_limits, plain_size
from tests.support.letters import EOS, Letters, letters_grammar
from tests.support.runner_driver import GREEDY, Job, generate
from tgi_asgi.models.family import Model
from tgi_asgi.ops.cuda_quant import Repacking
from tgi_asgi.ops.cuda_sample_state import MAX_IDS
from tgi_asgi.runner import cuda_steps
from tgi_asgi.runner.cuda import CudaRunner
from tgi_asgi.runner.cuda_buffers import StepShape
from tgi_asgi.runner.cuda_device import Command, Copy
from tgi_asgi.runner.cuda_steps import MAX_TOP, CudaSteps, graph_shapes
from tgi_asgi.runner.plan import Sampled, SlotStart, StepPlan, StepRow
from tgi_asgi.text.constrain import source as sources
from tgi_asgi.text.constrain.grammar import Grammar
from tgi_asgi.types import LogprobsMode, SamplingParams

pytestmark = pytest.mark.thorough

FP16 = torch.float16
VOCAB = 160


class EagerDevice(EmulatedDevice):
    """A device without graphs: it repeats the calls."""

    def capture(self, call: Callable[[], None]) -> Callable[[], None]:
        return call


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    made = make_model(hidden_size=128, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=1)
    return load_model(save(made, tmp_path_factory.mktemp("model"), FP16), Repacking(FP16), max_positions=256)


@pytest.fixture(scope="module")
def grammar() -> Grammar:
    return letters_grammar(sources.regex("[a-z]{3}-[0-9]{3,9}"), VOCAB)


@pytest.fixture
def make_runner(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[EmulatedDevice], CudaRunner]]:
    """Make runners whose graphs hold up to four decodes and four prompts of 16 tokens in total."""
    library.require()
    bindings.install()
    monkeypatch.setattr(cuda_steps, "MIXED_TOKENS", (16,))
    runners: list[CudaRunner] = []

    def make(device: EmulatedDevice) -> CudaRunner:
        size = plain_size(40, "float16")
        limits = plain_limits(max_sequences=8, max_tokens=64, max_context=256)
        spec = spec_of_steps(
            limits, is_batch_invariant=True
        )  # neighbours would otherwise change the last bits
        runner = CudaRunner(model, device, lambda free_bytes: size, spec)
        runners.append(runner)
        return runner

    yield make
    for runner in runners:
        runner.close()


def jobs(grammar: Grammar) -> list[Job]:
    """Make sequences that differ in everything that sampling depends on, and in their lengths."""
    # More than the initial capacity of a list.
    many = tuple((token, 1.0 + token % 7) for token in range(3, 140))
    ways = [
        SamplingParams(seed=1, temperature=0.8),
        SamplingParams(seed=2, top_k=9, top_p=0.9, logprobs=3, logprobs_mode=LogprobsMode.PROCESSED),
        GREEDY,
        SamplingParams(seed=3, repetition_penalty=1.4, frequency_penalty=0.5, logprobs=0),
        SamplingParams(seed=4, logit_bias=many, temperature=2.0),
        SamplingParams(seed=5, logprobs=MAX_TOP),
        SamplingParams(seed=6, min_p=0.02, typical_p=0.9),
        SamplingParams(seed=7),
    ]
    made = [Job([7, 8, 9 + i], 4 + 2 * i, way) for i, way in enumerate(ways)]
    for job in made[5:7]:
        job.start = {"grammar": grammar, "masked_ids": (EOS,), "min_tokens": 6}
    made[7].start = {"masked_ids": tuple(range(0, VOCAB, 2)), "min_tokens": 12}
    return made


async def sampled_by(runner: CudaRunner, grammar: Grammar) -> list[list[Sampled]]:
    """Run all of them twice, in different slots the second time; then each alone."""
    first, second, alone = jobs(grammar), jobs(grammar), jobs(grammar)
    await generate(runner, first)
    await generate(runner, second[::-1])
    for job in alone:
        await generate(runner, [job])
    return [job.sampled for job in (*first, *second, *alone)]


async def test_graphs_sample_what_calls_sample_whatever_has_changed_since_they_were_made(
    make_runner: Callable[[EmulatedDevice], CudaRunner], grammar: Grammar
) -> None:
    device = EmulatedDevice()
    found = await sampled_by(make_runner(device), grammar)
    assert device.replayed > 100
    assert found == await sampled_by(make_runner(EagerDevice()), grammar)
    by_job = list(zip(found[:8], found[8:16], found[16:], strict=True))
    assert all(together == other == alone for together, other, alone in by_job), "a neighbour was felt"
    ids = [[sampled.token_id for sampled in row] for row in found]
    text = "".join(Letters(VOCAB).token_bytes(token).decode() for token in ids[5])
    assert text[:3].isalpha() and text[3] == "-" and text[4:7].isdigit(), text
    assert [len(sampled.top or ()) for sampled in found[5]] == [MAX_TOP] * len(found[5])
    assert all(token % 2 for token in ids[7][:12])
    assert len({tuple(row[:4]) for row in ids[:8]}) == 8


async def test_a_step_is_submitted_at_once_unless_masks_are_computed_meanwhile(
    make_runner: Callable[[EmulatedDevice], CudaRunner], grammar: Grammar, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = EmulatedDevice()
    runner = make_runner(device)
    submitted: list[str] = []
    submit = device.submit

    def note(commands: Sequence[Command]) -> None:
        kinds = {Copy: "copy", Event: "event"}
        submitted.append(" ".join(kinds.get(type(command), "graph") for command in commands))
        submit(commands)

    monkeypatch.setattr(device, "submit", note)
    await generate(runner, [Job([7, 8, 9], 2)], chunk=2)
    whole = "copy graph graph copy event"
    assert submitted == ["copy graph event", whole, whole], "inputs; the results"
    submitted.clear()
    start = {"grammar": grammar, "masked_ids": (EOS,)}
    await generate(runner, [Job([7, 8, 9], 1, start=start), Job([7], 1)])
    assert submitted == ["copy graph", "copy graph copy event"], "the mask after the forward pass"


def short() -> list[Job]:
    """Make sequences of which some decode while others are still in prefill, four tokens at a time."""
    lengths = ((3, 9), (14, 6), (9, 7), (2, 11), (11, 5))
    return [Job(list(range(5 * n, 6 * n)), m, SamplingParams(seed=n)) for n, m in lengths]


@pytest.mark.parametrize("most", [1, 5, 256, 300, 512, 1000, 5000])
def test_large_batches_are_padded_by_less_than_64_sequences(most: int) -> None:
    limits = plain_limits(max_sequences=most, max_tokens=8192, max_context=256)
    sizes = [shape.num_decodes for shape in graph_shapes(limits, has_mixed=False)]
    assert sizes == sorted(set(sizes)) and sizes[0] == 1 and sizes[-1] == most
    assert max(np.diff([0, *sizes[:28]])) <= 64 or most > 1024
    assert len(sizes) <= 28


async def test_steps_with_short_prompts_are_graphs_too(
    make_runner: Callable[[EmulatedDevice], CudaRunner], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, found = short(), short()
    await generate(make_runner(EagerDevice()), expected, chunk=4)
    runner = make_runner(EmulatedDevice())
    monkeypatch.delattr(CudaSteps, "_forward")  # which graphs no longer need
    await generate(runner, found, chunk=4)
    assert [job.sampled for job in found] == [job.sampled for job in expected]


@pytest.mark.parametrize("section", ["slots", "row_slots", "query_start"])
async def test_padding_that_is_none_would_be_felt(
    make_runner: Callable[[EmulatedDevice], CudaRunner], monkeypatch: pytest.MonkeyPatch, section: str
) -> None:
    expected, found = short(), short()
    await generate(make_runner(EmulatedDevice()), expected, chunk=4)
    runner = make_runner(EmulatedDevice())
    copy = runner._steps.copy

    def fill_all(shape: StepShape, staged: torch.Tensor) -> Any:
        inputs = shape.sections.arrays(staged.numpy())
        values = inputs[section]
        # Written where the first sequence's newest token is, or sampled for the first slot.
        values[values < 0] = values[0] if section == "slots" else 0
        if section == "query_start":  # as if the decodes had no padding
            values -= np.count_nonzero(inputs["context_len"][: shape.num_decodes] == 0)
        return copy(shape, staged)

    monkeypatch.setattr(runner._steps, "copy", fill_all)  # prepared steps have it, too
    await generate(runner, found, chunk=4)
    assert [job.sampled for job in found] != [job.sampled for job in expected]


async def test_an_entry_of_a_block_table_that_did_not_go_up_would_be_felt(
    make_runner: Callable[[EmulatedDevice], CudaRunner], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, found = short(), short()
    await generate(make_runner(EmulatedDevice()), expected, chunk=4)
    runner = make_runner(EmulatedDevice())
    copy = runner._steps.copy

    def withhold(shape: StepShape, staged: torch.Tensor) -> Any:
        inputs = shape.sections.arrays(staged.numpy())
        for name in ("table_firsts", "table_starts"):
            inputs[name] += 1
        return copy(shape, staged)

    monkeypatch.setattr(runner._steps, "copy", withhold)
    await generate(runner, found, chunk=4)
    assert [job.sampled for job in found] != [job.sampled for job in expected]


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(logprobs=MAX_TOP + 1),
        SamplingParams(logit_bias=tuple((1, 0.0) for _ in range(MAX_IDS + 1))),
    ],
    ids=("logprobs", "biases"),
)
async def test_more_than_there_is_room_for_is_refused_alone(
    make_runner: Callable[[EmulatedDevice], CudaRunner], sampling: SamplingParams
) -> None:
    runner = make_runner(EmulatedDevice())
    row = StepRow(0, [5], 0, [[0]], samples=True)
    with pytest.raises(ValueError, match="at most"):
        await runner.submit(StepPlan(0, [row], [SlotStart(0, sampling, 0, [5])]))
    job = Job([7, 8, 9], 3)
    await generate(runner, [job])
    assert len(job.sampled) == 3


def test_a_graph_keeps_numbers_and_addresses_and_refuses_to_wait() -> None:
    buffer, room, factor = torch.ones(2), [torch.zeros(2)], [2.0]

    def call() -> None:
        torch.add(buffer * factor[0], 1, out=room[0])

    with Graph() as graph:
        call()
    first, factor[0] = room[0], 5.0
    room[0] = torch.zeros(2)
    buffer.fill_(10)
    graph.replay()
    assert first.tolist() == [21, 21], "the new contents, by the old factor"
    assert room[0].tolist() == [0, 0]
    with pytest.raises(AssertionError, match="cannot be captured"), Graph():
        buffer.sum().item()
    with pytest.raises(AssertionError, match="cannot be captured"), Graph():
        torch.tensor([1.0, 2.0])
