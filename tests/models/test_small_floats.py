"""Matrices of four- and eight-bit floats: bitsandbytes', ModelOpt's, Quark's and odd FP8.

oracle/record_small_floats.py has recorded tensors and values with the tools themselves.
"""

from __future__ import annotations

import contextlib
import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.checkpoints import make_model, our_logits, save
from tests.support.quantised import save_quantised
from tests.support.recorded_cases import read_case
from tgi_asgi import ops
from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats.config_file import read_config_file
from tgi_asgi.formats.quantised import Quantisation
from tgi_asgi.formats.small_floats import TableState, decode_fp4, decode_table
from tgi_asgi.models.loading.safetensors import SafetensorsWeights
from tgi_asgi.ops.sources import decode

ORACLE = Path(__file__).with_name("oracle") / "small-floats.npz"
STEM = "model.layers.0.mlp.down_proj."
BITSANDBYTES: dict[str, Any] = {"quant_method": "bitsandbytes"}
NVFP4: dict[str, Any] = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
IDS = torch.randint(0, 160, (40,), generator=torch.Generator().manual_seed(2)).tolist()


def recorded(case: str) -> tuple[dict[str, Tensor], Tensor]:
    """Return a case's tensors, and its weights."""
    found = {name: torch.from_numpy(array) for name, array in read_case(ORACLE, case).items()}
    return found, found.pop("values")


def read(folder: Path, tensors: dict[str, Tensor], shape: Any, options: dict[str, Any]) -> ops.WeightSource:
    """Return a matrix as the server reads it from a checkpoint of these tensors."""
    save_file(
        {STEM + key: tensor.contiguous() for key, tensor in tensors.items()}, folder / "model.safetensors"
    )
    weights = SafetensorsWeights(folder, Quantisation.from_json({"quantization_config": options}))
    try:
        assert weights.names() == [f"{STEM}weight"]
        assert weights.shape(f"{STEM}weight") == tuple(shape)
        source = weights.get(f"{STEM}weight", tuple(shape))
        assert weights.unread() == []
        return source
    finally:
        weights.close()


def decoded(source: ops.WeightSource) -> Tensor:
    return torch.from_numpy(decode(source))


@pytest.mark.parametrize("case", ["nf4", "nf4-nested", "fp4"])
def test_weights_are_those_that_bitsandbytes_reads(tmp_path: Path, case: str) -> None:
    tensors, values = recorded(case)
    source = read(tmp_path, tensors, values.shape, BITSANDBYTES)
    torch.testing.assert_close(decoded(source), values, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("case", "dtype"), [("nf4", torch.uint8), ("nf4-nested", torch.float32)])
def test_scales_are_bytes_only_where_they_are_nested(tmp_path: Path, case: str, dtype: torch.dtype) -> None:
    tensors, values = recorded(case)
    tensors["weight.absmax"] = torch.ones_like(tensors["weight.absmax"], dtype=dtype)
    with pytest.raises(ModelLoadError, match=r"absmax' is of dtype .*, not"):
        read(tmp_path, tensors, values.shape, BITSANDBYTES)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_codes_of_bitsandbytes_may_be_stored_as_floats(tmp_path: Path, dtype: torch.dtype) -> None:
    """`bnb_4bit_quant_storage`, which FSDP needs: the same bytes under another name."""
    tensors, values = recorded("nf4")
    tensors["weight"] = tensors["weight"].reshape(-1).view(dtype).reshape(-1, 1)
    source = read(tmp_path, tensors, values.shape, BITSANDBYTES)
    torch.testing.assert_close(decoded(source), values, rtol=1e-6, atol=1e-7)
    weights = SafetensorsWeights(tmp_path, Quantisation.from_json({"quantization_config": BITSANDBYTES}))
    assert weights.stored()[f"{STEM}weight"] == ("F8_32", values.numel())
    weights.close()


