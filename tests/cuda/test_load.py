"""Loading a model onto a GPU: little of it is ever on the host, and everything is reported."""

from __future__ import annotations

import dataclasses
import tracemalloc
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from tests.cuda.emulated_device import EmulatedDevice
from tests.cuda.emulated_runner import make_device, save_with_tokenizer
from tests.cuda.test_quant_linear import random_source
from tests.support.checkpoints import make_model, save, save_gguf
from tests.support.quantised import save_quantised
from tgi_asgi import ops
from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats.sources import ModelFiles
from tgi_asgi.models.decoder import Decoder
from tgi_asgi.models.loading.open import OpenModel
from tgi_asgi.ops import cuda_quant
from tgi_asgi.ops.cuda_quant import CudaQuantMatrix, Repacking, repack
from tgi_asgi.ops.tensors import from_tensor
from tgi_asgi.runner.drafts import speculation_of
from tgi_asgi.runner.load import load
from tgi_asgi.runner.plan import DraftLimits
from tgi_asgi.settings import Settings
from tgi_asgi.settings.speculation import Speculation

META = torch.device("meta")  # uses no memory, so that only the host's memory is measured
BF16, FP16, F32 = torch.bfloat16, torch.float16, torch.float32
PIECE = 1 << 14
SHAPE: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 4,
    "vocab_size": 1024, "num_hidden_layers": 2,
}  # fmt: skip


class HostTensors(TorchDispatchMode):
    """Counts the bytes of live host tensors that operators create."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if all(value.alias_info is None for value in func._schema.returns):  # neither views nor in place
            for made in pytree.tree_leaves(out):
                if isinstance(made, Tensor) and made.device.type == "cpu":
                    self._count(made.nbytes)
                    weakref.finalize(made, self._count, -made.nbytes)
        return out

    def _count(self, num_bytes: int) -> None:
        self.live += num_bytes
        self.peak = max(self.peak, self.live)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_quant, "PIECE_BYTES", PIECE)


def open_as(kind: str, directory: Path) -> ModelFiles:
    model = make_model(**SHAPE)
    if kind == "awq":
        return save_quantised(model, directory, "awq")
    return save(model, directory, FP16) if kind == "F16" else save_gguf(model, directory / "tiny.gguf", kind)


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("F16", 1),  # as it is mapped
        ("F32", 1.5),  # GGUF: queries and keys are reordered, one at a time
        ("Q8_0", 2.5),  # a piece's planes, and reordered queries or keys
        ("awq", 8),  # one matrix, unpacked from words into blocks
    ],
)
def test_a_model_s_matrices_are_never_the_host_s(
    tmp_path: Path, small_pieces: None, kind: str, peak: float
) -> None:
    """In units of a layer's largest matrix in the file; the whole model has more than nine of them."""
    largest = 512 * 256 * {"F16": 2, "F32": 4, "Q8_0": 34 / 32, "awq": 5 / 8}[kind]
    with OpenModel(open_as(kind, tmp_path)) as opened:
        tracemalloc.start()
        with HostTensors() as tensors:
            model = opened.load(Repacking(FP16, META), 16)
        _, arrays = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert isinstance(model, Decoder)
    for layer in model.layers:
        for weight in (layer.qkv, layer.output, layer.up, layer.down):
            matrix = weight.made.matrix
            assert (matrix.codes if isinstance(matrix, CudaQuantMatrix) else matrix).device == META
    assert tensors.peak + arrays < peak * largest


@pytest.mark.parametrize("dtype", [BF16, FP16, F32])
@pytest.mark.parametrize("stored", [BF16, FP16, F32])
def test_a_plain_matrix_is_rounded_once_on_its_way(
    small_pieces: None, stored: torch.dtype, dtype: torch.dtype
) -> None:
    values = [(torch.randn(rows, 160) * 3).to(stored) for rows in (200, 7)]
    sources = [from_tensor(value) for value in values]
    assert sources[0].data.nbytes > 2 * PIECE
    for source, value in zip(sources, values, strict=True):
        made = ops.linear_weight(source, Repacking(dtype)).made
        assert torch.equal(made.matrix, value.to(dtype))
    both = ops.gate_up_weight(sources[0], sources[0], Repacking(dtype)).made
    assert torch.equal(both.matrix, torch.cat([values[0], values[0]]).to(dtype))


