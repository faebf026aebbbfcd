"""Vectors and scores of prompts by the CUDA runner, on emulated kernels, against `transformers`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tests.cuda.emulated_device import EmulatedDevice
from tests.cuda.emulated_runner import FP16, SHAPE, make_device, spec_of_steps
from tests.support.checkpoints import load_model, make_model, save
from tests.support.kv import plain_limits, plain_size
from tests.support.pooling_models import (
    Vector,
    dense,
    files_of,
    pooled,
    save_classifier,
    save_embedder,
    states,
)
from tests.support.pooling_server import pooled_server
from tests.support.runner_driver import GREEDY, Job, generate
from tgi_asgi.models.family import Model
from tgi_asgi.ops.cuda_quant import Repacking
from tgi_asgi.runner.cuda import CudaRunner
from tgi_asgi.runner.cuda_layout import plain_layout
from tgi_asgi.runner.cuda_steps import CudaOutputs
from tgi_asgi.runner.inputs import PlanError
from tgi_asgi.runner.load import LoadedModel, load
from tgi_asgi.runner.plan import SlotStart, StepPlan, StepRow
from tgi_asgi.settings import Settings
from tgi_asgi.types import Pooling, PoolingKind

pytestmark = pytest.mark.thorough

IDS = [(at * 37 + 11) % 160 for at in range(40)]
BESIDE = [3, 14, 15, 92, 65, 35, 89, 79, 32]
MODES = {
    PoolingKind.LAST: "lasttoken",
    PoolingKind.CLS: "cls_token",
    PoolingKind.MEAN: "mean_tokens",
    PoolingKind.MAX: "max_tokens",
    PoolingKind.MEAN_SQRT_LEN: "mean_sqrt_len_tokens",
    PoolingKind.WEIGHTED_MEAN: "weightedmean_tokens",
}
LAST, MEAN = Pooling(PoolingKind.LAST), Pooling(PoolingKind.MEAN)
CHOSEN = (7, 9, 3)
LOGITS = Pooling(PoolingKind.LOGITS, CHOSEN)
# A step of a decode and a prompt is a graph for two decodes: one token of padding lies before the prompt.
LIMITS = plain_limits(max_sequences=5, max_tokens=80, max_context=256)
# Sizes of the kernels, whatever else a test says of a model. The hidden size fits `save_embedder`'s Dense.
WIDE: dict[str, Any] = {"head_dim": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
Make = Callable[..., CudaRunner]


@pytest.fixture
def device() -> EmulatedDevice:
    return make_device()


@pytest.fixture
def make(device: EmulatedDevice) -> Iterator[Make]:
    """Return a function that makes a runner of a model."""
    runners: list[CudaRunner] = []

    def runner_of(model: Model, **options: Any) -> CudaRunner:
        size = plain_size(40, "float16")
        runner = CudaRunner(model, device, lambda free: size, spec_of_steps(LIMITS), CudaOutputs(**options))
        runners.append(runner)
        return runner

    yield runner_of
    for runner in runners:
        runner.close()


@pytest.fixture(scope="module")
def reference() -> transformers.PreTrainedModel:
    return make_model(**SHAPE)


@pytest.fixture(scope="module")
def model(reference: transformers.PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load_fp16(reference, tmp_path_factory.mktemp("model"))


def load_fp16(reference: transformers.PreTrainedModel, directory: Path) -> Model:
    return load_model(save(reference, directory, FP16), Repacking(FP16), max_positions=256)


async def vectors(
    runner: CudaRunner, prompts: Sequence[tuple[Sequence[int], Pooling]], chunk: int, *, beside: bool = False
) -> list[Vector]:
    """Pool prompts in slots from 1 on, each in chunks; with `beside`, a sequence decodes in slot 0."""
    tables = [list(range(4 * slot, 4 * slot + 4)) for slot in range(1 + len(prompts))]
    starts = [SlotStart(slot, GREEDY, 0, ids) for slot, (ids, _) in enumerate(prompts, 1)]
    done = [0] * len(prompts)
    found: dict[int, Vector] = {}
    decoded: list[int] = []
    if beside:
        first = StepRow(0, BESIDE, 0, tables[:1], samples=True)
        result = await runner.submit(StepPlan(0, [first], [SlotStart(0, GREEDY, 0, BESIDE)]))
        decoded.append(result.sampled[0].token_id)  # type: ignore[union-attr]
    step = 0
    while len(found) < len(prompts):
        rows = [StepRow(0, None, len(BESIDE) + step, tables[:1], samples=True)] if beside else []
        members = [at for at, (ids, _) in enumerate(prompts) if done[at] < len(ids)]
        for at in members:
            ids, pooling = prompts[at]
            part = ids[done[at] : done[at] + chunk]
            is_end = done[at] + len(part) == len(ids)
            rows.append(StepRow(1 + at, part, done[at], tables[1 + at : 2 + at], is_end, pooling=pooling))
            done[at] += len(part)
        step += 1
        result = await runner.submit(StepPlan(step, rows, starts))
        starts = []
        if beside:
            decoded.append(result.sampled[0].token_id)  # type: ignore[union-attr]
        assert not any(result.sampled[int(beside) :]), "a row that pools samples nothing"
        for index, at in enumerate(members, int(beside)):
            assert (index in result.pooled) == (done[at] == len(prompts[at][0]))
            if index in result.pooled:
                found[at] = result.pooled[index]
    if beside:
        job = Job(BESIDE, len(decoded))
        await generate(runner, [job])
        assert decoded == job.token_ids, "a vector was felt"
    return [found[at] for at in range(len(prompts))]


def expected_of(reference: Any, ids: Sequence[int], pooling: Pooling) -> Tensor:
    if pooling.kind is PoolingKind.LOGITS:
        with torch.inference_mode():
            found: Tensor = reference(torch.tensor([list(ids)])).logits[0, -1, list(pooling.token_ids)]
        return found
    return pooled(states(reference, list(ids)), MODES[pooling.kind])


def agree(found: Vector, expected: Tensor) -> None:
    """Compare with transformers' float32; the runner's weights and activations are float16."""
    assert found.dtype == np.float32
    largest = max(float(expected.abs().max()), 1.0)
    np.testing.assert_allclose(found, expected, atol=0.02 * largest, rtol=0)


@pytest.mark.parametrize("kind", PoolingKind)
async def test_a_vector_is_that_of_transformers_whatever_the_chunks(
    model: Model, reference: transformers.PreTrainedModel, make: Make, kind: PoolingKind
) -> None:
    runner = make(model)
    pooling = LOGITS if kind is PoolingKind.LOGITS else Pooling(kind)
    expected = expected_of(reference, IDS, pooling)
    for chunk, beside in ((40, False), (40, True), (13, True), (39, False), (39, True)):
        (found,) = await vectors(runner, [(IDS, pooling)], chunk, beside=beside)
        agree(found, expected)


@pytest.mark.parametrize("has_graphs", [True, False])
async def test_prompts_of_one_step_are_pooled_together(
    model: Model, reference: transformers.PreTrainedModel, make: Make, device: EmulatedDevice,
    monkeypatch: pytest.MonkeyPatch, has_graphs: bool,
) -> None:  # fmt: skip
    """With graphs, three short prompts and a decode; without, prompts that no graph has room for."""
    runner = make(model)
    if not has_graphs:
        monkeypatch.setattr(runner._steps, "padded", lambda decodes, prompts: None)
    asked = [(IDS[:7], LAST), (IDS[:21], LOGITS), (IDS[5:6], LAST), (IDS[9:25], MEAN)]
    asked = [asked[2], *asked[:2], asked[3]]  # a prompt of one token is computed like a decode
    replayed = device.replayed
    found = await vectors(runner, asked[:3], 64, beside=True)
    found += await vectors(runner, asked[3:], 64)
    for vector, (ids, pooling) in zip(found, asked, strict=True):
        agree(vector, expected_of(reference, ids, pooling))
    assert device.replayed > replayed or not has_graphs


async def test_states_and_logits_of_a_step_are_two_copies(
    model: Model, make: Make, device: EmulatedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = make(model)
    copies: list[int] = []
    pinned = device.pinned

    def note(num_bytes: int) -> Tensor:
        copies.append(num_bytes)
        return pinned(num_bytes)

    monkeypatch.setattr(device, "pinned", note)
    await vectors(runner, [(IDS[:7], LAST), (IDS[:9], LOGITS), (IDS[:20], LAST), (IDS[2:25], LOGITS)], 64)
    assert copies == [2 * 128 * 4, 2 * len(CHOSEN) * 4]


class Waiting(TorchFunctionMode):
    """Notes the calls for which torch waits until a GPU has done all that was launched before.

    Attributes:
        calls: Their functions.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        copies = func in (Tensor.to, Tensor.copy_) and not given.get("non_blocking")
        makes_there = func is torch.tensor and "device" in given
        if copies or makes_there or func in (Tensor.cpu, Tensor.item, Tensor.tolist):
            self.calls.append(func)
        return func(*args, **given)