def test_bytes_of_bitsandbytes_stay_bytes(tmp_path: Path) -> None:
    tensors, values = recorded("int8")
    source = read(
        tmp_path, tensors | {"weight_format": torch.tensor(0, dtype=torch.uint8)}, values.shape, BITSANDBYTES
    )
    assert source.format == "Q8_0"
    torch.testing.assert_close(decoded(source), values, rtol=2**-11, atol=0)


@pytest.mark.parametrize("key", ["load_in_4bit", "load_in_8bit"])
def test_bitsandbytes_may_be_named_by_what_it_loads(key: str) -> None:
    found = Quantisation.from_json({"quantization_config": {key: True, "llm_int8_threshold": 6.0}})
    assert found is not None and found.method == "bitsandbytes"


def test_bytes_of_bitsandbytes_in_tiles_are_refused(tmp_path: Path) -> None:
    """As older versions saved them after a forward pass on a GPU: the shape is the same, the order is not."""
    tensors, values = recorded("int8")
    tensors["weight_format"] = torch.tensor(2, dtype=torch.uint8)  # "col_turing"
    with pytest.raises(ModelLoadError, match=r"weight_format' says that codes are in tiles"):
        read(tmp_path, tensors, values.shape, BITSANDBYTES)


@pytest.mark.parametrize("factor", [1.0, 1e-6])
def test_modelopt_s_nvfp4_is_decoded_as_it_decodes_it(tmp_path: Path, factor: float) -> None:
    """Its codes are kept, with scales in float16, unless the scales are too small for that."""
    tensors, values = recorded("nvfp4")
    tensors["weight_scale"] = tensors["weight_scale"].view(torch.float8_e4m3fn)
    tensors["weight_scale_2"] = tensors["weight_scale_2"] * factor
    source = read(tmp_path, tensors, values.shape, NVFP4)
    assert source.format == ("FP4_16" if factor == 1.0 else "F32")
    torch.testing.assert_close(
        decoded(source), values * factor, rtol=2**-11 if factor == 1.0 else 1e-6, atol=0
    )
    packed: Any = ops.linear_weight(source, ops.Packing(is_exact=False)).made
    assert packed.matrix.format == ("FP4_16" if factor == 1.0 else "BF16")


