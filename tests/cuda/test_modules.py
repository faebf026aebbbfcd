"""Modules of `transformers` on a GPU: their logits, as served and with float32 products, and their loading.

Without a GPU, a device apart from the host is used, so that a tensor on the wrong side fails as on a GPU.
"""

from __future__ import annotations

import base64
import logging
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import httpx
import numpy as np
import pytest
import torch

from tests.cuda import apart_device
from tests.cuda.emulated_device import EmulatedDevice
from tests.cuda.emulated_runner import SHAPE, make_device, require_emulation, save_with_tokenizer
from tests.emulation import bindings
from tests.models.generic.test_encoder_decoders import in_steps, random_pairs
from tests.models.generic.test_table import BUILDABLE, is_served
from tests.runner.test_encoders import vectors
from tests.support import architectures, encoder_decoders
from tests.support import vision_models as vision
from tests.support.architectures import made_once, random_ids
from tests.support.checkpoints import make_model, reference_logits, save
from tests.support.encoders import logits_of, save_encoder, states_of
from tests.support.encoders import random_ids as encoder_ids
from tests.support.families import CASES
from tests.support.family_files import checkpoint as family_files
from tests.support.family_files import reference as family_reference
from tests.support.family_scores import differences, score
from tests.support.generic import LENGTHS, open_generic, run_steps
from tests.support.pooling_models import files_of, pooled
from tests.support.pooling_server import pooled_server
from tests.support.quantised import save_quantised
from tests.support.runner_driver import GREEDY, Job, generate
from tests.support.vision_runs import load as load_vision
from tests.support.vision_runs import program_of, served
from tests.support.vision_runs import run as run_vision
from tests.support.vision_table import FAMILIES
from tgi_asgi import ops
from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats.sources import ModelFiles
from tgi_asgi.models.generic.encoder import EncoderModel
from tgi_asgi.models.generic.encoder_program import Prompt
from tgi_asgi.models.generic.model import GenericModel
from tgi_asgi.models.loading.open import OpenModel
from tgi_asgi.ops.cuda_direct import CudaDirect
from tgi_asgi.ops.cuda_quant import Repacking
from tgi_asgi.runner.encoder import EncoderRunner
from tgi_asgi.runner.load import load as load_served
from tgi_asgi.runner.plan import DeviceLost, SlotStart, StepPlan, StepRow
from tgi_asgi.runner.runner import HostRunner
from tgi_asgi.settings import Settings
from tgi_asgi.types import Pooling, PoolingKind

EQUAL = 1e-3  # of the largest logit, with float32 products; most are within 1e-6
Checkpoint = Callable[[str], Path]

# One of each kind that the kernels treat differently: experts, sinks, values narrower than keys, ALiBi,
# recurrent layers, and no cache.
USUAL = ("mixtral", "gpt_oss", "deepseek_v3", "bloom", "jamba", "openai-gpt")
FEW_IMAGES = ("ovis2", "smolvlm", "qwen3_vl", "gemma3", "mllama")

pytestmark = [
    pytest.mark.thorough,
    pytest.mark.filterwarnings("ignore"),  # of transformers' own code
]


def of_each(names: Sequence[str], usual: Sequence[str]) -> list[Any]:
    return [pytest.param(name, marks=() if name in usual else pytest.mark.models) for name in names]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    ops.configure_threads(1, nice=0, pin=False)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return made_once(tmp_path_factory.mktemp("architectures"), architectures.make)


@pytest.fixture
def device() -> torch.device:
    return apart_device.find_device()


def load(folder: Path, arithmetic: Repacking, *, is_exact: bool = True) -> GenericModel:
    """Load a checkpoint as a module, even if it has the common shape."""
    with open_generic(folder) as opened:
        model = opened.load(arithmetic, 128, None, lambda config: False)
    assert isinstance(model, GenericModel)
    model.replaced.mode.is_exact = is_exact
    return model


@pytest.mark.parametrize("name", of_each([each for each in BUILDABLE if is_served(each)], USUAL))
def test_all_tokens_have_the_logits_of_transformers(
    name: str, checkpoint: Checkpoint, device: torch.device
) -> None:
    folder = checkpoint(name)
    model = load(folder, Repacking(torch.float32, device))
    ids = [random_ids(length, seed) for seed, length in enumerate(LENGTHS)]
    assert run_steps(model, ids, architectures.references(folder, ids)) < EQUAL


