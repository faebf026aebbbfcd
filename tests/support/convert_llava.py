"""Run llama.cpp's first converter of vision towers, with its gguf on PYTHONPATH.

Arguments: that script, then its own. transformers 5 has other names of a tower's tensors than it reads.
"""

from __future__ import annotations

import runpy
import sys
from typing import Any

import transformers

_STATE = transformers.CLIPVisionModel.state_dict


def _state_dict(model: Any, *given: Any, **named: Any) -> dict[str, Any]:
    found = _STATE(model, *given, **named)
    return {f"vision_model.{name.removeprefix('vision_model.')}": each for name, each in found.items()}


if __name__ == "__main__":
    transformers.CLIPVisionModel.state_dict = _state_dict  # type: ignore[assignment]
    # The script drops the last layer of `model.vision_model.encoder`.
    transformers.CLIPVisionModel.vision_model = property(lambda model: model)  # type: ignore[attr-defined]
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
