"""Settings that exclude the projector of a GGUF model."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats.sources import ModelFiles
from tgi_asgi.runner.projector import with_usable_projector
from tgi_asgi.settings import Settings

FILES = ModelFiles("m", None, "gguf", Path("m.gguf"), Path("mmproj-m.gguf"))


@pytest.mark.parametrize(
    ("given", "is_on_gpu", "name"),
    [
        ({"num_shard": 2}, False, "--num-shard 2"),
        ({"num_shard": 2}, True, "--num-shard 2"),
        ({"batch_invariant": True}, True, "--batch-invariant"),
        ({"lora_adapters": ("a=b",)}, True, "LoRA adapters"),
        ({"kv_cache_dtype": "fp8_e4m3fn"}, True, "--kv-cache-dtype fp8_e4m3fn"),
    ],
)
def test_a_projector_is_left_out_for_settings_that_are_for_texts(
    given: dict[str, Any], is_on_gpu: bool, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    settings = Settings(**given)
    with caplog.at_level(logging.WARNING):
        found = with_usable_projector(FILES, settings, is_on_gpu=is_on_gpu)
    assert found == replace(FILES, projector=None)
    (message,) = [record.getMessage() for record in caplog.records]
    assert name in message and "mmproj-m.gguf" in message and "--mmproj none" in message
    with pytest.raises(ModelLoadError, match=f"{name}.* --mmproj"):
        with_usable_projector(replace(FILES, is_projector_named=True), settings, is_on_gpu=is_on_gpu)


@pytest.mark.parametrize(
    ("given", "is_on_gpu"),
    [
        ({}, False),
        ({}, True),
        ({"prompt_precision": "bfloat16"}, False),
        ({"batch_invariant": True, "lora_adapters": ("a=b",), "kv_cache_dtype": "fp8_e4m3fn"}, False),
        ({"num_shard": 2, "model_impl": "native"}, False),
    ],
)
def test_other_settings_leave_it(given: dict[str, Any], is_on_gpu: bool) -> None:
    assert with_usable_projector(FILES, Settings(**given), is_on_gpu=is_on_gpu) is FILES
