"""Quantised safetensors checkpoints: logits against those of `transformers` with the decoded weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.checkpoints import load_model, make_model, our_logits, reference_logits, save
from tests.support.quantised import save_quantised
from tgi_asgi import ops
from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats.quantised import Quantisation
from tgi_asgi.formats.sources import ModelFiles
from tgi_asgi.models.decoder import Decoder
from tgi_asgi.models.loading.open import OpenModel

IDS = torch.randint(0, 160, (70,), generator=torch.Generator().manual_seed(2)).tolist()
SHAPE = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1}
TOLERANCE = 2e-4  # worst element of float32 logits, as in test_decoder.py, with layers twice as wide

RECIPES = [
    pytest.param("gptq", {}, "INT4_32", id="gptq"),
    pytest.param("gptq", {"is_centred": True, "group": 128}, "INT4_128", id="gptq-symmetric"),
    pytest.param("gptq", {"shift": 0}, "INT4_32", id="gptq-v2"),
    pytest.param("gptq", {"group": 16}, None, id="gptq-small-groups"),
    pytest.param("gptq", {"has_order": True}, "INT4_32", id="gptq-act-order"),
    pytest.param("gptq", {"has_order": True, "group": 64}, "INT4_64", id="gptq-act-order-64"),
    pytest.param("gptq", {"has_order": True, "group": 16}, None, id="gptq-act-order-small-groups"),
    pytest.param("gptq", {"has_order": True, "bits": 8, "is_centred": True}, "Q8_0", id="gptq-8-act-order"),
    pytest.param("gptq", {"bits": 8, "is_centred": True}, "Q8_0", id="gptq-8"),
    pytest.param("gptq", {"bits": 8}, None, id="gptq-8-asymmetric"),
    pytest.param("awq", {}, "INT4_32", id="awq"),
    pytest.param("awq", {"group": 64}, "INT4_64", id="awq-64"),
    pytest.param("compressed", {}, "INT4_32", id="compressed-asymmetric"),
    pytest.param("compressed", {"is_centred": True}, "INT4_32", id="compressed-symmetric"),
    pytest.param("fp8", {"kind": "tensor"}, None, id="fp8-tensor"),
    pytest.param("fp8", {"kind": "row"}, None, id="fp8-row"),
    pytest.param("fp8", {"kind": "block"}, None, id="fp8-block"),
]


def load(files: ModelFiles, quantise: str | None = None, *, is_exact: bool = False) -> Decoder:
    """Load a model, for the default arithmetic unless `is_exact`."""
    model = load_model(files, ops.Packing(is_exact=is_exact, quantise=quantise), max_positions=16)
    assert isinstance(model, Decoder)
    return model


@dataclass(frozen=True)
class Saved:
    """A checkpoint and what `transformers` makes of its decoded weights."""

    files: ModelFiles
    reference: torch.Tensor
    recipe: str
    format: str | None  # that holds the codes as they are, if there is one


@pytest.fixture(scope="module", params=[pytest.param(each.values, id=each.id) for each in RECIPES])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    recipe, options, format = request.param
    model = make_model(**SHAPE)
    files = save_quantised(model, tmp_path_factory.mktemp(recipe), recipe, **options)
    is_rounded = format is None and recipe == "gptq"  # to float16, as AutoGPTQ computes
    if is_rounded:
        for name, parameter in model.named_parameters():
            if ".layers." in name and parameter.dim() == 2:
                parameter.data = parameter.data.half().float()
    return Saved(files, reference_logits(model, IDS), recipe, format)


def test_logits_equal_transformers(saved: Saved) -> None:
    reference = saved.reference
    assert float(reference.std()) > 0.5, "flat logits prove nothing"
    ours = our_logits(saved.files, IDS)
    assert torch.isfinite(ours).all()
    assert float((ours - reference).abs().max()) < TOLERANCE


@pytest.mark.parametrize(("recipe", "name"), [("gptq", "quantize_config"), ("awq", "quant_config")])
def test_older_checkpoints_say_in_a_file_beside_how_they_are_quantised(
    tmp_path: Path, recipe: str, name: str
) -> None:
    model = make_model(**SHAPE)
    files = save_quantised(model, tmp_path, recipe)
    config = json.loads((tmp_path / "config.json").read_text())
    options = config.pop("quantization_config")
    del options["quant_method"]
    if recipe == "awq":
        options = {"w_bit": options.pop("bits"), "q_group_size": options.pop("group_size"), **options}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / f"{name}.json").write_text(json.dumps(options))
    assert float((our_logits(files, IDS) - reference_logits(model, IDS)).abs().max()) < TOLERANCE


def test_codes_stay_codes_where_a_format_holds_them(saved: Saved) -> None:
    (part,) = load(saved.files).layers[0].up.made.parts
    expected = saved.format or ("F16" if saved.recipe == "gptq" else "BF16")
    precision = {"F16": "float32", "BF16": "bfloat16"}.get(expected, "int8")
    assert (part.matrix.format, part.precision) == (expected, precision)


def test_eight_bit_activations_stay_close(tmp_path: Path) -> None:
    model = make_model(**SHAPE)
    files = save_quantised(model, tmp_path, "awq")
    reference = reference_logits(model, IDS)
    ours = our_logits(files, IDS, is_exact=False)
    assert 1e-5 < float((ours - reference).norm() / reference.norm()) < 0.1


def test_float8_can_be_quantised_further(tmp_path: Path) -> None:
    files = save_quantised(make_model(**SHAPE), tmp_path, "fp8", kind="block")
    model = load(files, quantise="Q8_0")
    assert model.layers[0].down.made.matrix.format == "Q8_0"


def test_scales_that_float16_does_not_hold_make_floats(tmp_path: Path) -> None:
    model = make_model(**SHAPE)
    files = save_quantised(model, tmp_path, "compressed", is_centred=True)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight_scale"
    tensors[name] = tensors[name].float() * 1.0001
    save_file(tensors, tmp_path / "model.safetensors")
    for is_exact, expected in ((False, "BF16"), (True, "F32")):
        loaded = load(files, is_exact=is_exact)
        assert loaded.layers[0].down.made.matrix.format == expected
        assert loaded.layers[1].down.made.matrix.format == "INT4_32"


@pytest.mark.parametrize("recipe", ["gptq", "awq"])
def test_biases_of_zeros_that_the_model_lacks_are_passed_over(tmp_path: Path, recipe: str) -> None:
    """Add biases of zeros to every matrix, as AutoGPTQ does."""
    files = save_quantised(make_model(**SHAPE), tmp_path, recipe)
    expected = our_logits(files, IDS)
    tensors = load_file(tmp_path / "model.safetensors")
    biases = {f"{name[:-7]}bias": torch.zeros(1, 8) for name in tensors if name.endswith("qweight")}
    save_file(tensors | biases, tmp_path / "model.safetensors")
    assert torch.equal(our_logits(files, IDS), expected)
    biases[f"{STEM}bias"][0, 3] = 0.5
    save_file(tensors | biases, tmp_path / "model.safetensors")
    with pytest.raises(ModelLoadError, match=r"layers\.1\.mlp\.down_proj\.bias"):
        load(files)


@pytest.mark.parametrize(
    "name",
    [
        "self_attn.k_scale",
        "self_attn.k_zero_point",
        "self_attn.kv_scale",
        "self_attn.k_proj.output_scale",
        "self_attn.v_proj.v_scale",
        "mlp.down_proj.input_scale",
    ],
)
def test_scales_of_what_is_not_quantised_are_passed_over(tmp_path: Path, name: str) -> None:
    files = save_quantised(make_model(**SHAPE), tmp_path, "fp8", kind="row")
    expected = our_logits(files, IDS)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {f"model.layers.1.{name}": torch.tensor(0.3)}, tmp_path / "model.safetensors")
    assert torch.equal(our_logits(files, IDS), expected)


def test_such_scales_are_refused_where_nothing_is_quantised(tmp_path: Path) -> None:
    files = save(make_model(**SHAPE), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    scale = {"model.layers.1.self_attn.k_scale": torch.tensor(0.3)}
    save_file(tensors | scale, tmp_path / "model.safetensors")
    with pytest.raises(ModelLoadError, match="k_scale"):
        load(files)


STEM = "model.layers.1.mlp.down_proj."


@pytest.mark.parametrize(
    ("recipe", "options", "name", "change", "words"),
    [
        ("gptq", {}, "qzeros", lambda t: t[:-1], "do not fit"),
        ("gptq", {}, "g_idx", lambda t: t + 100, "g_idx must give one of"),
        ("gptq", {}, "scales", lambda t: None, r"no tensor '.*scales'"),
        ("gptq", {}, "qweight", lambda t: t.float(), "is of dtype F32, not I32"),
        ("gptq", {}, "qweight", lambda t: t[:-4].contiguous(), "qweight has 28 words for 256 columns"),
        ("awq", {}, "scales", lambda t: t[:, :-8].contiguous(), "do not fit"),
        ("awq", {}, "qweight", lambda t: t[:-32].contiguous(), "do not fit|shape"),
        ("compressed", {}, "weight_packed", lambda t: t[:, :-1].contiguous(), "do not fit 256 columns"),
        ("fp8", {"kind": "block"}, "weight_scale_inv", lambda t: t[:-1], "do not fit blocks"),
        ("fp8", {"kind": "row"}, "weight_scale", lambda t: None, "neither a weight_scale"),
        ("fp8", {"kind": "row"}, "weight_scale", lambda t: t[:-1], "weight_block_size"),
    ],
)
def test_tensors_that_do_not_fit_each_other_are_refused(
    tmp_path: Path, recipe: str, options: dict[str, Any], name: str, change: Any, words: str
) -> None:
    files = save_quantised(make_model(**SHAPE), tmp_path, recipe, **options)
    tensors = load_file(tmp_path / "model.safetensors")
    changed = change(tensors.pop(STEM + name))
    if changed is not None:
        tensors[STEM + name] = changed
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelLoadError, match=words):
        load_model(files, max_positions=16)


def test_zero_points_that_the_configuration_promises_are_required(tmp_path: Path) -> None:
    files = save_quantised(make_model(**SHAPE), tmp_path, "compressed")
    config = json.loads((tmp_path / "config.json").read_text())
    weights = {"num_bits": 4, "type": "int", "group_size": 32, "symmetric": False}
    config["quantization_config"]["config_groups"] = {"group_0": {"targets": ["Linear"], "weights": weights}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    load(files)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[STEM + "weight_zero_point"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelLoadError, match=r"no tensor '.*weight_zero_point', but `symmetric` is false"):
        load(files)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "must be an object"),
        ({}, "an unnamed method"),
        ({"quant_method": "hqq"}, "hqq are not supported; supported are awq"),
        ({"quant_method": "gptq", "bits": 5}, "GPTQ of 5 bits"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "'marlin'"),
        ({"quant_method": "gptq", "bits": 4, "is_marlin_format": True}, "'marlin'"),
        ({"quant_method": "awq", "bits": 8}, "AWQ of 8 bits"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "'gemv'"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "weight_block_size"),
        ({"quant_method": "fp8", "weight_block_size": [10**30, 128]}, "weight_block_size"),
        ({"quant_method": "fp8", "weight_block_size": [128, 48]}, "multiple of 32"),
        ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, "ModelOpt of quant_algo 'W4A8_AWQ'"),
        ({"quant_method": "modelopt", "quant_algo": ["NVFP4"]}, r"ModelOpt of quant_algo \"\['NVFP4'\]\""),
        ({"quant_method": "compressed-tensors", "format": "mxfp6-pack-quantized"}, "mxfp6"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(options: Any, words: str) -> None:
    with pytest.raises(ModelLoadError, match=words):
        Quantisation.from_json({"quantization_config": options})


@pytest.mark.parametrize("structure", [[128, 128], "128x128"])  # as text by older versions
def test_blocks_of_compressed_float8_come_from_its_groups(structure: list[int] | str) -> None:
    weights = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": structure}
    options = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": {"weights": weights}},
    }
    found = Quantisation.from_json({"quantization_config": options})
    assert found is not None and found.block == (128, 128)


def test_blocks_and_groups_of_other_types_are_no_sizes() -> None:
    def read(weights: dict[str, Any]) -> Quantisation | None:
        options = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
        return Quantisation.from_json({
            "quantization_config": options | {"config_groups": {"a": {"weights": weights}}}
        })  # fmt: skip

    with pytest.raises(ModelLoadError, match="`block_structure` must be two positive integers, got 128"):
        read({"block_structure": "128"})
    found = read({"group_size": [128]})
    assert found is not None and found.layout.group is None


def test_modelopt_s_float8_is_read_as_any_other(tmp_path: Path) -> None:
    files = save_quantised(make_model(**SHAPE), tmp_path, "fp8", kind="tensor")
    expected = our_logits(files, IDS)
    path = tmp_path / "config.json"
    said = {"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8"}}
    path.write_text(json.dumps(json.loads(path.read_text()) | said))
    assert torch.equal(our_logits(files, IDS), expected)


def test_act_order_beyond_float16_is_decoded_to_float32(tmp_path: Path) -> None:
    files = save_quantised(make_model(**SHAPE), tmp_path, "gptq", has_order=True)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[f"{STEM}scales"][0, 0] = 60000.0
    save_file(tensors, tmp_path / "model.safetensors")
    assert load(files).layers[1].down.made.matrix.format == "INT4_32"
    with OpenModel(files) as opened:
        for layer, expected in ((0, "F16"), (1, "F32")):
            source = opened.weights.get(f"model.layers.{layer}.mlp.down_proj.weight", (128, 256))
            assert source.in_order().format == expected  # as shards do, which have some of the columns


def test_matrices_of_one_input_may_have_different_orders(tmp_path: Path) -> None:
    model = make_model(**SHAPE)
    files = save_quantised(model, tmp_path, "gptq", has_order="each")
    ours = our_logits(files, IDS)
    assert float((ours - reference_logits(model, IDS)).abs().max()) < TOLERANCE
    layer = load(files).layers[0]
    assert [len(weight.made.parts) for weight in (layer.qkv, layer.up)] == [3, 2]


def test_groups_of_different_sizes_are_decoded(tmp_path: Path) -> None:
    """Move a column to another group, whose columns are then no multiple of 32."""
    model = make_model(**SHAPE)
    files = save_quantised(model, tmp_path, "gptq", has_order=True)
    tensors = load_file(tmp_path / "model.safetensors")
    groups, scales = tensors[f"{STEM}g_idx"], tensors[f"{STEM}scales"].float()
    zeros, old = unpacked_zeros(tensors[f"{STEM}qzeros"]), int(groups[5])
    groups[5] = new = (old + 1) % 8
    save_file(tensors, tmp_path / "model.safetensors")
    weight = model.get_parameter(f"{STEM}weight").data
    codes = (weight[:, 5] / scales[old] + zeros[old]).round()
    weight[:, 5] = scales[new] * (codes - zeros[new])
    weight.copy_(weight.half().float())
    loaded = load(files)
    found = [layer.down.made.matrix.format for layer in loaded.layers]
    with OpenModel(files) as opened:
        stored = opened.weights.stored()
    foretold = [stored[f"model.layers.{layer}.mlp.down_proj.qweight"][0] for layer in (0, 1)]
    assert (found[:2], foretold) == (["INT4_32", "F16"], ["ordered_4", "F16"])
    assert float((our_logits(files, IDS) - reference_logits(model, IDS)).abs().max()) < TOLERANCE


def unpacked_zeros(words: torch.Tensor) -> torch.Tensor:
    """Return GPTQ's zero points [groups, rows]."""
    return torch.stack([(words >> shift) & 15 for shift in range(0, 32, 4)], -1).reshape(len(words), -1) + 1


def test_weights_that_cannot_be_quantised_are_said(tmp_path: Path) -> None:
    files = save(make_model(**SHAPE), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[f"{STEM}weight"][3, 5] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelLoadError, match=r"a weight of the model cannot be used: layer 1: .* NaN"):
        load(files, quantise="Q8_0")
