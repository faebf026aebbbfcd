"""Every architecture of `AutoModelForCausalLM`: how it is served, and that it equals `transformers`.

The normal run covers a selection; `make test-models` runs all.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.support import architectures
from tests.support import generic_table as table
from tests.support.architecture_table import NOT_BUILT, TYPES
from tests.support.generic import measure, open_generic
from tests.support.generic_page import page
from tgi_asgi.errors import ModelLoadError
from tgi_asgi.models.generic import guards
from tgi_asgi.models.generic.common import CommonDecoder
from tgi_asgi.models.loading.recognise import is_native

# The modules of GPT-BigCode before 5.22.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

# Relative to the largest logit of a sequence, over every token of three sequences that are cut into chunks,
# mixed in steps and continued token by token, in float32. Most are within 1e-6, recurrent layers within 1e-4.
EQUAL = 1e-3

ROOT = Path(__file__).parents[3]
Checkpoint = Callable[[str], Path]


def is_served(model_type: str) -> bool:
    return table.tier_of(model_type) != "refused"


def rows(names: list[str]) -> list[Any]:
    """Return a test's parameters; those outside the few are marked `thorough`, or unusual ones `models`."""
    thorough, models = pytest.mark.thorough, pytest.mark.models
    return [
        pytest.param(name, marks=() if name in table.FEW else thorough if name in table.USUAL else models)
        for name in names
    ]


BUILDABLE = architectures.buildable()


def test_the_table_names_architectures_once() -> None:
    groups = [
        set(table.COMMON),
        set(table.SEQUENTIAL),
        set(table.REFUSED),
        set(NOT_BUILT),
    ]
    assert sum(map(len, groups)) == len(set.union(*groups))
    assert set.union(*groups) | set(table.USUAL) <= set(TYPES)


def test_the_table_knows_which_have_a_family() -> None:
    names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    native = {name for name in BUILDABLE if is_native({"architectures": [names[name]], "model_type": name})}
    assert native == set(table.NATIVE) & set(BUILDABLE)


def test_the_page_has_the_table_as_it_is() -> None:
    text = (ROOT / "docs/generic.md").read_text(encoding="utf-8")
    assert page() in text, "docs/generic.md must contain the output of `python -m tests.support.generic_page`"


@pytest.mark.parametrize("model_type", rows([name for name in BUILDABLE if is_served(name)]))
def test_all_tokens_have_the_logits_of_transformers(model_type: str, checkpoint: Checkpoint) -> None:
    found = measure(checkpoint(model_type))
    assert found.difference < EQUAL
    assert found.tier == table.tier_of(model_type), found.reason
    assert table.SEQUENTIAL.get(model_type, "") in found.reason


@pytest.mark.parametrize("model_type", rows([name for name in BUILDABLE if name in table.COMMON]))
def test_the_code_of_transformers_runs_decoders_of_the_common_shape_as_well(
    model_type: str, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CommonDecoder, "find", lambda *_: None)
    found = measure(checkpoint(model_type))
    assert found.difference < EQUAL
    assert found.tier == "generic"


@pytest.mark.parametrize("model_type", rows([name for name in BUILDABLE if name in table.REFUSED]))
def test_a_refusal_comes_before_weights_are_read(
    model_type: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """Copy only the JSON files of the checkpoint, without a byte of any tensor."""
    for file in checkpoint(model_type).glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    with pytest.raises(ModelLoadError, match=table.REFUSED[model_type]):
        open_generic(tmp_path)


@pytest.mark.parametrize("model_type", rows(["cpmant", "prophetnet"]))
def test_what_is_refused_by_name_would_not_pass_the_self_check(
    model_type: str, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guards, "_KNOWN", {})
    with pytest.raises(ModelLoadError, match=r"does not run here|fails its self-check"):
        measure(checkpoint(model_type))
