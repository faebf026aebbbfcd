"""GPTQ matrices packed by AutoGPTQ, against the weights that it reads: zero points, act-order, eight bits.

Also AWQ matrices, which use the bytes of their file, except for zero points. oracle/record_gptq.py has made
oracle/gptq.npz.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from tests.support.quantised import awq_tensors, random_codes
from tgi_asgi import ops
from tgi_asgi.formats.quantised import Quantisation
from tgi_asgi.models.loading.safetensors import SafetensorsWeights
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
    with np.load(ORACLE) as stored:
        arrays = {key.partition(".")[2]: stored[key] for key in stored if key.startswith(f"{case}.")}
    values = torch.from_numpy(arrays.pop("values"))
    options = {"quant_method": "gptq", "bits": int(case[3]), "group_size": 64}
    source = read(tmp_path, arrays, tuple(values.shape), options).in_order()
    assert source.format == CASES[case]
    # Each value is rounded once: to float16 if no block format holds the codes.
    torch.testing.assert_close(decode(source), values, rtol=2**-11 if source.format == "F16" else 0, atol=0)


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
