"""Each key of a config.json, changed: families compute what `transformers` then computes, or leave it to it.

A class of `transformers` reads the changed file, makes a model of random weights and saves these, so that a
key that a family ignores, or reads although the class does not, gives other logits here.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from tests.support.checkpoints import reference_logits, save_tokenizer
from tests.support.families import CASES
from tests.support.family_case import FamilyCase
from tests.support.family_files import Reference
from tests.support.family_scores import differences, score
from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats.sources import ModelFiles
from tgi_asgi.models.loading.recognise import is_native, read_config, with_architecture

EXACT = 1e-2  # of a log-probability; norms after an MLP of one column are within 3e-3, others within 2e-4
# The norm of a state of one number is little but its sign: with it, `transformers` in float32 is itself 0.012
# from float64.
LOOSE = {"{'mamba_d_state': 1}": 0.05}
IDS = torch.randint(3, 200, (40,), generator=torch.Generator().manual_seed(3)).tolist()
BY_ARCHITECTURE = {case.architecture: case for case in reversed(CASES)}
# Keys about anything but the arithmetic, or about sizes that no tiny model may change. With ALiBi, Falcon is
# right by one attention of `transformers` only, which `FamilyCase.attention` names (`falcon-rw`).
OTHERS = frozenset({
    "architectures", "model_type", "dtype", "bos_token_id", "eos_token_id", "pad_token_id", "vocab_size",
    "num_hidden_layers", "hidden_size", "max_position_embeddings", "seq_length", "max_seq_len", "n_positions",
    "id2label", "label2id", "is_encoder_decoder", "transformers_version", "alibi",
})  # fmt: skip
_QUARTER = {"rope_type": "default", "partial_rotary_factor": 0.25}
_ONE_ROPE = {"full_attention": {"rope_theta": 500.0, "rope_type": "default"}}
_YARN = {"factor": 4.0, "original_max_position_embeddings": 64}
ROPES: tuple[dict[str, Any], ...] = (
    {"rope_type": "linear", "factor": 2.0}, {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "yarn", **_YARN}, {"rope_type": "yarn", **_YARN, "mscale": 0.7, "mscale_all_dim": 1.3},
    {"rope_type": "yarn", **_YARN, "attention_factor": 1.7}, {"rope_type": "default", "rope_theta": 500.0},
    {"rope_type": "default", "partial_rotary_factor": 0.5},
    _QUARTER,
    {"rope_type": "llama3", **_YARN, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
)  # fmt: skip


def config_of(case: FamilyCase) -> dict[str, Any]:
    """Return a case's config.json with all keys that its class has."""
    made = getattr(transformers, case.architecture).config_class(**copy.deepcopy(dict(case.config)))
    values: dict[str, Any] = json.loads(made.to_json_string(use_diff=False))
    return {**values, **case.json, "architectures": [case.architecture]}


