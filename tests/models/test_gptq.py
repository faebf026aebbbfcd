"""GPTQ matrices packed by AutoGPTQ, against the weights that it reads: zero points, act-order, eight bits.

Also AWQ matrices, which use the bytes of their file, except for zero points. oracle/record_gptq.py has made
oracle/gptq.npz; oracle/record_gptqmodel.py, with GPTQModel, oracle/gptqmodel.npz.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from tests.support.quantised import awq_tensors, gptq_tensors, random_codes
from tests.support.recorded_cases import read_case
from tgi_asgi import ops
from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats.codes import Layout
from tgi_asgi.formats.quantised import Quantisation
from tgi_asgi.models.loading.safetensors import SafetensorsWeights
from tgi_asgi.ops import direct
from tgi_asgi.ops.sources import decode

ORACLE = Path(__file__).with_name("oracle") / "gptq.npz"
NAME = "model.layers.0.mlp.down_proj.weight"
# The format that the matrix of each case in the file keeps.
CASES = {
    "int4": "INT4_64",
    "int4-symmetric-order": "F16",
    "int4-order": "F16",
    "int8": "F16",
    "int8-symmetric": "Q8_0",
}


@pytest.mark.parametrize("case", CASES)
def test_weights_are_those_that_autogptq_multiplies_by(tmp_path: Path, case: str) -> None:
    arrays = read_case(ORACLE, case)
    values = arrays.pop("values")
    options = {"quant_method": "gptq", "bits": int(case[3]), "group_size": 64}
    source = read(tmp_path, arrays, values.shape, options).in_order()
    assert source.format == CASES[case]
    # Each value is rounded once: to float16 if no block format holds the codes.
    np.testing.assert_allclose(decode(source), values, rtol=2**-11 if source.format == "F16" else 0)


@pytest.mark.parametrize("case", ["int4-symmetric-order", "int4-order"])
def test_codes_in_act_order_are_multiplied_as_autogptq_s_weights(tmp_path: Path, case: str) -> None:
    arrays = read_case(ORACLE, case)
    values = arrays.pop("values")
    options = {"quant_method": "gptq", "bits": 4, "group_size": 64}
    weight = ops.linear_weight(read(tmp_path, arrays, values.shape, options), ops.Packing(is_exact=True))
    assert weight.made.matrix.format == "INT4_64"
    found = direct.linear(weight, torch.eye(values.shape[1])).T
    np.testing.assert_array_equal(found, values)


GPTQMODEL = Path(__file__).with_name("oracle") / "gptqmodel.npz"
MODEL_CASES = {
    "int2": "INT4_64",
    "int2-v2": "INT4_64",
    "int3": "INT4_64",
    "int4": "INT4_64",
    "int4-v2": "INT4_64",
    "int4-last-group": "F16",
    "int8": "F16",
}


@pytest.mark.parametrize("described", ["checkpoint_format", "format"])
@pytest.mark.parametrize("case", MODEL_CASES)
def test_weights_are_those_that_gptqmodel_reads(tmp_path: Path, case: str, described: str) -> None:
    arrays = read_case(GPTQMODEL, case)
    values = arrays.pop("values")
    layout = "gptq_v2" if case.endswith(("v2", "group")) else "gptq"
    options = {
        "quant_method": "gptq", "bits": int(case[3]), "group_size": 64, described: layout,
        "meta": {"quantizer": ["gptqmodel:7.7.0"]},
    }  # fmt: skip
    source = read(tmp_path, arrays, values.shape, options)
    assert source.format == MODEL_CASES[case]
    # GPTQModel multiplies in float16.
    np.testing.assert_allclose(decode(source), values, rtol=2**-10, atol=2e-4)


def test_layers_may_have_other_widths_than_the_configuration_says(tmp_path: Path) -> None:
    arrays = read_case(GPTQMODEL, "int3")
    values = arrays.pop("values")
    options = {"quant_method": "gptq", "bits": 4, "group_size": 128, "meta": {"quantizer": ["gptqmodel"]}}
    source = read(tmp_path, arrays, values.shape, options)
    np.testing.assert_allclose(decode(source), values, rtol=2**-10, atol=2e-4)


def test_a_shorter_last_group_is_read_without_the_groups_of_columns(tmp_path: Path) -> None:
    arrays = read_case(GPTQMODEL, "int4-last-group")
    values = arrays.pop("values")
    del arrays["g_idx"]
    options = {"quant_method": "gptq", "bits": 4, "group_size": 128, "checkpoint_format": "gptq_v2"}
    source = read(tmp_path, arrays, values.shape, options)
    np.testing.assert_allclose(decode(source), values, rtol=2**-10, atol=2e-4)


@pytest.mark.parametrize("key", ["group_size", "q_group_size"])
def test_a_shorter_last_group_of_awq_is_no_group_of_equal_size(tmp_path: Path, key: str) -> None:
    matrix = random_codes(64, 192, 64)
    groups = torch.arange(192) // 128  # and not two groups of 96
    matrix = replace(matrix, scales=matrix.scales[:, :2], zeros=matrix.zeros[:, :2], groups=groups)
    arrays = {name: tensor.numpy() for name, tensor in awq_tensors(matrix).items()}
    source = read(tmp_path, arrays, (64, 192), {"quant_method": "awq", "bits": 4, key: 128})
    np.testing.assert_allclose(decode(source), matrix.weights().numpy(), rtol=2**-10, atol=2e-4)
    foretold = stored(tmp_path, {"quant_method": "awq", "bits": 4, key: 128})
    assert foretold[NAME.replace("weight", "qweight")] == (source.format, 64 * 192) == ("F16", 64 * 192)


def test_groups_in_order_that_no_format_holds_are_counted_as_decoded(tmp_path: Path) -> None:
    arrays = {name: tensor.numpy() for name, tensor in gptq_tensors(random_codes(64, 192, 16)).items()}
    options = {"quant_method": "gptq", "bits": 4, "group_size": 16}
    assert read(tmp_path, arrays, (64, 192), options).format == "F16"
    assert stored(tmp_path, options)[NAME.replace("weight", "qweight")] == ("F16", 64 * 192)


@pytest.mark.parametrize(
    ("module", "format"),
    [
        ("self_attn.q_proj", "I32"),
        ("self_attn.kv_a_proj_with_mqa", "I32"),
        ("self_attn.kv_b_proj", "F16"),
        ("linear_attn.in_proj_qkv", "I32"),
        ("linear_attn.in_proj_b", "F16"),
        ("linear_attn.in_proj_a", "F16"),
        ("linear_attn.in_proj_ba", "F16"),
        ("lm_head", "F16"),
        ("embed_out", "F16"),
        ("mlp.gate_proj", "I32"),
        ("mlp.gate", "F16"),
        ("mlp.router", "F16"),
        ("mlp.shared_expert_gate", "F16"),
        ("mlp.experts.3.down_proj", "F16"),
        ("mlp.shared_experts.down_proj", "I32"),
    ],
)
def test_matrices_that_lose_their_order_are_counted_as_decoded(
    tmp_path: Path, module: str, format: str
) -> None:
    stem = f"model.layers.0.{module}."
    made = gptq_tensors(random_codes(32, 128, 32, order_seed=1))
    save_file({stem + key: tensor.numpy() for key, tensor in made.items()}, tmp_path / "model.safetensors")
    assert stored(tmp_path, {"quant_method": "gptq", "bits": 4, "desc_act": True})[f"{stem}qweight"] == (
        format,
        32 * 128 // (8 if format == "I32" else 1),
    )


@pytest.mark.parametrize("size", [256, 10**30])
def test_a_group_may_be_larger_than_its_matrix(size: int) -> None:
    assert Layout(group=size).groups(96, 1) is None


@pytest.mark.parametrize(
    ("packing", "case"), [(":auto_gptq", "int4"), (":gptqmodel", "int4-v2"), ("", "int4-v2")]
)
def test_autoround_packs_as_the_tools_that_it_names(tmp_path: Path, packing: str, case: str) -> None:
    arrays = read_case(GPTQMODEL, case)
    values = arrays.pop("values")
    options = {
        "quant_method": "auto-round", "bits": 4, "group_size": 64, "packing_format": f"auto_round{packing}",
        "meta": {"quantizer": ["gptqmodel"]},
    }  # fmt: skip
    source = read(tmp_path, arrays, values.shape, options)
    np.testing.assert_allclose(decode(source), values, rtol=2**-10, atol=2e-4)


@pytest.mark.parametrize("key", ["r4", "online_r1_rotation"])
def test_quark_with_rotated_inputs_is_refused(key: str) -> None:
    weight = {"dtype": "fp8_e4m3"}
    options = {"quant_method": "quark", "global_quant_config": {"weight": weight}}
    rotation = {"name": "rotation", "r1": True, "r2": True, "r3": True, "r4": False}
    fine: tuple[Any, ...] = (None, [{"name": "awq"}], [rotation], rotation)
    for algorithms in fine:
        Quantisation.from_json({"quantization_config": {**options, "algo_config": algorithms}})
    online = {**rotation, key: True}
    refused: tuple[Any, ...] = ([{"name": "awq"}, online], online)
    for algorithms in refused:
        with pytest.raises(ModelLoadError, match=f"`{key}`: activations would have to be rotated"):
            Quantisation.from_json({"quantization_config": {**options, "algo_config": algorithms}})


@pytest.mark.parametrize("key", ["rotation", "rotation_config", "hadamard_config", "spinquant_config"])
def test_rotated_activations_are_refused(key: str) -> None:
    options = {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq", key: "hadamard"}
    with pytest.raises(ModelLoadError, match=f"`{key}`: activations would have to be rotated"):
        Quantisation.from_json({"quantization_config": options})


@pytest.mark.parametrize(("rows", "columns"), [(256, 256), (64, 1024)])
def test_an_awq_matrix_takes_the_bytes_of_its_file_and_half_a_byte_a_group(
    tmp_path: Path, rows: int, columns: int
) -> None:
    matrix = random_codes(rows, columns, 128)
    arrays = {name: tensor.numpy() for name, tensor in awq_tensors(matrix).items()}
    source = read(tmp_path, arrays, (rows, columns), {"quant_method": "awq", "bits": 4, "group_size": 128})
    packed: Any = ops.linear_weight(source, ops.Packing(is_exact=False)).made
    assert packed.matrix.format == "INT4_128"
    assert np.array_equal(packed.matrix.unpack()[:rows], matrix.weights().numpy())
    # A zero point takes a byte instead of the file's four bits: 67 bytes for 128 columns instead of 66.5.
    assert packed.matrix.nbytes <= sum(array.nbytes for array in arrays.values()) + rows * columns // 256


def read(
    folder: Path, arrays: dict[str, np.ndarray], shape: tuple[int, ...], options: dict[str, Any]
) -> ops.WeightSource:
    """Return a matrix as the server reads it from a checkpoint of these tensors."""
    tensors = {NAME.removesuffix("weight") + key: array for key, array in arrays.items()}
    save_file(
        {name: np.ascontiguousarray(array) for name, array in tensors.items()}, folder / "model.safetensors"
    )
    weights = SafetensorsWeights(folder, Quantisation.from_json({"quantization_config": options}))
    try:
        return weights.get(NAME, shape)
    finally:
        weights.close()


def stored(directory: Path, options: dict[str, Any]) -> dict[str, tuple[str, int]]:
    """Return what the checkpoint is said to store, before it is read."""
    weights = SafetensorsWeights(directory, Quantisation.from_json({"quantization_config": options}))
    found = weights.stored()
    weights.close()
    return found
