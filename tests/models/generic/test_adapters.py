"""LoRA adapters on models that `transformers` runs: against `peft`, mixed in every step, or refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support import architectures
from tests.support.adapters import make_adapter, peft_logits, write_adapter
from tests.support.generic import LENGTHS, load_generic, run_steps
from tests.support.vision_runs import load_native
from tgi_asgi import ops
from tgi_asgi.errors import ModelLoadError
from tgi_asgi.models.adapters import AdapterLoader, targets_of
from tgi_asgi.models.generic.model import GenericModel
from tgi_asgi.ops.adapters import NativeAdapter

Checkpoint = Callable[[str], Path]

EXACT = 2e-5  # error of a logit, relative to the largest
MIN_EFFECT = 0.02
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
DELTA_NET = [f"in_proj_{name}" for name in ("qkv", "z", "b", "a")] + ["out_proj"]


@pytest.mark.parametrize(
    ("model_type", "targets", "is_generic"),
    [
        ("gpt2", ["c_attn", "c_proj", "c_fc"], True),  # transposed matrices
        ("gpt_neox", ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"], True),
        ("phi", ["q_proj", "v_proj", "dense", "fc1"], True),
        ("gemma2", [*ATTENTION, "gate_proj", "up_proj", "down_proj"], True),
        ("olmoe", ATTENTION, True),
        ("qwen3_5_text", [*DELTA_NET, *ATTENTION], True),
        ("gemma", [*ATTENTION, "gate_proj", "up_proj", "down_proj"], False),
    ],
)
def test_a_model_gives_what_peft_gives(
    model_type: str, targets: list[str], is_generic: bool, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    base = checkpoint(model_type)
    changes: dict[str, Any] = {"target_modules": targets, "fan_in_fan_out": model_type == "gpt2"}
    folders = [make_adapter(base, tmp_path / str(seed), seed=seed, **changes) for seed in (1, 2)]
    model = load_generic(base)
    assert isinstance(model, GenericModel) is is_generic
    loader = AdapterLoader(ops.AdapterLayout(targets_of(model), max_rank=8))
    adapters = [loader.load(folders[0]).weights, None, loader.load(folders[1]).weights]
    ids = [architectures.random_ids(length, seed) for seed, length in enumerate(LENGTHS)]
    expected = [
        peft_logits(base, adapter, tokens)[0]
        for adapter, tokens in zip((folders[0], None, folders[1]), ids, strict=True)
    ]
    [without] = peft_logits(base, None, ids[0])
    assert np.abs(expected[0] - without).max() > MIN_EFFECT * np.abs(without).max()
    assert run_steps(model, ids, expected, layout=loader.layout, adapters=adapters) <= EXACT


@pytest.mark.parametrize("open_model", [load_generic, load_native], ids=["module", "native"])
@pytest.mark.parametrize(("family", "old"), [("gemma3", "language_model.model."), ("qwen2_5_vl", "model.")])
def test_adapters_with_the_former_names_of_vision_models_load(
    family: str, old: str, open_model: Callable[[Path], Any], folder_of: Checkpoint, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Before transformers 4.52, the text model's modules had other names."""
    packed: list[Mapping[str, ops.Delta]] = []
    loader = AdapterLoader(ops.AdapterLayout(targets_of(open_model(folder_of(family))), max_rank=8))
    new, pack = "model.language_model.", loader.layout.pack
    modules = [name for name in loader.layout.targets if name.startswith(new) and name.endswith("q_proj")]

    def keep(deltas: Mapping[str, ops.Delta], number: int) -> NativeAdapter:
        packed.append(deltas)
        return pack(deltas)

    monkeypatch.setattr(loader.layout, "pack", keep)
    for folder, prefix in (("new", new), ("old", old)):
        shapes = {
            f"base_model.model.{prefix}{name.removeprefix(new)}": loader.layout.targets[name].shape
            for name in modules
        }
        loader.load(write_adapter(tmp_path / folder, shapes))
    today, former = packed
    assert list(today) == list(former) == modules != []
    for name in modules:
        np.testing.assert_array_equal(today[name].down, former[name].down)


def test_adapters_of_nemotron_s_own_code_are_those_of_transformers(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """NVIDIA's code, on which adapters are trained, calls `backbone` what `transformers` calls `model`."""
    targets = targets_of(load_generic(checkpoint("nemotron_h")))
    loader = AdapterLoader(ops.AdapterLayout(targets, max_rank=8))
    name = next(each for each in targets if each.startswith("model.") and each.endswith("q_proj"))
    former = f"base_model.model.backbone.{name.removeprefix('model.')}"
    assert loader.load(write_adapter(tmp_path / "former", {former: targets[name].shape})).rank == 4


def test_experts_are_refused_by_name(checkpoint: Checkpoint, tmp_path: Path) -> None:
    loader = AdapterLoader(ops.AdapterLayout(targets_of(load_generic(checkpoint("olmoe"))), max_rank=8))
    name = "base_model.model.model.layers.0.mlp.experts.3.up_proj"
    write_adapter(tmp_path / "a", {name: (32, 64)})
    with pytest.raises(ModelLoadError, match=rf"'{name}.lora_A.weight': experts of a mixture"):
        loader.load(tmp_path / "a")


def test_products_of_layers_with_states_are_refused_by_name(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Check the products that are computed sequence by sequence, which a step calls several times."""
    base = checkpoint("lfm2")
    model = load_generic(base)
    assert isinstance(model, GenericModel)
    targets = targets_of(model)
    convolution = next(name for name, _ in model.module.named_modules() if name.endswith("conv.in_proj"))
    assert convolution not in targets
    assert any(name.endswith("self_attn.q_proj") for name in targets)
    assert any(name.endswith("feed_forward.w2") for name in targets)
    loader = AdapterLoader(ops.AdapterLayout(targets, max_rank=8))
    with pytest.raises(ModelLoadError, match=r"conv\.in_proj.*none that adapters can change"):
        loader.load(make_adapter(base, tmp_path / "adapter", seed=1, target_modules=["in_proj"]))


@pytest.mark.parametrize(
    ("family", "reason"),
    [("roformer", "one sequence at a time"), ("mamba", "it has no product that they can change")],
)
def test_a_model_without_products_for_them_takes_no_adapters(
    family: str, reason: str, checkpoint: Checkpoint
) -> None:
    with pytest.raises(ModelLoadError, match=f"takes no adapters.*{reason}"):
        AdapterLoader(ops.AdapterLayout(targets_of(load_generic(checkpoint(family))), max_rank=8))