async def test_only_a_vector_of_all_tokens_waits_for_the_step(model: Model, make: Make) -> None:
    runner = make(model)
    kinds = [LAST, LOGITS, MEAN]
    rows = [StepRow(at, IDS[:9], 0, [[at]], samples=True, pooling=kind) for at, kind in enumerate(kinds)]
    await runner.submit(StepPlan(0, rows, [SlotStart(at, GREEDY, 0, IDS[:9]) for at in range(3)]))
    with Waiting() as waiting:
        for row, waits in zip(rows, (False, False, True), strict=True):
            runner._rows.read([row])
            layout = plain_layout(runner._rows, [0])
            assert runner._vectors.take([row], layout) is not None
            assert bool(waiting.calls) is waits, f"{row.pooling}: {waiting.calls}"


async def test_log_probabilities_of_a_prompt_beside_change_no_score(
    model: Model, reference: transformers.PreTrainedModel, make: Make
) -> None:
    runner = make(model)
    starts = [SlotStart(slot, GREEDY, 0, IDS) for slot in range(3)]
    rows = [
        StepRow(0, IDS, 0, [[0, 1, 2]], samples=True, prompt_logprobs=0),
        StepRow(1, IDS[:9], 0, [[3]], samples=True, pooling=LOGITS),
        StepRow(2, IDS[:8], 0, [[4]], samples=True, pooling=LAST),
    ]
    result = await runner.submit(StepPlan(0, rows, starts))
    assert result.sampled[0] is not None and len(result.prompt_logprobs[0]) == len(IDS)
    assert result.sampled[0].token_id == int(states_logits(reference, IDS).argmax())
    agree(result.pooled[1], expected_of(reference, IDS[:9], LOGITS))
    agree(result.pooled[2], expected_of(reference, IDS[:8], LAST))