@pytest.mark.parametrize(
    ("columns", "run", "expected"),
    [
        (96, 16, "FP4_16"),
        (96, 32, "FP4_16"),
        (96, 96, "FP4_16"),  # one scale for a row
        (48, 16, "F8_32"),  # blocks have 32 columns
        (96, 8, "F8_32"),
        (96, 24, "F8_32"),
    ],
)
def test_nvfp4_that_no_format_holds_is_counted_as_decoded(
    tmp_path: Path, columns: int, run: int, expected: str
) -> None:
    scales = torch.rand(8, columns // run).to(torch.float8_e4m3fn)
    tensors = {
        "weight": torch.randint(256, (8, columns // 2), dtype=torch.uint8),
        "weight_scale": scales,
        "weight_scale_2": torch.tensor(0.5),
    }
    save_file({STEM + key: tensor for key, tensor in tensors.items()}, tmp_path / "model.safetensors")
    with contextlib.closing(
        SafetensorsWeights(tmp_path, Quantisation.from_json({"quantization_config": NVFP4}))
    ) as weights:
        assert weights.stored()[f"{STEM}weight"] == (expected, 8 * columns)
        source = weights.get(f"{STEM}weight", (8, columns))
    assert (source.format == "FP4_16") == (expected == "FP4_16")
    packed: Any = ops.linear_weight(source, ops.Packing(is_exact=False)).made
    assert packed.matrix.format == ("FP4_16" if expected == "FP4_16" else "BF16")


def test_damaged_states_of_bitsandbytes_are_refused(tmp_path: Path) -> None:
    tensors, values = recorded("nf4")
    name = "weight.quant_state.bitsandbytes__nf4"
    offset = b'{"shape": [32, 192], "blocksize": 64, "nested_offset": %s}'
    for change, words in (
        (b"{", "not valid JSON"),
        (b"[" * 100_000, "nests too deep"),
        (b"[]", "expected a JSON object"),
        (b'{"shape": [0, 4]}', "unknown values"),
        (offset % b"NaN", "unknown values"),
        (offset % (b"9" * 400), "unknown values"),
    ):
        tensors[name] = torch.frombuffer(bytearray(change), dtype=torch.uint8)
        with pytest.raises(ModelLoadError, match=words):
            read(tmp_path, tensors, values.shape, BITSANDBYTES)


def test_four_bit_floats_without_columns_are_refused() -> None:
    with pytest.raises(ModelLoadError, match="do not fit 2 rows of 0 columns"):
        decode_fp4(np.empty((2, 0), np.uint8), np.ones((2, 1), np.float32))


def test_a_block_larger_than_its_matrix_takes_no_more_memory() -> None:
    state = TableState((1, 64), block=(1 << 31) - 1)
    parts = {"quant_map": np.arange(16, dtype=np.float32), "absmax": np.array([2.0], np.float32)}
    tracemalloc.start()
    weights = decode_table(np.full(32, 0x12, np.uint8), state, parts)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.array_equal(weights, np.tile(np.array([2, 4], np.float32), (1, 32)))
    assert peak < 1 << 20


@pytest.mark.parametrize(
    ("scales", "columns", "words"),
    [
        ({"weight_scale": torch.zeros(8, 2).byte()}, 65, "no whole bytes"),
        ({"weight_scale": torch.zeros(8, 2).byte()}, 66, r"\[8, 32\].*\[8, 33\]"),
        ({"weight_scale": torch.ones(8, 4), "weight_scale_2": torch.tensor(1.0)}, 65, "no whole bytes"),
    ],
)
def test_four_bit_floats_have_the_columns_of_the_configuration(
    tmp_path: Path, scales: dict[str, Tensor], columns: int, words: str
) -> None:
    tensors = {"weight": torch.zeros(8, 32, dtype=torch.uint8), **scales}
    save_file({STEM + key: tensor for key, tensor in tensors.items()}, tmp_path / "model.safetensors")
    weights = SafetensorsWeights(tmp_path, Quantisation.from_json({"quantization_config": NVFP4}))
    with pytest.raises(ModelLoadError, match=words):
        weights.get(f"{STEM}weight", (8, columns))
    weights.close()


@pytest.mark.parametrize(("rows", "columns", "block"), [(50, 100, None), (50, 328, [128, 128]), (8, 8, None)])
@pytest.mark.parametrize(
    "method", [{"quant_method": "fp8"}, {"quant_method": "auto-round", "packing_format": "auto_round:fp8"}]
)
def test_float8_may_have_any_number_of_columns(
    tmp_path: Path, rows: int, columns: int, block: list[int] | None, method: dict[str, str]
) -> None:
    codes = torch.randn(rows, columns).to(torch.float8_e4m3fn)
    shape = (rows, 1) if block is None else (-(-rows // block[0]), -(-columns // block[1]))
    scales = torch.rand(shape) + 0.5
    spread = scales if block is None else scales.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)
    options = {**method, "weight_block_size": block}
    source = read(tmp_path, {"weight": codes, "weight_scale_inv": scales}, (rows, columns), options)
    assert torch.equal(decoded(source), codes.float() * spread[:, : max(columns, 1)])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e8m0fnu])
def test_scales_may_be_powers_of_two(tmp_path: Path, dtype: torch.dtype) -> None:
    codes = torch.randn(16, 64).to(torch.float8_e4m3fn)
    exponents = torch.randint(120, 130, (16, 2), dtype=torch.uint8)
    options = {"quant_method": "mxfp8", "weight_block_size": [1, 32]}
    tensors = {"weight": codes, "weight_scale_inv": exponents.view(dtype)}
    source = read(tmp_path, tensors, (16, 64), options)
    scales = torch.exp2(exponents.float() - 127).repeat_interleave(32, 1)
    assert torch.equal(decoded(source), codes.float() * scales)


@pytest.mark.parametrize("rows", [128, 256])
def test_modelopt_s_blocks_have_four_dimensions(tmp_path: Path, rows: int) -> None:
    codes = torch.randn(rows, 256).to(torch.float8_e4m3fn)
    scales = torch.rand(rows // 128, 1, 2, 1) + 0.5
    options = {"quant_method": "modelopt", "quant_algo": "fp8_pb_wo"}
    source = read(tmp_path, {"weight": codes, "weight_scale": scales}, (rows, 256), options)
    spread = scales[:, 0, :, 0].repeat_interleave(128, 0).repeat_interleave(128, 1)
    assert torch.equal(decoded(source), codes.float() * spread)


def test_quark_s_mxfp4_becomes_ggml_s(tmp_path: Path) -> None:
    codes = torch.randint(0, 256, (16, 32), dtype=torch.uint8)
    exponents = torch.randint(120, 130, (16, 2), dtype=torch.uint8)
    weight = {"dtype": "fp4", "scale_format": "e8m0", "group_size": 32}
    options = {"quant_method": "quark", "global_quant_config": {"weight": weight}}
    source = read(tmp_path, {"weight": codes, "weight_scale": exponents}, (16, 64), options)
    assert source.format == "MXFP4"
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    nibbles = torch.stack([codes & 15, codes >> 4], 2).view(16, 64).int()
    values = table[nibbles & 7] * torch.where(nibbles < 8, 1.0, -1.0)
    assert torch.equal(decoded(source), values * torch.exp2(exponents.float() - 127).repeat_interleave(32, 1))


def test_static_scales_of_inputs_are_passed_over(tmp_path: Path) -> None:
    """Ministral 3 has an `activation_scale` beside each matrix."""
    files = save_quantised(make_model(), tmp_path, "fp8", kind="tensor")
    expected = our_logits(files, IDS)
    tensors = load_file(tmp_path / "model.safetensors")
    scales = {
        f"{name.removesuffix('weight_scale')}activation_scale": torch.tensor(0.1)
        for name in tensors
        if name.endswith("weight_scale")
    }
    assert scales
    save_file(tensors | scales, tmp_path / "model.safetensors")
    assert torch.equal(our_logits(files, IDS), expected)


def test_modelopt_s_own_file_describes_older_checkpoints(tmp_path: Path) -> None:
    save(make_model(), tmp_path)
    said = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "group_size": 16}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(said))
    found = Quantisation.from_json(read_config_file(tmp_path))
    assert found is not None and found.method == "modelopt"


def test_a_quantisation_may_have_its_first_name(tmp_path: Path) -> None:
    save(make_model(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["compression_config"] = {"quant_method": "compressed-tensors", "config_groups": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    read = read_config_file(tmp_path)
    assert read["quantization_config"] == config["compression_config"] and "compression_config" not in read


def test_a_quantisation_may_be_that_of_the_text_part(tmp_path: Path) -> None:
    """As in some models that read images; `transformers` looks there, too."""
    inner, outer = {"quant_method": "fp8"}, {"quant_method": "awq"}
    config: dict[str, Any] = {"text_config": {"quantization_config": inner}}
    for given, expected in ((config, inner), ({**config, "quantization_config": outer}, outer)):
        (tmp_path / "config.json").write_text(json.dumps(given))
        assert read_config_file(tmp_path)["quantization_config"] == expected


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"quant_method": "modelopt", "quant_algo": "NVFP4_AWQ"}, "NVFP4_AWQ"),
        (
            {
                "quant_method": "modelopt",
                "quant_algo": "MIXED_PRECISION",
                "quantized_layers": {"a": {"quant_algo": "W4A8_AWQ"}},
            },
            "W4A8_AWQ",
        ),
        ({"quant_method": "quark", "global_quant_config": {"weight": {"dtype": "int4"}}}, "dtype 'int4'"),
        ({"quant_method": "auto-round", "bits": 4, "packing_format": "auto_round:mlx"}, "packing_format"),
        ({"quant_method": "torchao"}, "quantised by torchao are not supported"),
        ({"quant_method": "hqq"}, "quantised by hqq are not supported"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelLoadError, match=words):
        Quantisation.from_json({"quantization_config": options})
