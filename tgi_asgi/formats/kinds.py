"""What a folder or a repository is if it is no model that can be served: one sentence each, and a way out.

`sources.py` asks before weights are fetched or read: by the files' names, then by config.json.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats.config_file import read_config_file
from tgi_asgi.formats.files import read_json
from tgi_asgi.formats.safetensors import weight_names

_ADAPTER, _CONFIG = "adapter_config.json", "config.json"
_TAKE_ANOTHER = "take the model that it was made from, or one in GGUF"
# Weights that are never read, by patterns of their names; the first that fits speaks.
_UNREAD = (
    (("*ggml*.bin",), f"weights in GGML's format of before GGUF: {_TAKE_ANOTHER}"),
    (
        ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.bin.index.json"),
        "a checkpoint of pickled weights, which are never read, as they may run any code: convert them to "
        "safetensors, or look on the Hub for a revision that has them (--revision refs/pr/N)",
    ),
    (("*.onnx", "onnx"), f"an export to ONNX, which is not read: {_TAKE_ANOTHER}"),
    (("openvino*.xml",), f"an export to OpenVINO, which is not read: {_TAKE_ANOTHER}"),
    (("*.mlmodel", "*.mlpackage", "*.mlpackage/*", "*.mlmodelc"), f"an export to Core ML: {_TAKE_ANOTHER}"),
    (("*.tflite", "*.task", "*.litertlm"), f"an export to LiteRT, which is not read: {_TAKE_ANOTHER}"),
    (("*.engine", "*.plan"), f"an engine of TensorRT, which is not read: {_TAKE_ANOTHER}"),
    (("*.nemo",), f"a checkpoint of NeMo, which is not read: {_TAKE_ANOTHER}"),
    (("*.h5", "*.msgpack"), f"a checkpoint of TensorFlow or Flax, which is not read: {_TAKE_ANOTHER}"),
)
# Architectures whose names tell it; of others the generic path says why it cannot serve them.
_SEES = re.compile(
    r"For(?:\w*Image(?!Text)\w*|\w*Object\w*|\w*Segmentation|\w*Depth\w*|Video\w*|Keypoint\w*)$"
    r"|CLIP\w*Model$|^(?:Siglip|ViT|DeiT|Beit|Swin|Dinov|ConvNext|ResNet|Sam\d?|Align|Hiera|TimmWrapper)"
)
_HEARS = re.compile(
    r"For(?:CTC|Audio\w*|Speech\w*|TextTo\w+|XVector)$"
    r"|^(?:Wav2Vec2|Hubert|WavLM|Clap|Vits|Bark|Musicgen|UniSpeech|SEW|Data2VecAudio)"
)


def refuse_others(model_id: str, names: Collection[str], directory: Path) -> dict[str, Any]:
    """Return the config.json of a model with safetensors; refuse all else.

    Args:
        names: of all its files, where it comes from.
        directory: where its JSON files are.

    Raises:
        ModelLoadError: it is something else; the message says what.
    """
    if "model_index.json" in names:
        raise ModelLoadError(
            f"{model_id} is a pipeline of diffusers, which makes images: text models are served"
        )
    weights = weight_names(names)
    if _ADAPTER in names and not weights:
        base = read_json(directory / _ADAPTER).get("base_model_name_or_path")
        shown = repr(base)[:200] if isinstance(base, str) and base else "its base model"
        raise ModelLoadError(f"{model_id} is an adapter: serve {shown} with --lora-adapters {model_id}")
    config = read_config_file(directory) if _CONFIG in names else {}
    _refuse_quantised(model_id, names, config)
    if weights and _CONFIG in names:
        _refuse_no_text(model_id, config)
        return config
    if "params.json" in names and any(name.startswith("consolidated") for name in names):
        raise ModelLoadError(
            f"{model_id} is in the format of its makers' own code (params.json, consolidated.*): take its "
            "version for transformers, or one in GGUF"
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
        raise ModelLoadError(f"{model_id} is quantised for ExLlama ({method or 'exl2'}): {_TAKE_ANOTHER}")
    options = config.get("quantization")
    if isinstance(options, dict) and {"group_size", "bits"} <= options.keys():
        raise ModelLoadError(f"{model_id} is quantised for Apple's MLX: {_TAKE_ANOTHER}")


def _refuse_no_text(model_id: str, config: Mapping[str, Any]) -> None:
    """Refuse models that do not go on with a text, nor give vectors of one."""
    listed = config.get("architectures")
    architecture = str(listed[0])[:100] if isinstance(listed, list) and listed else ""
    if config.get("is_encoder_decoder") is True and not architecture.endswith("EncoderModel"):
        what = "listens, and is" if "num_mel_bins" in config else "is"
        raise ModelLoadError(
            f"{model_id} ({architecture}) {what} an encoder-decoder: models with a decoder alone are served, "
            "and encoders that give vectors"
        )
    if _HEARS.search(architecture):
        raise ModelLoadError(f"{model_id} ({architecture}) is a model of sound: models of text are served")
    if _SEES.search(architecture):
        raise ModelLoadError(
            f"{model_id} ({architecture}) looks at images and writes no text: models that write are served"
        )