def states_logits(reference: Any, ids: list[int]) -> Tensor:
    with torch.inference_mode():
        found: Tensor = reference(torch.tensor([ids])).logits[0, -1]
    return found


async def test_a_last_norm_with_a_bias_is_applied(tmp_path: Path, make: Make) -> None:
    sizes = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2}
    reference = make_model("StableLm", **sizes, partial_rotary_factor=0.5)
    assert float(reference.model.norm.bias.detach().abs().max()) > 0.01
    runner = make(load_fp16(reference, tmp_path))
    for pooling in (LAST, MEAN):
        (found,) = await vectors(runner, [(IDS, pooling)], 13)
        agree(found, expected_of(reference, IDS, pooling))


async def test_a_vector_s_bits_do_not_depend_on_the_batch(model: Model, device: EmulatedDevice) -> None:
    size = plain_size(40, "float16")
    spec = spec_of_steps(LIMITS, is_batch_invariant=True)
    runner = CudaRunner(model, device, lambda free: size, spec)
    try:
        for pooling in (LAST, MEAN, LOGITS):
            (alone,) = await vectors(runner, [(IDS, pooling)], 40)
            again, *_ = await vectors(runner, [(IDS, pooling), (IDS[3:], LAST)], 13, beside=True)
            np.testing.assert_array_equal(again, alone)
    finally:
        runner.close()


async def test_a_slot_forgets_a_prompt_that_was_not_pooled_to_its_end(
    model: Model, reference: transformers.PreTrainedModel, make: Make
) -> None:
    runner = make(model)
    starts = [SlotStart(1, GREEDY, 0, IDS)]
    row = StepRow(1, IDS[:9], 0, [[4]], samples=False, pooling=MEAN)
    await runner.submit(StepPlan(0, [row], starts))
    behind = StepRow(1, IDS[9:12], 9, [[4]], samples=True, pooling=MEAN)
    with pytest.raises(ValueError, match="before position 9 have not been pooled"):
        await runner.submit(StepPlan(1, [behind], starts))
    (found,) = await vectors(runner, [(IDS, MEAN)], 13)
    agree(found, expected_of(reference, IDS, MEAN))


async def test_a_runner_without_logits_refuses_a_score(model: Model, make: Make) -> None:
    runner = make(model, has_logits=False)
    with pytest.raises(PlanError, match="without logits"):
        await vectors(runner, [(IDS, LOGITS)], 40)
    await vectors(runner, [(IDS, LAST)], 40)


@pytest.fixture
def loading(
    device: EmulatedDevice, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., AbstractAsyncContextManager[tuple[LoadedModel, CudaRunner]]]:
    """Return a function that loads a model's files onto the device."""
    monkeypatch.setattr("tgi_asgi.runner.load.find_device", lambda: device)

    @asynccontextmanager
    async def loaded(directory: Path, **settings: Any) -> AsyncIterator[tuple[LoadedModel, CudaRunner]]:
        values = {
            "dtype": "float16", "num_threads": 1, "thread_nice": 0, "max_batch_size": 3,
            "max_batch_prefill_tokens": 64, "max_total_tokens": 64,
        }  # fmt: skip
        files = files_of(directory)
        found = load(Settings(**{**values, **settings}), files)
        assert isinstance(found.runner, CudaRunner) and found.info.device == "cuda"
        try:
            yield found, found.runner
        finally:
            found.runner.close()

    return loaded


