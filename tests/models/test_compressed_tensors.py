"""Checkpoints of the `compressed-tensors` package against the weights that it decompresses itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch_file

from tests.support.checkpoints import make_model, our_logits, reference_logits
from tests.support.compressed import save_compressed, save_groups
from tgi_asgi import ops
from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats.quantised import Quantisation
from tgi_asgi.formats.sources import ModelFiles
from tgi_asgi.models.loading.open import OpenModel
from tgi_asgi.models.loading.safetensors import SafetensorsWeights
from tgi_asgi.ops.sources import decode

EXACT = 1e-3  # of a log-probability
ROUNDED = 2e-2  # where the server rounds weights to float16
COARSE = 0.15  # where the package rounds them to bfloat16
LIMITS = {"nvfp4-pack-quantized": COARSE}
ORDERED = Path(__file__).with_name("oracle") / "compressed-order.npz"  # made by record_compressed_order.py
GAPS = ORDERED.with_name("compressed-widths.npz")  # made by record_compressed_widths.py
FILE = "model.safetensors"
IDS = torch.randint(0, 160, (48,), generator=torch.Generator().manual_seed(2)).tolist()
SHAPE = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}
FP8 = {"num_bits": 8, "type": "float"}
INT8 = {"num_bits": 8, "type": "int", "strategy": "channel"}
NVFP4 = {
    "num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16,
    "scale_dtype": torch.float8_e4m3fn,
}  # fmt: skip
MXFP4 = {
    "num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": torch.uint8
}  # fmt: skip
# The package's format, its arguments for weights, and the format in which the server keeps them.
RECIPES = [
    pytest.param(
        "pack-quantized", INT4 | {"symmetric": True}, "INT4_128", id="int4", marks=pytest.mark.models
    ),
    pytest.param("pack-quantized", INT4 | {"symmetric": False}, "INT4_128", id="int4-asymmetric"),
    pytest.param(
        "pack-quantized",
        INT4 | {"strategy": "channel", "group_size": None},
        "INT4_128",
        id="int4-channel",
        marks=pytest.mark.models,
    ),
    pytest.param("pack-quantized", INT4 | {"num_bits": 8}, "Q8_0", id="int8", marks=pytest.mark.models),
    pytest.param(
        "float-quantized", FP8 | {"strategy": "tensor"}, "BF16", id="fp8-tensor", marks=pytest.mark.models
    ),
    pytest.param(
        "float-quantized", FP8 | {"strategy": "channel"}, "BF16", id="fp8-channel", marks=pytest.mark.models
    ),
    pytest.param(
        "float-quantized", FP8 | {"strategy": "block", "block_structure": [128, 128]}, "BF16", id="fp8-block"
    ),
    pytest.param(
        "naive-quantized", FP8 | {"strategy": "channel"}, "BF16", id="naive-fp8", marks=pytest.mark.models
    ),
    pytest.param("float-quantized", FP8 | {"strategy": "group", "group_size": 64}, "BF16", id="fp8-group"),
    pytest.param("pack-quantized", INT4 | {"num_bits": 2}, "INT4_128", id="int2"),
    pytest.param("pack-quantized", INT4 | {"num_bits": 3, "symmetric": False}, "INT4_128", id="int3"),
    pytest.param("pack-quantized", INT4 | {"num_bits": 6}, "Q8_0", id="int6"),
    pytest.param("int-quantized", INT8, "Q8_0", id="w8a8"),
    pytest.param("int-quantized", INT8 | {"symmetric": False}, "F16", id="w8a8-asymmetric"),
    pytest.param("naive-quantized", INT8, "Q8_0", id="naive-int8", marks=pytest.mark.models),
    pytest.param("nvfp4-pack-quantized", NVFP4, "FP4_16", id="nvfp4"),
    pytest.param("mxfp4-pack-quantized", MXFP4, "MXFP4", id="mxfp4"),
    pytest.param("mxfp8-quantized", MXFP4 | {"num_bits": 8}, "BF16", id="mxfp8"),
]


@pytest.mark.parametrize(("format", "weights", "kept"), RECIPES)
def test_log_probabilities_are_those_of_what_the_package_decompresses(
    tmp_path: Path, format: str, weights: dict[str, Any], kept: str
) -> None:
    model = make_model(**SHAPE)
    files = save_compressed(model, tmp_path, format, **weights)
    reference = reference_logits(model, IDS).log_softmax(-1)
    assert float(reference.std()) > 0.5, "flat logits prove nothing"
    ours = our_logits(files, IDS).log_softmax(-1)
    limit = ROUNDED if kept == "F16" else LIMITS.get(format, EXACT)
    assert float((ours - reference).abs().max()) <= limit
    assert kept_format(files) == kept


@pytest.mark.parametrize("symmetric", [True, False])
def test_bytes_with_zero_points_are_counted_as_decoded(tmp_path: Path, symmetric: bool) -> None:
    files = save_compressed(make_model(**SHAPE), tmp_path, "int-quantized", **INT8, symmetric=symmetric)
    with OpenModel(files) as opened:
        found = opened.weights.stored()["model.layers.0.mlp.down_proj.weight"]
    assert found == (kept_format(files), 256 * 256) == ("Q8_0" if symmetric else "F16", 256 * 256)


def test_columns_in_act_order_mean_what_the_package_reads(tmp_path: Path) -> None:
    with np.load(ORDERED) as stored:
        arrays = dict(stored)
    values = arrays.pop("values")
    name = "model.layers.0.mlp.down_proj.weight"
    save_file({name.removesuffix("weight") + key: array for key, array in arrays.items()}, tmp_path / FILE)
    options = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    weights = SafetensorsWeights(tmp_path, Quantisation.from_json({"quantization_config": options}))
    ours = decode(weights.get(name, values.shape).in_order())
    weights.close()
    np.testing.assert_allclose(ours, values, rtol=2**-11)  # no block holds its groups: float16


def test_bytes_in_act_order_mean_what_the_package_reads(tmp_path: Path) -> None:
    """`int-quantized` of versions that had `actorder: group`; today's reads each group's columns in a row."""
    made = torch.Generator().manual_seed(4)
    codes = torch.randint(-128, 128, (32, 128), dtype=torch.int8, generator=made)
    scales, order = torch.rand(32, 4, generator=made).half().float(), torch.randperm(128, generator=made)
    arguments = QuantizationArgs(**INT8 | {"strategy": "group", "group_size": 32})
    values = torch.empty(32, 128)
    values[:, order] = dequantize(codes[:, order], scales, args=arguments).float()
    groups = torch.empty(128, dtype=torch.int32)
    groups[order] = torch.arange(128, dtype=torch.int32) // 32
    name = "model.layers.0.mlp.down_proj.weight"
    tensors = {name: codes, f"{name}_scale": scales, f"{name}_g_idx": groups}
    save_file({key: tensor.numpy() for key, tensor in tensors.items()}, tmp_path / FILE)
    options = {"quant_method": "compressed-tensors", "format": "int-quantized"}
    weights = SafetensorsWeights(tmp_path, Quantisation.from_json({"quantization_config": options}))
    ours = decode(weights.get(name, (32, 128)).in_order())
    assert [weights.stored(cut)[name][0] for cut in ((), (name,))] == ["Q8_0", "ordered_8"]
    weights.close()
    np.testing.assert_allclose(ours, values.numpy(), rtol=2**-11)


def test_float8_in_act_order_is_refused(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    tensors = {
        name: torch.zeros(32, 128).to(torch.float8_e4m3fn), f"{name}_scale": torch.ones(32, 4),
        f"{name}_g_idx": torch.arange(128, dtype=torch.int32) % 4,
    }  # fmt: skip
    save_torch_file(tensors, tmp_path / FILE)
    options = {"quant_method": "compressed-tensors", "format": "float-quantized"}
    weights = SafetensorsWeights(tmp_path, Quantisation.from_json({"quantization_config": options}))
    with pytest.raises(ModelLoadError, match="groups of columns in another order"):
        weights.get(name, (32, 128))
    weights.close()


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
@pytest.mark.parametrize("is_centred", [True, False])
def test_codes_with_gaps_between_them_mean_what_the_package_reads(
    bits: int, is_centred: bool, tmp_path: Path
) -> None:
    with np.load(GAPS) as stored:
        arrays = {key.removeprefix(f"{bits}."): stored[key] for key in stored if key.startswith(f"{bits}.")}
    centred, shifted = (arrays.pop(name) for name in ("centred", "shifted"))
    if is_centred:
        del arrays["weight_zero_point"]
    stem = "model.layers.0.mlp.down_proj."
    save_file({stem + key: array for key, array in arrays.items()}, tmp_path / FILE)
    group = {"weights": {"num_bits": bits, "type": "int", "symmetric": is_centred, "group_size": 64}}
    options = {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group}
    }  # fmt: skip
    weights = SafetensorsWeights(tmp_path, Quantisation.from_json({"quantization_config": options}))
    ours = decode(weights.get(f"{stem}weight", centred.shape).in_order())
    weights.close()
    np.testing.assert_allclose(ours, centred if is_centred else shifted, rtol=2**-11)


def test_groups_of_layers_may_have_different_formats(tmp_path: Path) -> None:
    model = make_model(**SHAPE)
    groups = {
        "re:.*self_attn.*": ("float-quantized", FP8 | {"strategy": "channel"}),
        "re:.*(gate|up)_proj": ("pack-quantized", INT4 | {"symmetric": True}),
        "re:.*down_proj": ("nvfp4-pack-quantized", NVFP4),
    }
    files = save_groups(model, tmp_path, groups)
    reference = reference_logits(model, IDS).log_softmax(-1)
    assert float((our_logits(files, IDS).log_softmax(-1) - reference).abs().max()) <= COARSE


def test_one_format_may_have_several_widths(tmp_path: Path) -> None:
    model = make_model(**SHAPE)
    groups = {
        "re:.*self_attn.*": ("pack-quantized", INT4 | {"num_bits": 8}),
        "re:.*mlp.*": ("pack-quantized", INT4 | {"symmetric": False}),
    }
    files = save_groups(model, tmp_path, groups)
    reference = reference_logits(model, IDS).log_softmax(-1)
    assert float((our_logits(files, IDS).log_softmax(-1) - reference).abs().max()) <= EXACT


@pytest.mark.parametrize("location", ["input", "output", "q_attn", "k_cache", None])
def test_transforms_of_activations_are_refused(location: str | None) -> None:
    applied = [{"targets": ["Linear"], "location": place} for place in ("weight_input", location)]
    transforms = {"config_groups": {"R4": {"type": "hadamard", "apply": applied}}}
    options = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    with pytest.raises(ModelLoadError, match="activations would have to be rotated"):
        Quantisation.from_json({"quantization_config": options | {"transform_config": transforms}})


def test_transforms_that_are_part_of_the_weights_are_read() -> None:
    applied = [{"targets": ["Linear"], "location": place} for place in ("weight_input", "weight_output")]
    transforms = {"config_groups": {"R1": {"type": "hadamard", "apply": applied}}}
    options = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    assert Quantisation.from_json({"quantization_config": options | {"transform_config": transforms}})


@pytest.mark.parametrize("format", ["sparse-24-bitmask", "sparse-bitmask"])
def test_sparse_checkpoints_are_refused_by_name(format: str) -> None:
    options = {"quant_method": "compressed-tensors", "format": "dense", "sparsity_config": {"format": format}}
    with pytest.raises(ModelLoadError, match=format):
        Quantisation.from_json({"quantization_config": options})


def kept_format(files: ModelFiles) -> str:
    """Return the format in which the default arithmetic keeps a matrix."""
    with OpenModel(files) as opened:
        model: Any = opened.load(ops.Packing(is_exact=False), max_positions=16)
    format: str = model.layers[0].down.made.matrix.format
    return format
