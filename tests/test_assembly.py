"""What ends the assembly of a model with a clear error, before or while its libraries are loaded."""

from __future__ import annotations

import sys
import types

import pytest

from tgi_asgi.assembly import load_model, named_adapters
from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats import sources
from tgi_asgi.settings import Settings


@pytest.mark.parametrize("name", ["tgi", "dummy", "toy/model"])
def test_an_adapter_at_the_start_cannot_have_a_name_of_the_model(name: str) -> None:
    with pytest.raises(ModelLoadError, match=f"an adapter cannot be called '{name}'"):
        named_adapters(Settings(lora_modules=(f"{name}=/x",)), "toy/model")


@pytest.mark.parametrize(
    "text",
    [
        "TGI_ISA must be one of portable, avx2 on this machine, got sse9",
        "this build lacks the kernels for this processor: install again on this machine",
    ],
)
def test_kernels_that_the_machine_lacks_end_the_load_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    class Refusing(types.ModuleType):
        def __getattr__(self, name: str) -> object:
            raise ImportError(text)

    monkeypatch.setattr(sources, "resolve", lambda *given: types.SimpleNamespace(model_id="m"))
    monkeypatch.setitem(sys.modules, "tgi_asgi.runner.load", Refusing("tgi_asgi.runner.load"))
    with pytest.raises(ModelLoadError, match=f"^{text}$"):
        load_model(Settings(model_id="m"), lambda *progress: None)
