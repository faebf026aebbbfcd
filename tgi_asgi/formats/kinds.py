"""Recognise folders and repositories that are not models that can be served, and say what to do instead.

`sources.py` and `hub_models.py` call this before weights are fetched or read. It checks the files' names,
then config.json.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from tgi_asgi.errors import ModelLoadError, check
from tgi_asgi.formats.config_file import read_config_file
from tgi_asgi.formats.files import read_json
from tgi_asgi.formats.peft_config import ADAPTER_CONFIG
from tgi_asgi.formats.weight_files import weight_names

_CONFIG = "config.json"
_BASE = "base_model_name_or_path"
_USE_ANOTHER = "use the original model, or one in GGUF"
# Weight formats that are never read, by file-name patterns; the first match gives the message.
_UNREAD = (
    (("*ggml*.bin",), f"a file in GGML's format, which GGUF has replaced: {_USE_ANOTHER}"),
    (
        ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.bin.index.json"),
        "a checkpoint of pickled weights, which are never read because they can run any code: convert them "
        "to safetensors, or look on the Hub for a revision that has them (--revision refs/pr/N)",
    ),
    (("*.onnx", "onnx"), f"an export to ONNX, which is not read: {_USE_ANOTHER}"),
    (("openvino*.xml",), f"an export to OpenVINO, which is not read: {_USE_ANOTHER}"),
    (("*.mlmodel", "*.mlpackage", "*.mlpackage/*", "*.mlmodelc"), f"an export to Core ML: {_USE_ANOTHER}"),
    (("*.tflite", "*.task", "*.litertlm"), f"an export to LiteRT, which is not read: {_USE_ANOTHER}"),
    (("*.engine", "*.plan"), f"a TensorRT engine, which is not read: {_USE_ANOTHER}"),
    (("*.nemo",), f"a NeMo checkpoint, which is not read: {_USE_ANOTHER}"),
    (("*.h5", "*.msgpack"), f"a TensorFlow or Flax checkpoint, which is not read: {_USE_ANOTHER}"),
)
# Architectures recognised by name; for others, the generic path reports why it cannot serve them.
_SEES = re.compile(
    r"For(?:\w*Image(?!Text)\w*|\w*Object\w*|\w*Segmentation|\w*Depth\w*|Video\w*|Keypoint\w*)$"
    r"|CLIP\w*Model$|^(?:Siglip|ViT|DeiT|Beit|Swin|Dinov|ConvNext|ResNet|Sam\d?|Align|Hiera|TimmWrapper)"
)
# Types of `transformers` that turn a text into another.
ENCODER_DECODERS = frozenset({
    "bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "encoder-decoder", "led", "longt5",
    "m2m_100", "marian", "mbart", "mt5", "mvp", "nllb-moe", "pegasus", "pegasus_x", "plbart",
    "switch_transformers", "t5", "t5gemma", "t5gemma2", "umt5",
})  # fmt: skip
# Others that do, and what keeps them from being served.
_UNSERVED_PAIRS: Mapping[str, str] = {
    "fsmt": "reads and writes in two vocabularies, of which a tokenizer.json holds one",
    "prophetnet": "computes other logits where several tokens of an answer come at once than one by one",
}
_LABELS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
_HEARS = re.compile(
    r"For(?:CTC|Audio\w*|Speech\w*|TextTo\w+|XVector)$"
    r"|^(?:Wav2Vec2|Hubert|WavLM|Clap|Vits|Bark|Musicgen|UniSpeech|SEW|Data2VecAudio)"
)


def is_adapter(names: Collection[str]) -> bool:
    """Return whether the files of a folder or repository, by name, are an adapter's and no model's."""
    return ADAPTER_CONFIG in names and not weight_names(names)


def base_of(model_id: str, directory: Path) -> tuple[str, str | None]:
    """Return the base model that an adapter's configuration names, and its revision.

    Raises:
        ModelLoadError: if it names none.
    """
    config = read_json(directory / ADAPTER_CONFIG)
    base, revision = (config.get(key) for key in (_BASE, "revision"))
    if not isinstance(base, str) or not base:
        raise ModelLoadError(
            f"{model_id} is an adapter whose {ADAPTER_CONFIG} names no base model ({_BASE}): serve that with "
            f"--lora-adapters {model_id}"
        )
    _refuse_elsewhere(f"{model_id} is an adapter of", base)
    return base, revision if isinstance(revision, str) else None


def is_draft_heads(config: Mapping[str, Any]) -> bool:
    """Return whether a config.json is of heads alone that draft tokens for another model.

    TGI knows two kinds: Medusa (Cai et al., arXiv 2401.10774) and IBM's MLP speculators (Wertheimer et al.,
    arXiv 2404.19124).
    """
    return "medusa_num_heads" in config or config.get("model_type") == "mlp_speculator"


def base_of_draft_heads(model_id: str, directory: Path) -> str:
    """Return the model that heads draft for.

    Raises:
        ModelLoadError: if their configuration names none.
    """
    base = read_json(directory / _CONFIG).get(_BASE)
    if not isinstance(base, str) or not base:
        raise ModelLoadError(
            f"{model_id} has draft heads, but its {_CONFIG} names no model for them ({_BASE})"
        )
    _refuse_elsewhere(f"{model_id} has draft heads for", base)
    return base


def _refuse_elsewhere(what: str, base: str) -> None:
    """Refuse to have something fetched from elsewhere, because a strange repository names it."""
    if base.startswith("pypi:") or (":" in base and not os.path.isdir(base)):
        raise ModelLoadError(f"{what} {base[:200]!r}, which is neither a directory nor an id on the Hub")


def why_unserved_pair(model_type: object, *, is_labelling: bool = False) -> str:
    """Return what keeps an encoder-decoder of this type from being served; empty if nothing does.

    Args:
        is_labelling: Whether it gives labels instead of a text.
    """
    if model_type in ENCODER_DECODERS and not is_labelling:
        return ""
    known = _UNSERVED_PAIRS.get(str(model_type))
    if known is not None:
        return f"is an encoder-decoder that cannot be served: it {known}"
    unlike = "unlike T5 and others that turn a text into another"
    return f"is an encoder-decoder of a kind that is not served, {unlike}"


def servable_config(model_id: str, names: Collection[str], directory: Path) -> dict[str, Any]:
    """Return the config.json of a model with safetensors; refuse everything else.

    Args:
        names: Names of all files in the folder or repository.
        directory: Directory with its JSON files.

    Raises:
        ModelLoadError: if it is something else; the message says what.
    """
    if "model_index.json" in names:
        raise ModelLoadError(
            f"{model_id} is a diffusers pipeline, which generates images: only text models are served"
        )
    weights = weight_names(names)
    config = read_config_file(directory) if _CONFIG in names else {}
    _refuse_quantised(model_id, names, config)
    if weights and _CONFIG in names:
        _refuse_no_text(model_id, config)
        return config
    if "params.json" in names and any(name.startswith("consolidated") for name in names):
        raise ModelLoadError(
            f"{model_id} is in its authors' own format (params.json, consolidated.*): use its version "
            "for transformers, or one in GGUF"
        )
    for patterns, what in () if weights else _UNREAD:
        if any(fnmatchcase(name.lower(), pattern) for name in names for pattern in patterns):
            raise ModelLoadError(f"{model_id} is {what}")
    missing = ".safetensors file" if _CONFIG in names else _CONFIG
    raise ModelLoadError(f"{model_id} is not a model that can be served: it has no {missing}")


def _refuse_quantised(model_id: str, names: Collection[str], config: Mapping[str, Any]) -> None:
    options = config.get("quantization_config")
    method = str(options.get("quant_method", "")) if isinstance(options, dict) else ""
    if method.startswith("exl") or ("measurement.json" in names and "output.safetensors" in names):
        raise ModelLoadError(f"{model_id} is quantised for ExLlama ({method or 'exl2'}): {_USE_ANOTHER}")
    options = config.get("quantization")
    if isinstance(options, dict) and {"group_size", "bits"} <= options.keys():
        raise ModelLoadError(f"{model_id} is quantised for Apple's MLX: {_USE_ANOTHER}")


def _refuse_no_text(model_id: str, config: Mapping[str, Any]) -> None:
    """Refuse models that neither write a text nor embed one."""
    listed = config.get("architectures")
    architecture = str(listed[0])[:100] if isinstance(listed, list) and listed else ""
    if config.get("is_encoder_decoder") is True and not architecture.endswith("EncoderModel"):
        reason = why_unserved_pair(config.get("model_type"), is_labelling=architecture.endswith(_LABELS))
        check(not reason, f"{model_id} ({architecture}) {reason}")
    if _HEARS.search(architecture):
        raise ModelLoadError(f"{model_id} ({architecture}) is an audio model: only text models are served")
    if _SEES.search(architecture):
        raise ModelLoadError(
            f"{model_id} ({architecture}) reads images but writes no text: only text models are served"
        )