@pytest.mark.parametrize("name", of_each(list(FAMILIES), FEW_IMAGES))
def test_images_have_the_logits_of_transformers(name: str, tmp_path: Path, device: torch.device) -> None:
    if name.startswith("gemma4"):
        reason = "in this version of transformers Gemma 4's processor needs torchvision"
        pytest.importorskip(
            "transformers.models.gemma4.processing_gemma4", reason=reason, exc_type=ImportError
        )
    vision.make(name, tmp_path)
    answer = list(range(120, 124))
    parts: list[list[Any]] = [
        ["what is ", vision.picture(50, 30), " and ", vision.picture(40, 70, 1), " this?"],
        ["no picture here, is there"],
    ]
    prompts = [vision.prompt_of(name, tmp_path, each) for each in parts]
    reference = vision.open_reference(tmp_path)
    wanted = [vision.reference(tmp_path, prompt, answer, reference) for prompt in prompts]
    model = load_vision(tmp_path, arithmetic=Repacking(torch.float32, device))
    model.replaced.mode.is_exact = True
    found, _ = run_vision(model, [(prompt, answer) for prompt in prompts], [1000, 7])
    for logits, expected in zip(found, wanted, strict=True):
        assert np.abs(logits - expected).max() / np.abs(expected).max() < EQUAL


@pytest.mark.parametrize("name", of_each(["t5", "bart", "led", "m2m_100", "encoder-decoder"], ["bart"]))
def test_answers_of_encoder_decoders_are_those_of_transformers(
    name: str, tmp_path: Path, device: torch.device
) -> None:
    encoder_decoders.make(name, tmp_path)
    pairs = random_pairs()
    model = load(tmp_path, Repacking(torch.float32, device))
    references = encoder_decoders.references(tmp_path, pairs)
    for found, expected in zip(in_steps(model, pairs), references, strict=True):
        assert np.abs(found - expected).max() / np.abs(expected).max() < EQUAL


@pytest.mark.parametrize(
    ("kind", "head"),
    [
        ("Bert", "ForSequenceClassification"),
        ("ModernBert", "Model"),
        pytest.param("XLMRoberta", "Model", marks=pytest.mark.models),
        pytest.param("MPNet", "Model", marks=pytest.mark.models),
        pytest.param("DebertaV2", "ForSequenceClassification", marks=pytest.mark.models),
    ],
)
def test_encoders_give_the_states_and_labels_of_transformers(
    kind: str, head: str, tmp_path: Path, device: torch.device
) -> None:
    reference = save_encoder(tmp_path, kind, head)
    prompts = [encoder_ids(length, length) for length in (5, 100, 33)]
    with OpenModel(files_of(tmp_path), model_impl="transformers") as opened:
        model = opened.load(Repacking(torch.float32, device), 128)
    assert isinstance(model, EncoderModel)
    model.replaced.mode.is_exact = True
    program = model.program(max_tokens=256, max_rows=4, max_context=128)
    for ids, (states, labels) in zip(prompts, program.run([Prompt(ids) for ids in prompts]), strict=True):
        np.testing.assert_allclose(states, states_of(reference, ids), atol=1e-4 * np.abs(states).max())
        if labels is not None:
            np.testing.assert_allclose(labels, logits_of(reference, ids), atol=1e-4)
    assert (labels is not None) == head.endswith("Classification")


def test_an_encoder_is_served_as_a_module(tmp_path: Path, found_device: EmulatedDevice) -> None:
    reference = save_encoder(tmp_path, "Bert", "Model", "mean_tokens")
    settings = Settings(thread_nice=0, num_threads=1, max_batch_prefill_tokens=512)
    model = load_served(settings, files_of(tmp_path), lambda *_: None)
    runner, prompts = model.runner, [encoder_ids(length, length) for length in (5, 100, 33)]
    assert isinstance(runner, EncoderRunner)
    assert (model.info.device, model.info.implementation) == ("cuda", "transformers")
    assert (runner.num_threads, runner.progress) == (0, None)
    try:
        found = vectors(runner, Pooling(PoolingKind.MEAN), prompts)
    finally:
        runner.close()
    for ids, vector in zip(prompts, found, strict=True):
        expected = pooled(states_of(reference, ids), "mean_tokens").numpy()
        assert vector @ expected > 0.999 * np.linalg.norm(vector) * np.linalg.norm(expected)


@pytest.mark.parametrize("kind", ["plain", "awq", "experts"])
def test_kernels_compute_what_they_can(kind: str, tmp_path: Path, device: torch.device) -> None:
    """With 16-bit products and cache, the heads of 64 that the attention kernels support."""
    require_emulation("it watches the launches")
    changes: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2} if kind == "experts" else {}
    reference = make_model("Mixtral" if kind == "experts" else "Llama", **SHAPE, **changes)
    if kind == "awq":
        save_quantised(reference, tmp_path, "awq")
    else:
        save(reference, tmp_path)
    model = load(tmp_path, Repacking(torch.float16, device), is_exact=False)
    ids = [[each % 160 for each in random_ids(length, seed)] for seed, length in enumerate(LENGTHS)]
    expected = [reference_logits(reference, each).numpy() for each in ids]
    launched: set[str] = set()
    with bindings.observed(launched.add):
        difference = run_steps(model, ids, expected, kv_dtype="float16")
    assert difference < 0.02
    attention = {"attention_plan", "attention_decode", "attention_prefill"}
    products = {
        "plain": {"linear"},
        "awq": {"quant_linear", "linear"},
        "experts": {"experts_plan", "experts_product", "experts_sum", "linear"},
    }
    assert attention | products[kind] <= launched


