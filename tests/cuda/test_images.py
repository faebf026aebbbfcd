"""Vision models whose text the native kernels compute on a GPU, emulated, against `transformers`.

Heads have 64 dims, the fewest that the kernels take. Steps with images are launched call by call, the others
replay graphs.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from tests.cuda import apart_device
from tests.cuda.emulated_device import EmulatedDevice, Event
from tests.cuda.emulated_runner import make_device
from tests.cuda.emulated_shards import ShardDevice
from tests.emulation import library
from tests.support import vision_models as vision
from tests.support.runner_driver import Job, generate
from tests.support.vision_chats import Part, chatting
from tests.support.vision_models import picture
from tests.support.vision_runs import load_native
from tests.support.vision_table import FAMILIES
from tgi_asgi.engine.budget import TokenBudget
from tgi_asgi.formats.sources import ModelFiles
from tgi_asgi.models.generic.backend import CudaBackend
from tgi_asgi.models.generic.vision.native import NativeImages
from tgi_asgi.ops import DeviceRows
from tgi_asgi.ops.cuda import CudaProgram
from tgi_asgi.ops.cuda_image_rows import OwnAngles, place_rows
from tgi_asgi.ops.cuda_quant import Repacking
from tgi_asgi.runner.cuda import CudaRunner
from tgi_asgi.runner.cuda_device import Command
from tgi_asgi.runner.cuda_images import CudaImages
from tgi_asgi.runner.cuda_layout import plain_layout
from tgi_asgi.runner.cuda_prepared import PreparedSteps
from tgi_asgi.runner.inputs import StepInputs
from tgi_asgi.runner.load import LoadedModel, load
from tgi_asgi.runner.plan import RunnerTraits, SlotStart, StepPlan, StepResult, StepRow
from tgi_asgi.settings import Settings
from tgi_asgi.types import SamplingParams

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers' own code

SCORED = SamplingParams(temperature=0.0, logprobs=3)
TOLERANCE = 0.05  # of a log-probability, in float16
_WIDE = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64}
_SECTIONS = [16, 8, 8]  # pairs of dims that turn by each axis, if all of a head's do


def _wide(name: str) -> dict[str, Any]:
    """Return a family's configuration with a text model of wide heads, whose pairs turn by three axes."""
    config = FAMILIES[name].config
    text, tower = {**config["text_config"], **_WIDE}, dict(config["vision_config"])
    rope = text.get("rope_parameters", {})
    if "mrope_section" in rope:
        share = rope.get("partial_rotary_factor", 1.0)
        text["rope_parameters"] = {**rope, "mrope_section": [int(pairs * share) for pairs in _SECTIONS]}
        tower["hidden_size" if name == "qwen2_vl" else "out_hidden_size"] = text["hidden_size"]
    return {**config, "text_config": text, "vision_config": tower}


@pytest.fixture
def folder_of(tmp_path: Path) -> Callable[[str], Path]:
    def make(name: str) -> Path:
        family = FAMILIES[name]
        vision.make_family(name, dataclasses.replace(family, config=_wide(name)), tmp_path)
        return tmp_path

    return make


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> EmulatedDevice:
    device = make_device()
    monkeypatch.setattr("tgi_asgi.runner.load.find_device", lambda: device)
    return device


def serve(folder: Path, **changes: Any) -> LoadedModel:
    settings: Mapping[str, Any] = {
        "dtype": "float16", "num_threads": 1, "thread_nice": 0, "max_batch_size": 3,
        "max_batch_prefill_tokens": 256, "max_total_tokens": 512, **changes,
    }  # fmt: skip
    return load(Settings(**settings), ModelFiles("m", None, "directory", folder), lambda *call: None)


