"""Run llama.cpp's own converter, with its sources on PYTHONPATH.

Arguments: the checkpoint, then pairs of type and output; `mmproj-` before a type asks for the vision tower.

The converter identifies a tokenizer by a hash of its output for a fixed text and rejects test tokenizers.
Here every tokenizer is therefore declared as one that splits text like GPT-2's, even if the family uses
another kind. The module also patches what is broken in this release. `family_files` runs it; it imports
nothing from this project.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import convert_hf_to_gguf  # type: ignore[import-not-found]
from conversion.baichuan import BaichuanModel  # type: ignore[import-not-found]
from conversion.base import ModelBase, TextModel  # type: ignore[import-not-found]
from conversion.chatglm import ChatGLMModel  # type: ignore[import-not-found]
from conversion.gemma import Gemma3Model, Gemma4Model  # type: ignore[import-not-found]
from conversion.glm import Glm4Model  # type: ignore[import-not-found]
from conversion.hunyuan import HunYuanMoEModel  # type: ignore[import-not-found]
from conversion.internlm import InternLM2Model, InternLM3Model  # type: ignore[import-not-found]
from conversion.jamba import JambaModel  # type: ignore[import-not-found]
from conversion.qwen import Qwen3NextModel, QwenModel  # type: ignore[import-not-found]
from conversion.stablelm import StableLMModel  # type: ignore[import-not-found]

_LOAD, _MODIFY = ModelBase.load_hparams, StableLMModel.modify_tensors
_MODIFY_GEMMA3, _MODIFY_BAICHUAN = Gemma3Model.modify_tensors, BaichuanModel.modify_tensors


def _name_pre_tokenizer(model: Any, tokenizer: Any) -> str:
    return "gpt-2"


def _load_hparams(directory: Path, *more: Any, **named: Any) -> Any:
    """Keep keys that converters read and transformers 5 removes, and drop one that it adds.

    They are those of GPT-NeoX, EXAONE 3 and Nemotron-H, whose converter takes any model with the last one for
    one of experts.
    """
    kept = ("rotary_pct", "activation_function", "hybrid_override_pattern")
    given = json.loads((directory / "config.json").read_text("utf-8"))
    found = {
        **{key: given[key] for key in kept if key in given},
        **_LOAD(directory, *more, **named),
    }
    if "E" not in found.get("hybrid_override_pattern", "E"):
        del found["num_experts_per_tok"]
    return found


def _modify_tensors(model: Any, *more: Any) -> Iterator[Any]:
    """Yield the head norms too, which StableLM's converter returns from a generator."""
    returned = yield from _MODIFY(model, *more)
    if returned is not None:
        yield from returned


def _modify_gemma3(model: Any, tensor: Any, name: str, layer: Any) -> Iterator[Any]:
    """Yield all rows of the embedding; Gemma 3's converter drops rows without a token in tokenizer.json."""
    modify = TextModel.modify_tensors if "embed_tokens" in name else _MODIFY_GEMMA3
    yield from modify(model, tensor, name, layer)


def _modify_baichuan(model: Any, tensor: Any, name: str, layer: Any) -> Iterator[Any]:
    """Yield tensors outside attention, too, for which Baichuan's converter calls itself forever."""
    modify = _MODIFY_BAICHUAN if "W_pack" in name else TextModel.modify_tensors
    yield from modify(model, tensor, name, layer)


if __name__ == "__main__":
    TextModel.get_vocab_base_pre = _name_pre_tokenizer
    TextModel._set_vocab_sentencepiece = lambda model, *_: model._set_vocab_gpt2()
    ModelBase.load_hparams = staticmethod(_load_hparams)
    StableLMModel.modify_tensors = _modify_tensors
    Gemma3Model.modify_tensors = _modify_gemma3
    BaichuanModel.modify_tensors = _modify_baichuan
    Qwen3NextModel.no_mtp = True  # otherwise the converter requires draft layers
    TextModel._set_vocab_glm = TextModel._set_vocab_gpt2
    internlm = (InternLM2Model, InternLM3Model)
    for model in (ChatGLMModel, Gemma4Model, Glm4Model, HunYuanMoEModel, *internlm, JambaModel, QwenModel):
        model.set_vocab = TextModel._set_vocab_gpt2
    checkpoint, *outputs = sys.argv[1:]
    for kind, output in zip(outputs[::2], outputs[1::2], strict=True):
        plain = kind.removeprefix("mmproj-")
        sys.argv[1:] = [checkpoint, "--outtype", plain, "--outfile", output]
        sys.argv += ["--mmproj"] * (plain != kind)
        convert_hf_to_gguf.main()
