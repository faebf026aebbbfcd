"""Adapters that are refused, by name: unsupported kinds, damaged files, another base model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.support.processor_time import at_most
from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats.patterns import Patterns
from tgi_asgi.formats.peft import PeftAdapter

NAME = "base_model.model.model.layers.0.self_attn.q_proj"
CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}


def matrices(name: str = NAME, rank: int = 4) -> dict[str, np.ndarray]:
    return {
        f"{name}.lora_A.weight": np.ones((rank, 32), np.float32),
        f"{name}.lora_B.weight": np.ones((64, rank), np.float16),
    }


def write(folder: Path, tensors: dict[str, np.ndarray] | None = None, **config: Any) -> Path:
    save_file(matrices() if tensors is None else tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | config), encoding="utf-8")
    return folder


def test_a_plain_adapter_is_read(tmp_path: Path) -> None:
    adapter = PeftAdapter(write(tmp_path))
    [target] = adapter.targets
    assert (target.module, target.rank, target.scale) == ("model.layers.0.self_attn.q_proj", 4, 2.0)
    assert (target.down.shape, target.up.shape) == ((4, 32), (64, 4))
    assert len(adapter.digest) == 16
    adapter.close()
    assert PeftAdapter(write(tmp_path, lora_alpha=9)).digest != adapter.digest


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"use_rslora": True}, 4.0),
        ({"alpha_pattern": {"q_proj": 2}}, 0.5),
        ({"alpha_pattern": {"k_proj": 2, r"^model\.layers\.0\..*q_proj": 12}}, 3.0),
        ({"r": 8, "rank_pattern": {"self_attn.q_proj": 4}}, 2.0),
        ({"alpha_pattern": {r"model\.layers\.(0|1)\..*q_proj": 2}}, 0.5),
        ({"alpha_pattern": {".*": 2, "q_proj": 4}}, 0.5),
        ({"alpha_pattern": {"^q_proj": 2, "proj": 2, "0.self_attn.q_proj": 6}}, 1.5),
        ({"fan_in_fan_out": True, "lora_dropout": 0.1, "layers_to_transform": [0]}, 2.0),
    ],
)
def test_the_scale_is_pefts(config: dict[str, Any], scale: float, tmp_path: Path) -> None:
    assert PeftAdapter(write(tmp_path, **config)).targets[0].scale == scale


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type must be LORA, got 'IA3'"),
        ({"use_dora": True}, "DoRA"),
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "all"}, "bias: 'all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"target_parameters": ["experts.down_proj"]}, "target_parameters"),
        ({"alora_invocation_tokens": [1, 2]}, "alora"),
        ({"use_new_thing": True}, "'use_new_thing'"),
        ({"r": 0}, "r must be a positive number"),
        ({"lora_alpha": "8"}, "lora_alpha must be a positive number"),
        ({"r": True}, "r must be a positive number"),
        ({"r": 10**400}, "r must be a positive number"),  # no float holds it
        ({"lora_alpha": float("nan")}, "lora_alpha must be a positive number"),
        ({"alpha_pattern": {"(a+)+": 1}}, "pattern that is not read"),
        ({"alpha_pattern": {".*.*.*zz": 1}}, "alpha_pattern: a pattern that is not read: '.*.*.*zz'"),
        ({"alpha_pattern": {"(a|.)" * 9: 1}}, "pattern that is not read"),
        ({"alpha_pattern": {f"layer{at}": 1 for at in range(4097)}}, "4097 patterns, 4096 are read"),
        ({"alpha_pattern": {f".*{at}": 1 for at in range(65)}}, "65 patterns that are not plain names"),
        ({"alpha_pattern": {"q_proj": "8"}}, "'q_proj' must be a positive number"),
        ({"init_lora_weights": "pissa"}, "begin as 'pissa' (init_lora_weights)"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights"),
        ({"init_lora_weights": "olora"}, "init_lora_weights"),
        ({"init_lora_weights": "OLoRA"}, "init_lora_weights"),
        ({"init_lora_weights": "corda"}, "init_lora_weights"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights"),
        ({"init_lora_weights": "lora_ga"}, "init_lora_weights"),
        ({"init_lora_weights": ["eva"]}, "init_lora_weights"),
        ({"init_lora_weights": 1}, "init_lora_weights"),
        ({"alpha_pattern": {"(q_proj": 1}}, "damaged"),
        ({"rank_pattern": [1]}, "rank_pattern must be an object"),
        ({"r": 8}, "has the rank 4, the configuration says 8"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(
    config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelLoadError) as refused:
        PeftAdapter(write(tmp_path, **config))
    assert message in str(refused.value)


@pytest.mark.parametrize("first", [True, False, None, "gaussian", "Gaussian", "eva", "orthogonal", "mica"])
def test_beginnings_that_leave_the_base_alone_are_served(first: object, tmp_path: Path) -> None:
    assert PeftAdapter(write(tmp_path, init_lora_weights=first)).targets[0].scale == 2.0


def test_hostile_patterns_cost_little() -> None:
    hostile = [f"({'a|' * 5}.)({'a|' * 4}.)(b|.).*.*{at}z" for at in range(64)]
    plain = [f"model.layers.{at}.self_attn.q_proj" for at in range(4000)]
    patterns = Patterns(dict.fromkeys([*hostile, *plain], 1.0))
    with at_most(20):
        assert [patterns.find("a." * 30 + f"a{at}", 2.0) for at in range(4)] == [2.0] * 4
        assert [patterns.find(name, 2.0) for name in plain[:50]] == [1.0] * 50


@pytest.mark.parametrize(
    "path", ["model.layers.1.self_attn.q_proj", "q_proj", "a.b", "layers.11.mlp.up_proj"]
)
def test_patterns_match_what_pefts_match(path: str) -> None:
    from peft.utils.other import get_pattern_key

    keys = [
        r"^q_proj", r"layers\.1\.self_attn.*", r"^model\.layers\.\d+\..*q_proj", "1.mlp.up_proj",
        "mlp.up_proj", r".*\.b", "a", "(self_attn|mlp)\\.(q_proj|up_proj)", "q_proj|up_proj",
        "[q-u]_proj", r"a\.b", "proj",
    ]  # fmt: skip
    for begin in range(len(keys)):
        values = {key: float(at) for at, key in enumerate(keys[begin:])}
        expected = values.get(get_pattern_key(list(values), path), -1.0)
        assert Patterns(values).find(path, -1.0) == expected, keys[begin:]


def test_a_file_that_is_cut_short_after_it_was_read_harms_nobody(tmp_path: Path) -> None:
    adapter = PeftAdapter(write(tmp_path))
    digest = adapter.digest
    whole = bytes(adapter.raw(adapter.targets[0].down))
    with (tmp_path / "adapter_model.safetensors").open("r+b") as file:
        file.truncate(8)
    assert bytes(adapter.raw(adapter.targets[0].down)) == whole == np.ones((4, 32), np.float32).tobytes()
    assert PeftAdapter(write(tmp_path)).digest == digest


def test_a_file_that_is_too_large_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = write(tmp_path) / "adapter_model.safetensors"
    with path.open("r+b") as file:
        file.truncate(64 << 30)  # a hole; reading it would use all memory
    with pytest.raises(ModelLoadError, match=r"has 68719476736 bytes; at most 1073741824 are read"):
        PeftAdapter(tmp_path)
    with pytest.raises(ModelLoadError, match=r"at most 100 are read: so it is"):
        PeftAdapter(tmp_path, 100, ": so it is")


def test_a_file_that_is_too_large_for_what_else_it_holds_is_refused_by_that_name(tmp_path: Path) -> None:
    head = "base_model.model.lm_head.base_layer.weight"
    write(tmp_path, matrices() | {head: np.ones((64, 32), np.float32)})
    with pytest.raises(ModelLoadError, match=r"lm_head\.base_layer.*belongs to an embedding or the head"):
        PeftAdapter(tmp_path, 100, ": so it is")


def test_names_without_the_prefix_are_read_as_transformers_saves_them(tmp_path: Path) -> None:
    bare = NAME.removeprefix("base_model.model.")
    adapter = PeftAdapter(write(tmp_path, matrices(bare), alpha_pattern={"q_proj": 4}))
    [target] = adapter.targets
    assert (target.module, target.scale) == (bare, 1.0)
    assert {target.down.name, target.up.name} == set(matrices(bare))
    with pytest.raises(ModelLoadError, match=r"also present with the prefix 'base_model\.model\.'"):
        PeftAdapter(write(tmp_path, matrices() | matrices(bare)))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({f"{NAME}.lora_magnitude_vector.weight": np.ones(4, np.float32)}, "DoRA"),
        ({"base_model.model.model.embed_tokens.lora_embedding_A": np.ones((4, 9), np.float32)}, "embeddings"),
        (
            {"base_model.model.lm_head.base_layer.weight": np.ones((4, 4), np.float32)},
            "an embedding or the head",
        ),
        ({f"{NAME}.lora_B.bias": np.ones(4, np.float32)}, "lora_bias"),
        ({"base_model.model.lm_head.modules_to_save.weight": np.ones((4, 4), np.float32)}, "modules_to_save"),
        ({"other.weight": np.ones((4, 4), np.float32)}, "'other.weight' is not a LoRA matrix"),
    ],
)
def test_a_tensor_that_is_no_matrix_of_lora_is_refused_by_name(
    tensors: dict[str, np.ndarray], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelLoadError) as refused:
        PeftAdapter(write(tmp_path, matrices() | tensors))
    assert message in str(refused.value) and next(iter(tensors)) in str(refused.value)


def test_a_matrix_alone_and_odd_types_are_refused(tmp_path: Path) -> None:
    alone = {name: each for name, each in matrices().items() if "lora_A" in name}
    with pytest.raises(ModelLoadError, match="lora_B"):
        PeftAdapter(write(tmp_path, alone))
    with pytest.raises(ModelLoadError, match="dtype I8"):
        PeftAdapter(write(tmp_path, {name: each.astype(np.int8) for name, each in matrices().items()}))
    with pytest.raises(ModelLoadError, match="must be a matrix"):
        PeftAdapter(write(tmp_path, matrices() | {f"{NAME}.lora_A.weight": np.ones(4, np.float32)}))
    with pytest.raises(ModelLoadError, match="changes nothing"):
        PeftAdapter(write(tmp_path, {}))


def test_a_truncated_file_and_a_missing_one_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path) / "adapter_model.safetensors"
    whole = path.read_bytes()
    path.unlink()
    path.write_bytes(whole[:-7])
    with pytest.raises(ModelLoadError, match="truncated"):
        PeftAdapter(tmp_path)
    path.unlink()
    with pytest.raises(ModelLoadError, match="no such file"):
        PeftAdapter(tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(ModelLoadError, match="pickled adapters are never read"):
        PeftAdapter(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(ModelLoadError, match=r"adapter_config\.json"):
        PeftAdapter(tmp_path)
