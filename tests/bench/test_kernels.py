"""`bench.kernels` names the calls that it expects of a model which has others."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench.kernels import LAYER, ORDERED_LAYER, Bench, Shape
from tests.support.checkpoints import load_model, make_model
from tests.support.quantised import save_quantised
from tgi_asgi import ops
from tgi_asgi.models.decoder import Decoder


@pytest.mark.parametrize(("has_order", "layer"), [(False, LAYER), (True, ORDERED_LAYER)])
def test_a_model_with_other_calls_is_refused_with_the_number_of_those_expected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_order: bool, layer: tuple[str, ...]
) -> None:
    files = save_quantised(make_model(hidden_size=128), tmp_path, "gptq", has_order=has_order)
    model = load_model(files, ops.Packing(is_exact=False))
    assert isinstance(model, Decoder)
    shape = Shape(1, 1, 16)
    bench: Any = Bench(model.config, model, [shape], "bfloat16", has_float_prompts=False)
    assert bench.seconds(shape, 1)
    monkeypatch.setattr(bench, "_program", SimpleNamespace(native=SimpleNamespace(num_operators=3)))
    with pytest.raises(SystemExit, match=rf"does not have the {len(layer)} calls"):
        bench.seconds(shape, 1)