@pytest.mark.parametrize("fault", ["no numbers", "noise"])
def test_the_kernels_that_serve_are_tried_at_load(
    fault: str, tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """Products in float32, which the other check compares, are as they should be."""
    original = CudaDirect._product

    def product(kernels: CudaDirect, made: Any, x: torch.Tensor, is_exact: bool) -> torch.Tensor:
        rows = original(kernels, made, x, is_exact)
        return rows if is_exact else rows * torch.nan if fault == "no numbers" else rows * 3

    save(make_model(**SHAPE), tmp_path)
    monkeypatch.setattr(CudaDirect, "_product", product)
    if fault == "no numbers":
        with pytest.raises(ModelLoadError, match="logits are not finite in 16 bits"):
            load(tmp_path, Repacking(torch.float16, device))
        return
    load(tmp_path, Repacking(torch.float16, device))
    assert "logits of random tokens of LlamaForCausalLM differ by" in caplog.text


def test_a_lack_of_memory_in_a_check_is_none_of_the_model_s_faults(
    tmp_path: Path, found_device: EmulatedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = torch.OutOfMemoryError("CUDA out of memory")
    save_with_tokenizer(make_model("GPTJ", n_embd=64, n_head=4, n_layer=1, rotary_dim=8), tmp_path)
    monkeypatch.setattr(CudaDirect, "linear", Mock(side_effect=error))
    files = ModelFiles("tiny", None, "directory", tmp_path)
    with pytest.raises(ModelLoadError, match="does not fit the GPU's memory: use a smaller one"):
        load_served(Settings(thread_nice=0, num_threads=1, max_batch_size=2), files, lambda *_: None)


@pytest.fixture
def found_device(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> EmulatedDevice:
    """The device as the server finds it."""
    made = make_device() if device.type == "cuda" else apart_device.ApartDevice()
    monkeypatch.setattr("tgi_asgi.runner.load.find_device", lambda: made)
    return made


@pytest.mark.parametrize("name", ["deepseek_v2", "lfm2"])
def test_a_family_without_kernels_is_served_as_a_module(
    name: str, found_device: EmulatedDevice, caplog: pytest.LogCaptureFixture
) -> None:
    (case,) = (case for case in CASES if case.name == name)
    found = family_reference(case)
    with caplog.at_level(logging.INFO):
        apart = differences(score(case, family_files(case), found, "float16"), found)
    assert len(apart) == len(found.all_ids) - 1, "another token was sampled"
    assert found.rounding is not None
    assert apart.max() <= max(0.05, found.rounding.max() / 2)
    assert "which the GPU kernels do not have yet" in caplog.text
    assert "runs by the code of transformers" in caplog.text


async def test_a_second_prompt_resumes_from_a_kept_state(found_device: EmulatedDevice) -> None:
    (case,) = (case for case in CASES if case.name == "lfm2")
    prompt = [3 + number * 5 % 90 for number in range(40)]
    body = {"model": "tiny", "temperature": 0, "max_tokens": 3, "return_token_ids": True, "ignore_eos": True}
    settings = {"dtype": "auto", "max_total_tokens": 200, "max_kept_states": 20}
    async with pooled_server(family_files(case).path, **settings) as server:
        answers = [(await server.post("/v1/completions", prompt=prompt, **body)).json() for _ in range(2)]
    cached = [answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in answers]
    assert cached == [0, 32]
    first, second = (answer["choices"][0]["token_ids"] for answer in answers)
    assert first == second


async def test_a_chat_about_an_image_is_answered_over_http(
    tmp_path: Path, found_device: EmulatedDevice
) -> None:
    vision.make("smolvlm", tmp_path)
    data = BytesIO()
    vision.picture(50, 30).save(data, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "hi"}]
    body = {"messages": [{"role": "user", "content": parts}], "max_tokens": 5, "temperature": 0}
    async with served(tmp_path, dtype="auto") as (address, app), httpx.AsyncClient(base_url=address) as http:
        assert program_of(app).encodings._tower.backend.device == found_device.device
        info = (await http.get("/info")).json()
        assert (info["model_device_type"], info["model_impl"]) == ("cuda", "transformers")
        answers = [(await http.post("/v1/chat/completions", json=body, timeout=60)).json() for _ in range(2)]
    first, second = (answer["choices"][0]["message"]["content"] for answer in answers)
    assert first == second != ""
    assert answers[0]["usage"]["completion_tokens"] == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_invariant": True}, "--batch-invariant: .* products that depend on the whole batch"),
        ({"lora_adapters": "a=b"}, "LoRA adapters: .* cannot choose one"),
        ({"kv_cache_dtype": "fp8_e4m3fn"}, "--kv-cache-dtype fp8_e4m3fn: .* use auto"),
        ({"num_shard": 2}, "--num-shard 2: .* which is not split"),
        ({"dtype": "float32"}, "--dtype float32 is not supported on a GPU"),
    ],
)
def test_settings_that_a_module_does_not_honour_are_refused_before_weights_are_read(
    changes: dict[str, Any], message: str, checkpoint: Checkpoint, tmp_path: Path,
    found_device: EmulatedDevice,
) -> None:  # fmt: skip
    for file in checkpoint("gptj").glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    settings = Settings(thread_nice=0, num_threads=1, **changes)
    with pytest.raises(ModelLoadError, match=message):
        load_served(settings, ModelFiles("tiny", None, "directory", tmp_path), lambda *_: None)


