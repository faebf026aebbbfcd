"""What Gemma 4's native family refuses, or leaves to `transformers`."""

from __future__ import annotations

from typing import Any

import pytest

from tests.models.test_config_changes import BY_ARCHITECTURE, config_of
from tgi_asgi.errors import ModelLoadError, NotInFamily
from tgi_asgi.models.loading.recognise import read_config

_TYPES = {"layer_types": ["sliding_attention"] * 2 + ["full_attention"] * 4}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"use_bidirectional_attention": "all"}, NotInFamily, "concerns more than images"),
        ({"per_layer_config": {"9" * 5000: {}}}, ModelLoadError, "has no layer '9999"),
        ({"per_layer_config": {"6": {}}}, ModelLoadError, "has no layer '6'"),
        ({"per_layer_config": {"0": 3}}, ModelLoadError, "must have objects, got 3"),
        ({**_TYPES, "per_layer_config": {"1": {"head_dim": 96}}}, NotInFamily, "heads of 32 and of 96"),
        ({"num_kv_shared_layers": 6}, ModelLoadError, "leaves 0 layers with keys"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_nested_configurations_are_checked(
    changes: dict[str, Any], error: type[ModelLoadError], message: str
) -> None:
    text = config_of(BY_ARCHITECTURE["Gemma4ForCausalLM"])
    nested = {"architectures": ["Gemma4ForConditionalGeneration"], "model_type": "gemma4"}
    assert read_config({**nested, "text_config": text})[1].num_layers == 6
    with pytest.raises(error, match=message):
        read_config({**nested, "text_config": {**text, **changes}})