@pytest.mark.parametrize("name", ["Q6_K", "Q4_1", "INT4_64", "F8_32"])
def test_codes_are_the_same_in_pieces(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    sources = [random_source(name, rows, 512)[0] for rows in (70, 3)]
    whole = repack(sources)
    monkeypatch.setattr(cuda_quant, "PIECE_BYTES", 3000)
    pieces = repack(sources)
    assert torch.equal(whole.codes.view(torch.uint8), pieces.codes.view(torch.uint8))
    assert torch.equal(whole.scales, pieces.scales)
    assert whole.shape == pieces.shape == (73, 512)
    assert (whole.offsets is None and pieces.offsets is None) or torch.equal(whole.offsets, pieces.offsets)  # type: ignore[arg-type]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> EmulatedDevice:
    device = make_device()
    monkeypatch.setattr("tgi_asgi.runner.load.find_device", lambda: device)
    return device


SMALL = Settings(
    thread_nice=0, num_threads=1, max_batch_size=2, max_batch_prefill_tokens=64, max_total_tokens=128
)


def test_progress_comes_to_all_bytes_as_they_are_on_the_device(
    tmp_path: Path, device: EmulatedDevice
) -> None:
    calls: list[tuple[str, int, int | None]] = []
    files = save_with_tokenizer(make_model(**SHAPE), tmp_path)
    settings = dataclasses.replace(SMALL, cuda_memory_fraction=0.4)
    load(settings, files, lambda *call: calls.append(call)).runner.close()
    assert device.memory_share == 0.4
    done = [call[1] for call in calls if call[0] == "loading weights"]
    total = calls[-1][2]
    assert total is not None
    file = tmp_path / "model.safetensors"
    assert done == sorted(done)
    assert len(set(done)) > 2 * 9, "each tensor shows"
    assert 0.9 * file.stat().st_size < done[-1] == total <= file.stat().st_size


@pytest.mark.parametrize(("share", "cure"), [(0.4, "raise --cuda-memory-fraction"), (1.0, "free memory")])
def test_a_gpu_without_memory_for_a_cache_says_what_to_do(
    tmp_path: Path, device: EmulatedDevice, monkeypatch: pytest.MonkeyPatch, share: float, cure: str
) -> None:
    monkeypatch.setattr(device, "free_bytes", lambda: 0)
    files = save_with_tokenizer(make_model(**SHAPE), tmp_path)
    settings = dataclasses.replace(SMALL, cuda_memory_fraction=share)
    with pytest.raises(ModelLoadError, match=f"no memory for a KV cache.*; {cure}, or set"):
        load(settings, files, lambda *call: None)


def test_drafts_are_for_models_that_generate(
    tmp_path: Path, device: EmulatedDevice, caplog: pytest.LogCaptureFixture
) -> None:
    settings = dataclasses.replace(SMALL, speculate=3)
    loaded = load(settings, save_with_tokenizer(make_model(**SHAPE), tmp_path), lambda *call: None)
    loaded.runner.close()
    assert loaded.runner.traits.drafts == DraftLimits(3, 64)
    assert "speculation" not in caplog.text

    def of(settings: Settings, *, generates: bool = True) -> Speculation | None:
        config = SimpleNamespace(generates=generates, architecture="Llama")
        model: Any = SimpleNamespace(kind="native", config=config)
        return speculation_of(model, settings)

    assert of(settings) == settings.speculation
    assert of(SMALL) is of(settings, generates=False) is None
    assert "speculation" not in caplog.text


def test_a_model_that_does_not_fit_is_refused_while_it_is_loaded(
    tmp_path: Path, device: EmulatedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(matrix: Tensor, source: ops.WeightSource) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    files = save_with_tokenizer(make_model(**SHAPE), tmp_path)
    monkeypatch.setattr(cuda_quant, "_write", full)
    with pytest.raises(ModelLoadError, match="does not fit the GPU's memory"):
        load(SMALL, files)
