"""Each key of a vision model's config.json, changed: logits stay those of `transformers`, or it is refused.

As `tests/models/test_config_changes.py`, with pictures in the prompt.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from tests.models.test_config_changes import OTHERS, changes_of
from tests.support import vision_models as vision
from tests.support.architectures import one_thread
from tests.support.vision_runs import load, run
from tests.support.vision_table import FAMILIES
from tgi_asgi import ops
from tgi_asgi.errors import ModelLoadError

EXACT = 5e-3  # of the largest logit; all are within 1e-5 unless an MLP has one column
ANSWER = [120, 121]
# Keys of a part that are about training, or of parts that the server does not have.
_OTHERS = OTHERS | {"attention_dropout", "initializer_range", "initializer_factor", "layer_types", "depth"}
_FEW = (
    ("llava", "vision_config", {"hidden_act": "relu"}),
    ("llava", None, {"vision_feature_layer": -1}),
    ("pixtral", "vision_config", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    ("qwen2_vl", "vision_config", {"hidden_act": "relu"}),
)
_KINDS = (
    "smolvlm", "pixtral", "qwen3_vl", "gemma3", "lfm2_vl", "internvl", "llama4", "idefics2_split", "mllama",
)  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers' own code


@pytest.fixture(scope="module", autouse=True)
def threads() -> None:
    ops.configure_threads(1, nice=0, pin=False)


def parts_changed(config: Mapping[str, Any]) -> Iterator[tuple[str | None, dict[str, Any]]]:
    """Yield changes of a config.json's parts and of its own keys."""
    parts = {key: value for key, value in config.items() if key.endswith("_config") and value}
    for name, values in [*parts.items(), (None, config)]:
        plain = {
            key: value
            for key, value in values.items()
            if key not in _OTHERS and not key.endswith(("_token_id", "_token_index", "_config"))
        }
        for change in changes_of(plain):
            yield name, change


def whole_config(folder: Path) -> dict[str, Any]:
    """Return a checkpoint's config.json with all keys that its class has."""
    config = json.loads((folder / "config.json").read_text())
    values: dict[str, Any] = json.loads(
        transformers.AutoConfig.from_pretrained(folder).to_json_string(use_diff=False)
    )
    return {**values, "architectures": config["architectures"]}


def difference(
    name: str, original: Path, folder: Path, part: str | None, change: dict[str, Any]
) -> float | None:
    """Return the largest error of the logits; None if either library refuses the configuration."""
    shutil.copytree(original, folder, ignore=shutil.ignore_patterns("model*"))
    config = copy.deepcopy(whole_config(original))
    (config if part is None else config[part]).update(change)
    (folder / "config.json").write_text(json.dumps(config))
    pictures = [vision.picture(50, 30), vision.picture(40, 70, 1)]
    try:
        made = transformers.AutoConfig.from_pretrained(folder, attn_implementation="eager")
        kind = getattr(transformers, FAMILIES[name].architecture)
        with one_thread():
            torch.manual_seed(1)
            vision.save_random(kind(made), folder)
        reference = vision.open_reference(folder)
        prompt = vision.prompt_of(name, folder, ["what is ", pictures[0], " and ", pictures[1], " this?"])
        wanted = vision.reference(folder, prompt, ANSWER, reference)
    except Exception:  # `transformers` may raise anything on such values
        return None
    if not np.isfinite(wanted).all():
        return None
    try:
        model = load(folder)
    except ModelLoadError:
        return None
    (found,), _ = run(model, [(prompt, ANSWER)], [1000])
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize(("name", "part", "change"), _FEW, ids=str)
def test_a_changed_key_is_computed_as_by_transformers(
    name: str, part: str | None, change: dict[str, Any], tmp_path: Path
) -> None:
    vision.make(name, tmp_path / "original")
    found = difference(name, tmp_path / "original", tmp_path / "changed", part, change)
    assert found is not None
    assert found < EXACT


@pytest.mark.models
@pytest.mark.parametrize("name", _KINDS)
def test_any_changed_key_is_computed_as_by_transformers_or_refused(name: str, tmp_path: Path) -> None:
    vision.make(name, tmp_path / "original")
    changes = [(None, {}), *parts_changed(whole_config(tmp_path / "original"))]
    found = {}
    for index, (part, change) in enumerate(changes):
        folder = tmp_path / str(index)
        found[f"{part} {change}"] = difference(name, tmp_path / "original", folder, part, change)
        shutil.rmtree(folder)
    assert found["None {}"] is not None
    assert not {change: each for change, each in found.items() if each is not None and not each < EXACT}
