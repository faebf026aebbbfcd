"""What a model needs from a device is named from its configuration, so that no device computes it wrongly."""

from __future__ import annotations

from typing import Any

import pytest

from tests.models.test_config_changes import BY_ARCHITECTURE, config_of
from tgi_asgi.models.loading.recognise import read_config
from tgi_asgi.models.loading.split import unsplit
from tgi_asgi.models.needs import Need, needs_of
from tgi_asgi.runner.cuda_load import SUPPORTED_NEEDS

_ATTENDS = {"layer_types": ["full_attention", "sliding_attention"] * 2}
_WHOLE = {"rope_theta": 500.0, "rope_type": "default"}
_ONE_ROPE = {"rope_parameters": {"full_attention": _WHOLE, "sliding_attention": _WHOLE}}
_ROTATES, _GATES = Need.PROPORTIONAL_ROPE, Need.OUTPUT_GATES


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (_ATTENDS, {_ROTATES, _GATES}),
        ({**_ATTENDS, "use_attention_gate": False}, {_ROTATES}),
        ({**_ATTENDS, **_ONE_ROPE}, {_GATES}),
        ({**_ATTENDS, **_ONE_ROPE, "use_attention_gate": False}, set()),
    ],
)
def test_layers_with_attention_alone_may_need_what_no_gpu_kernel_has(
    changes: dict[str, Any], expected: set[Need]
) -> None:
    family, config = read_config({**config_of(BY_ARCHITECTURE["Lfm3ForCausalLM"]), **changes})
    assert needs_of(config) - SUPPORTED_NEEDS == expected
    assert (unsplit(config, family) is not None) == (_GATES in expected)
