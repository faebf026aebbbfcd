"""vLLM's chat templates for tools, from its source package (47 MB, fetched once into build/)."""

from __future__ import annotations

import re
from pathlib import Path

from tests.support.source_package import SourcePackage

_PACKAGE = SourcePackage(
    store="vllm",
    release="vllm-0.33.0",
    folder="f7/25/aa5684e9c59d6fc75f78926b7f15e8d9adc7de2d9e6e7575b80776ad8169",
    sha256="f4c33c2503d52bb411146afa9618a4f48bed68912f617e6803ac8d76e4c74112",
    members=re.compile(r"LICENSE|examples/tool_chat_template_\w+(\.\w+)?\.jinja"),
)


def vllm_templates() -> Path:
    """Return the folder of the templates; skip the calling test if there is no network."""
    return _PACKAGE.root() / "examples"
