"""Models with quantised routed experts on the CUDA runner with emulated kernels, against `transformers`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.cuda.emulated_device import EmulatedDevice
from tests.cuda.emulated_runner import (
    FP16,
    PROMPT,
    assert_matches_reference,
    make_device,
    make_runner,
    require_emulation,
)
from tests.support import gguf_models
from tests.support.checkpoints import load_model, save
from tests.support.family_scores import differences, score
from tests.support.random_weights import E2M1
from tests.support.runner_driver import Job, generate
from tgi_asgi import ops
from tgi_asgi.models.decoder import Decoder
from tgi_asgi.ops.cuda_quant import CudaQuantMatrix, DeviceExperts, DeviceMatrix, Repacking, joined, repack
from tgi_asgi.types import SamplingParams

pytestmark = pytest.mark.thorough

GREEDY = SamplingParams(temperature=0.0, logprobs=0)


@pytest.fixture
def device() -> EmulatedDevice:
    return make_device()


@pytest.mark.parametrize(
    "formats",
    [{"*gate_up_proj*": "Q4_K", "*down_proj*": "Q6_K"}, {"*experts*": "MXFP4"}, {"*experts*": "Q8_0"}],
    ids=lambda formats: "-".join(formats.values()),
)
def test_experts_of_gguf_files_are_multiplied_by_their_codes(
    tmp_path: Path, device: EmulatedDevice, monkeypatch: pytest.MonkeyPatch, made: list[DeviceExperts],
    formats: dict[str, str],
) -> None:  # fmt: skip
    monkeypatch.setattr("tgi_asgi.runner.load.find_device", lambda: device)
    monkeypatch.setattr(gguf_models, "NUM_PROMPT_TOKENS", 45)
    model = gguf_models.make(gguf_models.QWEN3_MOE, tmp_path, {**formats, "*": "F32"})
    apart = differences(score(model.case, model.files, model.reference, "float16"), model.reference)
    assert len(apart) == len(model.reference.all_ids) - 1, "another token was sampled"
    assert apart.max() < 0.05
    assert device.replayed > 0
    matrices = [part.matrix for layer in made for part in (layer.gate_up, layer.down)]
    bits = {"Q4_K": 4, "Q6_K": 8, "MXFP4": 4, "Q8_0": 8}
    assert {matrix.bits for matrix in matrices if isinstance(matrix, CudaQuantMatrix)} == {
        bits[name] for name in formats.values()
    }


def random_mxfp4(*shape: int) -> tuple[dict[str, Tensor], Tensor]:
    """Return blocks and scales of matrices [experts, rows, columns] as gpt-oss has them, and the values."""
    *outer, columns = shape
    codes = torch.randint(16, (*outer, columns // 32, 32), dtype=torch.uint8)
    exponents = torch.randint(121, 124, (*outer, columns // 32), dtype=torch.uint8)
    values = E2M1[codes.long()] * torch.exp2(exponents.float() - 127)[..., None]
    return {"blocks": codes[..., 0::2] | codes[..., 1::2] << 4, "scales": exponents}, values.view(shape)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[DeviceExperts]:
    """The experts of each layer that is loaded, in order."""
    found: list[DeviceExperts] = []
    make = Repacking.experts

    def noted(self: Repacking, *parts: Any) -> DeviceExperts:
        found.append(make(self, *parts))
        return found[-1]

    monkeypatch.setattr(Repacking, "experts", noted)
    return found


async def test_gpt_oss_keeps_its_experts_in_four_bits(
    tmp_path: Path, device: EmulatedDevice, made: list[DeviceExperts]
) -> None:
    config = transformers.GptOssConfig(
        vocab_size=300, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=64, num_local_experts=4, num_experts_per_tok=2, sliding_window=16,
        max_position_embeddings=256, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    config._attn_implementation = "eager"
    torch.manual_seed(3)
    reference: Any = transformers.GptOssForCausalLM(config).eval()
    files = save(reference, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for index, layer in enumerate(reference.model.layers):
        for name, rows in (("gate_up_proj", 128), ("down_proj", 64)):
            key = f"model.layers.{index}.mlp.experts.{name}"
            stored, values = random_mxfp4(4, rows, 64)
            getattr(layer.mlp.experts, name).data.copy_(values.transpose(1, 2))
            del tensors[key]
            tensors |= {f"{key}_{kind}": part.contiguous() for kind, part in stored.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    path = tmp_path / "config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": "mxfp4"}})
    )
    model = load_model(files, Repacking(FP16), max_positions=256)
    assert isinstance(model, Decoder)
    assert len(made) == 2
    for matrix in (part.matrix for layer in made for part in (layer.gate_up, layer.down)):
        assert isinstance(matrix, CudaQuantMatrix)
        assert matrix.nbytes * 8 == matrix.shape[0] * matrix.shape[1] * 4.25
    runner = make_runner(model, device)
    try:
        jobs = [Job(PROMPT * 2, 3, GREEDY), Job(PROMPT[:5], 4)]
        await generate(runner, jobs, chunk=30)
    finally:
        runner.close()
    assert_matches_reference(jobs[0], reference)


def matrix(kind: str, rows: int = 3) -> Tensor | CudaQuantMatrix:
    if kind == "plain":
        return torch.ones(rows, 64, dtype=FP16)
    return repack([ops.WeightSource(_zeros(kind, rows), kind, (rows, 64))])


def _zeros(kind: str, rows: int) -> Any:
    from tgi_asgi.ops.formats import FORMATS

    return torch.zeros(rows * 64 // 32 * FORMATS[kind].block_bytes, dtype=torch.uint8).numpy()


def test_experts_stay_in_codes_only_if_all_are_of_one_kind(device: EmulatedDevice) -> None:
    require_emulation("these matrices are the host's")
    both = joined([matrix("Q4_0"), matrix("Q4_0")], FP16)
    assert isinstance(both, CudaQuantMatrix) and both.shape == (6, 64)
    for kinds in (("Q4_0", "Q4_1"), ("Q8_0", "plain"), ("plain", "plain")):
        found = joined([matrix(kind) for kind in kinds], FP16)
        assert isinstance(found, Tensor) and found.shape == (6, 64) and found.dtype is FP16
    coded = matrix("Q4_0")
    assert isinstance(coded, CudaQuantMatrix)
    order = CudaQuantMatrix(coded.codes, coded.scales, None, (3, 64), 4, 8, torch.arange(64).flip(0))
    assert isinstance(joined([order, order], FP16), Tensor), "one order of columns holds for one matrix"


def test_biases_of_experts_are_stacked() -> None:
    parts = [
        DeviceMatrix(torch.full((2, 8), float(index)), torch.full((2,), float(index))) for index in range(3)
    ]
    made = Repacking(torch.float32).experts(parts, parts)
    assert isinstance(made, DeviceExperts)
    assert made.down.bias is not None and made.down.bias.tolist() == [[0, 0], [1, 1], [2, 2]]
