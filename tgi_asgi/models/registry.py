"""The native families that can be served: all modules in `models/families`, discovered automatically."""

from __future__ import annotations

import functools
import importlib
import pkgutil

from tgi_asgi.errors import ModelLoadError
from tgi_asgi.models import families
from tgi_asgi.models.family import Family
from tgi_asgi.models.gguf_module import all_modules

_NO_CODE = "neither this server nor transformers has its code"
# Why files of architectures that llama.cpp's converter writes are refused.
_REFUSED = {
    **dict.fromkeys(("jina-bert-v2", "nomic-bert-moe", "neo-bert", "bailingmoe", "bailingmoe2"), _NO_CODE),
    **dict.fromkeys(("plamo", "plamo2", "plamo3", "rwkv6", "rwkv7", "arwkv7", "rwkv6qwen2"), _NO_CODE),
    **dict.fromkeys(("t5", "t5encoder"), "encoder-decoders are served from a checkpoint directory"),
    "xverse": "they have no `tokenizer.ggml.scores`, and so do not say how text becomes tokens",
}


@functools.cache
def all_families() -> tuple[Family, ...]:
    """Import every module of `models/families`, and return their families."""
    modules = sorted(module.name for module in pkgutil.iter_modules(families.__path__))
    imported = (importlib.import_module(f"{families.__name__}.{name}") for name in modules)
    return tuple(family for module in imported for family in module.FAMILIES)


def has_family(name: str) -> bool:
    """Return whether a config.json's architecture has a family."""
    return _find(name) is not None


def find_by_architecture(name: str) -> Family:
    """Return the family of a config.json's architecture, including variants without a head or with labels.

    Raises:
        ModelLoadError: if there is none; the message lists those that exist.
    """
    found = _find(name)
    if found is not None:
        return found
    known = ", ".join(family.architecture for family in all_families() if not family.is_gguf_only)
    raise ModelLoadError(f"models of architecture {name!r} are not supported; supported are {known}")


def _find(name: str) -> Family | None:
    stem = name.removesuffix("Model").removesuffix("ForSequenceClassification")
    names = (name, f"{stem}ForCausalLM")
    of_checkpoints = (family for family in all_families() if not family.is_gguf_only)
    return next((family for family in of_checkpoints if family.architecture in names), None)


def find_by_gguf_name(name: str) -> Family:
    """Return the family of a GGUF file's `general.architecture`; the first with the name represents all.

    Raises:
        ModelLoadError: if there is none; the message lists those that exist.
    """
    for family in all_families():
        if name == family.gguf_name or name in family.other_gguf_names:
            return family
    native = {name for each in all_families() for name in (each.gguf_name, *each.other_gguf_names) if name}
    known = ", ".join(sorted(native | {each.gguf_name for each in all_modules()}))
    reason = f" ({_REFUSED[name]})" if name in _REFUSED else ""
    raise ModelLoadError(
        f"GGUF files of architecture {name!r} are not supported{reason}; supported are {known}"
    )
