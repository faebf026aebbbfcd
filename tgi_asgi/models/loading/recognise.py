"""Finds the family of a `config.json` or of a GGUF file's metadata, and reads its configuration."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tgi_asgi.errors import check
from tgi_asgi.formats.gguf import GgufFile
from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.family import Family
from tgi_asgi.models.gguf_module import GgufModule
from tgi_asgi.models.reader import Reader
from tgi_asgi.models.registry import find_by_architecture, find_by_gguf_name, has_family

logger = logging.getLogger(__name__)

_CAUSAL = "ForCausalLM"
CLASSIFIER = "ForSequenceClassification"
TOKEN_HEADS = ("ForMaskedLM", "ForPreTraining")  # of encoders, which are served without them
# Types for which transformers uses a family's class, but with other defaults, and names in published files.
_BORROWING = frozenset({"exaone", "sarvam_mla", "sarvam_moe"})

# By model type, the class of the part that generates text; the other parts turn it into speech.
_THINKERS = {
    "qwen2_5_omni": "Qwen2_5OmniThinkerForConditionalGeneration",
    "qwen3_omni_moe": "Qwen3OmniMoeThinkerForConditionalGeneration",
}


def with_architecture(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config.json whose architecture is the class of `transformers` that serves its `model_type`.

    The name in the file is replaced by that class if

    - there is none, as in older files;
    - it is spelled after the type: ExaoneMoEForCausalLM (K-EXAONE) is ExaoneMoeForCausalLM in `transformers`,
      and the class that IQuest names is Llama's;
    - it is the class of another type, as after a merge of Llama and Mistral: `transformers` follows the type;
    - it is an encoder-decoder's class without a head;
    - the type is that of a model that also speaks: the class is that of the part that generates text;
    - the file is a Mistral's with `layer_types`, which `AutoConfig` takes for Ministral.

    Any other name stays, because its model may compute something else.
    """
    kind, names = config.get("model_type"), config.get("architectures")
    if isinstance(kind, str) and kind in _THINKERS:
        return {**config, "architectures": [_THINKERS[kind]]}
    if config.get("is_encoder_decoder") is True:
        return _with_head(config)
    if (kind, names) == ("chatglm", ["ChatGLMModel"]):  # the class without a head, but the files have one
        return {**config, "architectures": ["ChatGLMForConditionalGeneration"]}
    if kind == "mistral" and "layer_types" in config and names in (None, [], ["MistralForCausalLM"]):
        return {**config, "model_type": "ministral", "architectures": ["MinistralForCausalLM"]}
    return _with_class_of_type(config, kind)


def _with_class_of_type(config: dict[str, Any], kind: Any) -> dict[str, Any]:
    """Return the config.json of a decoder, naming the class of its type if the one that it names is none."""
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    if not isinstance(kind, str) or (names and not (isinstance(name, str) and name.endswith(_CAUSAL))):
        return config
    is_named_after = name is not None and _is_named_after(name, kind)
    if name is not None and is_named_after and has_family(name):
        return config
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as BY_TYPE

    found = BY_TYPE.get(kind)
    if not isinstance(found, str) or found == name:
        return config
    if name is not None and not is_named_after:
        if not (found.endswith(_CAUSAL) and name in BY_TYPE.values()):
            return config
        logger.warning("config.json names %s, but %s is what its model_type %s is", name, found, kind)
    return {**config, "architectures": [found]}