def changes_of(config: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for key, value in sorted(config.items()):
        if key in OTHERS or key.startswith("_"):
            continue
        found: list[Any] = [None]
        if key.startswith("rope_"):
            found += [{"rope_theta": 10000.0, **rope} for rope in ROPES]
        elif isinstance(value, bool):
            found += [not value]
        elif isinstance(value, int):
            found += [value * 2, value + 1, 1]
        elif isinstance(value, float):
            found += [value * 1.7 + 0.1, 0.5]
        elif isinstance(value, str):
            found += ["gelu", "relu", "silu", "unknown"]
        elif isinstance(value, list):
            found += [value[::-1], value[1:] + value[:1], [*value[:1]] * len(value)]
        elif value is None:
            found = [True, 5, 0.5, 64]
        yield from ({key: each} for each in found if each != value)


def randomise(model: transformers.PreTrainedModel) -> None:
    """Give a model weights whose norms and biases matter, and whose logits are far from flat."""
    torch.manual_seed(1)
    tables = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    corrections = [buffer for name, buffer in model.named_buffers() if name.endswith("bias")]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() < 2:
                is_norm = "norm" in name and name.endswith("weight")
                parameter.normal_(1.0 if is_norm else 0.0, 0.1)
            else:
                parameter.normal_(0.0, 1.0 if id(parameter) in tables else 2 * parameter.shape[-1] ** -0.5)
        for buffer in corrections:
            buffer.normal_(0.0, 0.3)


def difference(folder: Path, case: FamilyCase, config: Mapping[str, Any]) -> float | None:
    """Return the largest error in log-probabilities; None if either library refuses the configuration."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    try:
        named = with_architecture(copy.deepcopy(dict(config)))
        assert is_native(named)
        read_config(named)
        made = transformers.AutoConfig.from_pretrained(folder, attn_implementation=case.attention)
        model = transformers.AutoModelForCausalLM.from_config(made).float().eval()
        randomise(model)
        logprobs = reference_logits(model, IDS).log_softmax(-1).numpy()
    except ModelLoadError:
        return None
    except Exception:  # `transformers` may raise anything on such values
        return None
    if not np.isfinite(logprobs).all():
        return None
    model.save_pretrained(folder / "saved")
    for file in (folder / "saved").glob("model*"):
        file.rename(folder / file.name)
    save_tokenizer(folder)
    reference = Reference(IDS, [int(logprobs[-1].argmax())], logprobs)
    job = score(case, ModelFiles(case.name, None, "directory", folder), reference, "float32")
    return float(differences(job, reference).max())


@pytest.mark.parametrize(
    ("architecture", "change", "is_ours"),
    [
        ("OlmoForCausalLM", {"layer_norm_eps": 0.1}, True),
        ("Starcoder2ForCausalLM", {"layer_norm_eps": 0.1}, True),
        ("GPTNeoXForCausalLM", {"rope_parameters": None, "rope_theta": 500.0}, True),
        ("DeepseekV3ForCausalLM", {"rope_interleave": None}, True),
        ("DeepseekV3ForCausalLM", {"norm_topk_prob": None}, True),
        ("Gemma3ForCausalLM", {"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}}, False),
        ("Olmo3ForCausalLM", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, False),
        ("Lfm2ForCausalLM", {"hidden_activation": "relu"}, False),
        ("Lfm3ForCausalLM", {"rms_norm_eps": 0.3}, True),
        ("Lfm3ForCausalLM", {"head_dim": 20}, False),
        ("Lfm3ForCausalLM", {"layer_types": ["full_attention"] * 4, "rope_parameters": _ONE_ROPE}, True),
        ("BambaForCausalLM", {"rope_parameters": {"rope_theta": 500.0, **_QUARTER}}, True),
        ("BambaForCausalLM", {"partial_rotary_factor": 0.25}, True),
        ("BambaForCausalLM", {"mamba_d_ssm": 128}, True),
        ("NemotronHForCausalLM", {"hidden_act": "silu"}, True),
        ("NemotronHForCausalLM", {"mamba_dt_min": 0.3, "time_step_min": 0.001}, True),
        ("Mamba2ForCausalLM", {"norm_before_gate": True, "rms_norm": True}, True),  # Codestral Mamba
    ],
    ids=str,
)
def test_keys_that_a_class_reads_otherwise_than_most(
    architecture: str, change: dict[str, Any], is_ours: bool, tmp_path: Path
) -> None:
    case = BY_ARCHITECTURE[architecture]
    found = difference(tmp_path / "changed", case, {**config_of(case), **change})
    assert (found is not None) == is_ours
    assert found is None or found <= EXACT


@pytest.mark.models
@pytest.mark.parametrize("architecture", BY_ARCHITECTURE)
def test_any_changed_key_is_computed_as_by_transformers_or_left_to_it(
    architecture: str, tmp_path: Path
) -> None:
    case = BY_ARCHITECTURE[architecture]
    config = config_of(case)
    found = {
        str(change): difference(tmp_path / str(index), case, {**config, **change})
        for index, change in enumerate([{}, *changes_of(config)])
    }
    assert found["{}"] is not None
    assert not {
        change: each for change, each in found.items() if each is not None and each > LOOSE.get(change, EXACT)
    }
