"""What is refused of adapters, by name: kinds that are not computed, damaged files, another base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from tgi_asgi.errors import ModelLoadError
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
    adapter = PeftAdapter(write(tmp_path, base_model_name_or_path="org/base"))
    [target] = adapter.targets
    assert (target.module, target.rank, target.scale) == ("model.layers.0.self_attn.q_proj", 4, 2.0)
    assert (target.down.shape, target.up.shape, adapter.base) == ((4, 32), (64, 4), "org/base")
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
        ({"alpha_pattern": {"(a+)+": 1}}, "pattern that is not read"),
        ({"alpha_pattern": {".*.*.*.*": 1}}, "pattern that is not read"),
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


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({f"{NAME}.lora_magnitude_vector.weight": np.ones(4, np.float32)}, "DoRA"),
        ({"base_model.model.model.embed_tokens.lora_embedding_A": np.ones((4, 9), np.float32)}, "embeddings"),
        ({f"{NAME}.lora_B.bias": np.ones(4, np.float32)}, "lora_bias"),
        ({"base_model.model.lm_head.modules_to_save.weight": np.ones((4, 4), np.float32)}, "modules_to_save"),
        ({"other.weight": np.ones((4, 4), np.float32)}, "'other.weight' is no matrix of LoRA"),
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