def as_in_transformers(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config.json that names a class of `transformers`, which EXAONE 3's own does not do."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as BY_TYPE

    name, kind = architecture_of(config), str(config.get("model_type"))
    found = BY_TYPE.get(kind)
    is_other = isinstance(found, str) and name not in BY_TYPE.values() and _is_named_after(name, kind)
    return {**config, "architectures": [found]} if is_other else config


def _with_head(config: dict[str, Any]) -> dict[str, Any]:
    """Return the config.json of an encoder-decoder, naming the class of its type that writes text."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES as BY_TYPE

    names, found = config.get("architectures"), BY_TYPE.get(str(config.get("model_type")))
    name = names[0] if isinstance(names, list) and names else "Model"
    is_bare = isinstance(name, str) and name.endswith(("Model", "WithLMHeadModel", "DoubleHeadsModel"))
    if found is None or not is_bare or name.endswith("EncoderModel"):
        return config
    return {**config, "architectures": [found]}


def _is_named_after(name: str, kind: str) -> bool:
    plain = kind.removesuffix("_text").replace("_", "").casefold()
    return name.replace("_", "").casefold() == f"{plain}{_CAUSAL.casefold()}"


def architecture_of(config: Mapping[str, Any]) -> str:
    """Return the first architecture that a config.json names.

    Raises:
        ModelLoadError: if it names none.
    """
    names = config.get("architectures")
    is_named = isinstance(names, list) and bool(names) and isinstance(names[0], str)
    check(is_named, "config.json names no architecture")
    return str(config["architectures"][0])


def is_native(config: Mapping[str, Any]) -> bool:
    """Return whether a native family has the architecture of a config.json.

    Embedding models with bidirectional attention are left to the code of `transformers`, and so are models
    that accept images, whose text alone a family may compute.

    Raises:
        ModelLoadError: if it names no architecture.
    """
    architecture = architecture_of(config)
    kind = config.get("model_type")
    is_borrowed = kind in _BORROWING and not _is_named_after(architecture, str(kind))
    if is_borrowed or config.get("vision_config"):
        return False
    return has_family(architecture) and not (_sees_ahead(config) and produces_vectors(architecture))


def _sees_ahead(config: Mapping[str, Any]) -> bool:
    # "vision": only tokens of images see each other.
    looks_ahead = config.get("use_bidirectional_attention") not in (None, False, "vision")
    return config.get("is_causal") is False or looks_ahead


def read_config(config: Mapping[str, Any]) -> tuple[Family, ModelConfig]:
    """Read a `config.json` and find its family.

    Raises:
        ModelLoadError: if it names no known architecture or asks for something that cannot be computed.
    """
    name = architecture_of(config)
    check(
        not _sees_ahead(config),
        "config.json asks for bidirectional attention, which this architecture's native code lacks",
    )
    family, found = _read(find_by_architecture(name), Reader.of_json(config))
    labels = _num_labels(config) if name.endswith(CLASSIFIER) else 0
    return family, replace(found, architecture=name, num_labels=labels)


def _num_labels(config: Mapping[str, Any]) -> int:
    """Return the number of a classifier's labels, as transformers determines it."""
    names = config.get("id2label")
    count = config.get("num_labels") or (len(names) if isinstance(names, dict) else 2)
    check(
        type(count) is int and count > 0, f"`num_labels` must be a positive integer, got {str(count)[:100]}"
    )
    return int(count)


def read_gguf(metadata: Mapping[str, Any], tensors: frozenset[str]) -> tuple[Family, ModelConfig]:
    """Read a GGUF file's metadata and find its family; tensor names show biases and an untied head."""
    name = metadata.get("general.architecture")
    check(isinstance(name, str), "the GGUF file names no general.architecture")
    _check_is_model(metadata)
    return _read(find_by_gguf_name(str(name)), Reader.of_gguf(metadata, tensors))


def read_gguf_module(module: GgufModule, file: GgufFile) -> dict[str, Any]:
    """Return the config.json of a GGUF file that the code of `transformers` computes."""
    _check_is_model(file.metadata)
    reader = Reader.of_gguf(file.metadata, frozenset(file.tensors))
    config = module.read_config(reader, file)
    reader.finish()
    return config


def _check_is_model(metadata: Mapping[str, Any]) -> None:
    kind = metadata.get("general.type", "model")
    check(kind == "model", f"the GGUF file is of the kind {str(kind)[:100]!r}, not a model")


def _read(family: Family, reader: Reader) -> tuple[Family, ModelConfig]:
    config = family.read_config(reader, family.architecture)
    reader.finish()
    return family, config


def produces_vectors(architecture: str) -> bool:
    """Return whether an architecture is a model without a head that generates text."""
    is_head = architecture.endswith(("LMHeadModel", "HeadsModel", "MTModel", "EncoderDecoderModel"))
    return architecture.endswith(("Model", CLASSIFIER, *TOKEN_HEADS)) and not is_head