async def probe(runner: CudaRunner) -> int:
    """Submit the engine's probe; return the token that answers it."""
    row = StepRow(0, (0,), 0, [[0]], samples=True)
    result = await runner.submit(StepPlan(9, [row], [SlotStart(0, GREEDY, 0, (0,))]))
    assert result.sampled[0] is not None
    return result.sampled[0].token_id


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("mode", ["lasttoken", "mean_tokens"])
async def test_an_embedder_is_served_and_computes_no_logits(
    tmp_path: Path, loading: Any, device: EmulatedDevice, mode: str, tied: bool
) -> None:
    """As Qwen3-Embedding: its files name an architecture that generates, and have no head."""
    model = save_embedder(
        tmp_path, mode, architecture="Qwen3ForCausalLM", tie_word_embeddings=tied,
        modules=("Dense", "Normalize"), **WIDE,
    )  # fmt: skip
    async with loading(tmp_path) as (found, runner):
        embedding = found.info.embedding
        assert embedding is not None and not found.info.generates
        assert (embedding.dimensions, embedding.is_normalized) == (24, True)
        assert found.info.scoring is None
        logits = runner._steps.program.logits
        logits.fill_(7)
        for chunk in (40, 13):
            replayed = device.replayed
            (vector,) = await vectors(runner, [(IDS, embedding.pooling)], chunk)
            agree(vector, dense(tmp_path / "2_Dense", pooled(states(model, IDS), mode)))
            assert device.replayed > replayed
        assert await probe(runner) == 0
        assert bool((logits == 7).all())


@pytest.mark.parametrize("num_labels", [1, 2, 3, 11])
async def test_a_classifier_gives_its_labels_logits(tmp_path: Path, loading: Any, num_labels: int) -> None:
    model = save_classifier(tmp_path, num_labels, **WIDE)
    prompts = [IDS, IDS[:5], IDS[:17]]
    async with loading(tmp_path) as (found, runner):
        info = found.info
        assert info.classification is not None and not info.generates
        assert len(info.classification.labels) == num_labels
        assert (info.scoring is not None) == (num_labels <= 2)
        assert await probe(runner) == 0
        for chunk in (40, 13):
            asked = [(ids, info.classification.pooling) for ids in prompts[:2]]
            for vector, (ids, _) in zip(await vectors(runner, asked, chunk), asked, strict=True):
                with torch.inference_mode():
                    expected = model(torch.tensor([ids])).logits[0]
                agree(vector, expected)


async def test_a_model_that_generates_embeds_and_scores_beside(tmp_path: Path, loading: Any) -> None:
    model = save_embedder(tmp_path, None, is_bare=False, **WIDE)
    async with loading(tmp_path, pooling="mean", score_tokens="(,*") as (found, runner):
        info = found.info
        assert info.generates and info.embedding is not None and info.scoring is not None
        assert info.scoring.pooling.token_ids == (7, 9)
        for pooling in (info.embedding.pooling, info.scoring.pooling):
            (vector,) = await vectors(runner, [(IDS, pooling)], 33, beside=True)
            agree(vector, expected_of(model, IDS, pooling))


async def test_only_the_administrator_says_how_a_chat_model_embeds(tmp_path: Path, loading: Any) -> None:
    save_embedder(tmp_path, None, is_bare=False, **WIDE)
    async with loading(tmp_path) as (found, _):
        assert found.info.embedding is None and "--pooling" in found.info.why_no_pooling


async def test_the_server_embeds_texts_of_a_call_as_one_by_one(
    tmp_path: Path, device: EmulatedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_embedder(tmp_path, **WIDE)
    monkeypatch.setattr("tgi_asgi.runner.load.find_device", lambda: device)
    texts = ["short", "a-much-longer-text-" * 3, "x", "what-is-it", "y" * 40]
    async with pooled_server(tmp_path, dtype="float16", max_batch_size=4, max_total_tokens=128) as server:
        info = (await server.http.get("/info")).json()
        assert info["model_device_type"] == "cuda"
        together = (await server.post("/v1/embeddings", input=texts)).json()["data"]
        for text, found in zip(texts, together, strict=True):
            (alone,) = (await server.post("/v1/embeddings", input=text)).json()["data"]
            assert np.linalg.norm(found["embedding"]) == pytest.approx(1, abs=1e-3)
            np.testing.assert_allclose(found["embedding"], alone["embedding"], atol=0.01)
        refused = await server.post("/v1/completions", prompt="x", model="tiny")
        assert refused.status_code == 400 and "embeds" in refused.text