@pytest.mark.parametrize(
    "name",
    [
        "qwen3_vl",  # positions with three axes, and rows for deeper layers
        pytest.param("llava", marks=pytest.mark.thorough),
        pytest.param("qwen2_vl", marks=pytest.mark.thorough),
        pytest.param("smolvlm", marks=pytest.mark.models),
        pytest.param("qwen2_5_vl", marks=pytest.mark.models),
        pytest.param("glm4v", marks=pytest.mark.models),  # neighbouring dims turn together
        pytest.param("granite_vision", marks=pytest.mark.models),  # a factor on all rows
    ],
)
async def test_log_probabilities_are_those_of_transformers(
    name: str, folder_of: Callable[[str], Path], device: EmulatedDevice
) -> None:
    await compare(name, folder_of(name), device)


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["qwen3_vl", pytest.param("llava", marks=pytest.mark.models)])
async def test_two_devices_share_the_images_of_one(
    name: str, folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first encodes images; the other gets their rows, and the rows of the rotary table."""
    library.require()
    device = ShardDevice(0)
    monkeypatch.setattr("tgi_asgi.runner.load.find_device", lambda: device)
    await compare(name, folder_of(name), device, num_shard=2)


async def compare(name: str, folder: Path, device: EmulatedDevice, **changes: Any) -> None:
    texts: list[list[Part]] = [
        ["what is ", picture(50, 30), " and ", picture(40, 70, 1), " this?"],
        ["no picture here, is there"],
        ["one ", picture(66, 33, 2), "?"],
    ]
    prompts = [vision.prompt_of(name, folder, parts) for parts in texts]
    jobs = [
        Job(
            prompt.ids,
            5,
            SCORED,
            wants_prompt_logprobs=None if at == 2 else 3,
            start={"images": prompt.images},
        )
        for at, prompt in enumerate(prompts)
    ]
    loaded = serve(folder, **changes)
    try:
        assert loaded.info.implementation == "native"
        await generate(loaded.runner, jobs, chunk=23)
    finally:
        loaded.runner.close()
    assert device.replayed > 0
    model = vision.open_reference(folder)
    for prompt, job in zip(prompts, jobs, strict=True):
        logits = vision.reference(folder, prompt, job.token_ids, model)
        wanted = torch.from_numpy(logits).double().log_softmax(-1)
        first = len(prompt.ids) - 1
        for row, sampled in zip(wanted[first:], job.sampled, strict=False):
            assert float(row[sampled.token_id]) > float(row.max()) - TOLERANCE, "not the best token"
            assert sampled.logprob == pytest.approx(float(row[sampled.token_id]), abs=TOLERANCE)
        for row, (_, top) in zip(wanted, job.prompt_logprobs[1:], strict=False):
            assert dict(top) == pytest.approx({token: float(row[token]) for token, _ in top}, abs=TOLERANCE)


@pytest.mark.thorough
@pytest.mark.parametrize("fault", ["no rows", "no axes", "no shift", "prepared"])
async def test_a_fault_shows(
    fault: str, folder_of: Callable[[str], Path], device: EmulatedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fault == "no rows":
        monkeypatch.setattr("tgi_asgi.ops.cuda.place_rows", lambda *operands, level: None)
    elif fault == "no axes":
        monkeypatch.setattr(CudaImages, "_turn", lambda *given: (None, None))
    elif fault == "prepared":  # which steps are that no longer knows of an image
        monkeypatch.setattr(PreparedSteps, "_put", lambda steps, start: None)
    else:
        monkeypatch.setattr(CudaImages, "start", _start_without_shift)
    with pytest.raises(AssertionError):
        await compare("qwen3_vl", folder_of("qwen3_vl"), device)


def _start_without_shift(
    images: CudaImages, start: SlotStart, begin: Callable[[CudaImages, SlotStart], None] = CudaImages.start
) -> None:
    begin(images, start)
    images._shifts[:] = 0


async def test_text_alone_needs_no_python(
    folder_of: Callable[[str], Path], device: EmulatedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sequence without images, be it that the model accepts some and that others have had some."""
    folder = folder_of("llava")
    loaded = serve(folder)
    runner = loaded.runner
    assert isinstance(runner, CudaRunner) and runner._prepared_steps is not None
    launched: list[Any] = []
    launch = runner._launch

    def note(step: Any) -> Any:
        launched.append(step)
        return launch(step)

    try:
        prompt = vision.prompt_of("llava", folder, ["one ", picture(66, 33, 2), "?"])
        await generate(runner, [Job(prompt.ids, 2, start={"images": prompt.images})])
        monkeypatch.setattr(runner, "_launch", note)
        await generate(runner, [Job([5, 6, 7], 9), Job([8], 9)])
        assert len(launched) == 1, "the one that starts them"
    finally:
        runner.close()


class LateEvent(Event):
    """Passes when the device has done what was submitted before it."""

    at_s = 0.0

    def synchronize(self) -> None:
        time.sleep(max(self.at_s - time.monotonic(), 0.0))


class SlowDevice(EmulatedDevice):
    """A device that takes a while for each step; until then the host goes on."""

    step_s = 0.0
    ends_at_s = 0.0

    def event(self) -> Event:
        return LateEvent()

    def submit(self, commands: Sequence[Command]) -> None:
        super().submit(commands)
        if any(not isinstance(command, LateEvent) for command in commands):
            self.ends_at_s = max(self.ends_at_s, time.monotonic()) + self.step_s
        for command in commands:
            if isinstance(command, LateEvent):
                command.at_s = self.ends_at_s

    def wait(self) -> None:
        """Wait as the backend does on a GPU."""
        time.sleep(max(self.ends_at_s - time.monotonic(), 0.0))


@pytest.mark.thorough
async def test_the_time_of_steps_is_not_the_tower_s(
    folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tower waits for the device, which may still compute the step before: that is the step's time."""
    make_device()
    device = SlowDevice()
    monkeypatch.setattr("tgi_asgi.runner.load.find_device", lambda: device)
    monkeypatch.setattr(CudaBackend, "wait", lambda backend: device.wait())
    observed: list[float] = []
    observe = TokenBudget.observe

    def noted(budget: TokenBudget, size: Any, duration_s: float, **more: Any) -> None:
        observed.append(duration_s)
        observe(budget, size, duration_s, **more)

    monkeypatch.setattr(TokenBudget, "observe", noted)
    async with chatting(folder_of("llava"), dtype="float16", speculate=0) as (ask, _):
        await ask(["hello"], max_tokens=2)
        device.step_s = 0.1
        beside = asyncio.create_task(ask(["no image"], max_tokens=25, extra_body={"ignore_eos": True}))
        await asyncio.sleep(0.5)
        observed.clear()
        await ask(["what is ", picture(50, 30), " this?"], max_tokens=2)
        found = observed.copy()
        device.step_s = 0.0
        await beside
    assert len(found) < 12, "encoding takes a step for each piece"
    assert min(found) > 0.03, "0.1 s, but a result may be late and the next one not"


@pytest.mark.thorough
async def test_answers_with_images_over_http(
    folder_of: Callable[[str], Path], device: EmulatedDevice
) -> None:
    """Images are encoded ahead of the prompts; drafts, choices and lost blocks change no answer."""
    turns: list[list[Part]] = [
        ["what is ", picture(50, 30), " and ", picture(40, 70, 1), " this?"],
        ["no picture here"],
    ]
    folder = folder_of("qwen2_vl")
    given: dict[str, Any] = {"max_tokens": 48, "extra_body": {"ignore_eos": True}}
    options: dict[str, Any] = {"dtype": "float16", "batch_invariant": True}
    async with chatting(folder, speculate=0, **options) as (ask, app):
        assert app.context.served is not None and app.context.served.info.implementation == "native"
        wanted = [(await ask(turn, **given)).choices[0].message.content for turn in turns]
        longest = max([(await ask(turn, max_tokens=1)).usage.prompt_tokens for turn in turns]) + 48
    room = {"max_batch_total_tokens": -(-longest // 16) * 16 + 32, "max_total_tokens": longest + 1}
    async with chatting(folder, speculate=3, max_batch_prefill_tokens=64, **room, **options) as (ask, app):
        found = await asyncio.gather(*(ask(turn, n=2, **given) for turn in turns))
        assert app.context.served is not None and app.context.served.stats is not None
        assert app.context.served.stats.preemptions > 0
    assert [[each.message.content for each in answer.choices] for answer in found] == [
        [answer] * 2 for answer in wanted
    ]


def test_rows_and_angles_are_written_on_the_device(folder_of: Callable[[str], Path]) -> None:
    """On a device whose tensors are not the host's: the emulated one would not notice a mix."""
    device = apart_device.find_device()
    folder = folder_of("qwen3_vl")
    model = load_native(folder, Repacking(torch.float32, device))
    assert model is not None and isinstance(model.images, NativeImages) and model.turns_by is not None
    angles = OwnAngles(model.turns_by, 64, device)
    program = cast(CudaProgram, SimpleNamespace(device=device, own_angles=angles))
    images = CudaImages(model.images, program, image_cache=1 << 20, num_slots=2)
    prompt = vision.prompt_of("qwen3_vl", folder, ["what is ", picture(50, 30), " this?"])
    images.start(SlotStart(1, SCORED, 0, prompt.ids, images=prompt.images))
    result = StepResult(0, [])
    images.advance(StepPlan(0, [], images=list(prompt.images), image_budget_s=60.0), result)
    assert result.is_encoded == [True]
    rows = [StepRow(1, prompt.ids, 0, [[3, 4, 5, 6]], samples=True)]
    traits = RunnerTraits(num_blocks=8, block_size=16, max_batch_size=2, max_step_tokens=64)
    reading = DeviceRows(StepRow, StepInputs.of(traits, model.config.vocab_size, 64).limits, False)
    reading.start(1, len(prompt.ids))
    reading.read(rows)
    layout = plain_layout(reading, [0])
    inputs = np.zeros(layout.shape.num_bytes, np.uint8)
    reading.write(inputs, layout.shape.sections.firsts, layout.shape.sizes, [0], [], [])
    brought = images.place(rows, None, layout, inputs)
    assert brought is not None and brought.tokens.device == brought.rows.device == device
    positions = layout.shape.sections.arrays(inputs)["positions"]
    first = len(model.turns_by.cos)
    turned = positions[positions >= first] - first
    assert turned.tolist() == list(range(len(turned))) and len(turned) > 0
    x = torch.zeros(len(prompt.ids), model.config.hidden_size, device=device)
    for level in range(len(brought.rows)):
        place_rows(x, brought.tokens, brought.rows, level)
    assert x.to("cpu").abs().sum(-1).count_nonzero() == len(brought.tokens)
    assert angles.cos[first : first + len(turned)].to("cpu").abs().sum() > 0