def test_the_cache_leaves_room_for_the_largest_step(
    checkpoint: Checkpoint, found_device: EmulatedDevice
) -> None:
    files = ModelFiles("tiny", None, "directory", checkpoint("gptj"))
    settings = Settings(thread_nice=0, num_threads=1, max_batch_size=2, max_batch_prefill_tokens=64)
    found_device.peak = (1 << 30) - (1 << 27) - 100_000  # of the free GiB, and an eighth is kept
    model = load_served(settings, files, lambda *_: None)
    model.runner.close()
    assert 0 < model.info.kv_bytes < 100_000
    found_device.peak += 100_000
    with pytest.raises(ModelLoadError, match=r"the largest step takes 0.9 GiB, 1.0 GiB are free on the GPU"):
        load_served(settings, files, lambda *_: None)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("CUDA error: an illegal memory access"), DeviceLost),
        (torch.OutOfMemoryError("CUDA out of memory"), MemoryError),
        (ValueError("a module's own"), ValueError),
    ],
)
async def test_errors_of_a_step_say_whether_the_device_is_lost(
    error: Exception, expected: type[Exception], checkpoint: Checkpoint, found_device: EmulatedDevice,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if expected is DeviceLost:
        require_emulation("a real device is not lost")
    files = ModelFiles("tiny", None, "directory", checkpoint("gptj"))
    settings = Settings(thread_nice=0, num_threads=1, max_batch_size=2, max_batch_prefill_tokens=64)
    runner = load_served(settings, files, lambda *_: None).runner
    assert isinstance(runner, HostRunner)
    assert (runner.num_threads, runner.progress, runner.traits.windows) == (0, None, (None,))
    plan = StepPlan(0, [StepRow(0, [5, 6, 7], 0, [[0]], True)], [SlotStart(0, GREEDY, 0, [5, 6, 7])])
    try:
        with monkeypatch.context() as failing:
            failing.setattr(runner._program, "run_and_sample", Mock(side_effect=error))
            with pytest.raises(expected):
                await runner.submit(plan)
        if expected is DeviceLost:
            with pytest.raises(DeviceLost):
                await runner.submit(plan)
        else:
            result = await runner.submit(plan)
            assert result.sampled[0] is not None
    finally:
        runner.close()


async def test_a_module_s_answers_and_scores_are_those_of_transformers(
    checkpoint: Checkpoint, found_device: EmulatedDevice
) -> None:
    files = ModelFiles("tiny", None, "directory", checkpoint("gptj"))
    settings = Settings(thread_nice=0, num_threads=1, max_batch_size=4, max_batch_prefill_tokens=64)
    runner = load_served(settings, files, lambda *_: None).runner
    try:
        prompts = [random_ids(21, 1), random_ids(9, 2)]
        jobs = [Job(prompt, 6, wants_prompt_logprobs=0) for prompt in prompts]
        await generate(runner, jobs, chunk=16)
    finally:
        runner.close()
    for job in jobs:
        whole = [*job.prompt_ids, *job.token_ids]
        logits = torch.from_numpy(architectures.reference(checkpoint("gptj"), whole)).double()
        scores = logits.log_softmax(-1)
        for row, token_id in zip(scores[len(job.prompt_ids) - 1 :], job.token_ids, strict=False):
            assert float(row[token_id]) > float(row.max()) - 0.1
        assert len(job.prompt_logprobs) == len(job.prompt_ids)
        for position, (found, _) in enumerate(job.prompt_logprobs[1:], 1):
            expected = float(scores[position - 1, job.prompt_ids[position]])
            assert found == pytest.approx(expected, abs=0.1)
