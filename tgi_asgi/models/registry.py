"""The model families that can be served, and what each differs in that its files do not say.

A family is a row here. Those of the first generation compute what `llama.py` does; one that computes
something else brings a short file of its own beside it.
"""

from __future__ import annotations

from dataclasses import dataclass

from tgi_asgi.errors import ModelLoadError


@dataclass(frozen=True, slots=True)
class Family:
    """What a family fixes by its code in `transformers` and in llama.cpp."""

    architecture: str  # `architectures[0]` of config.json
    gguf_name: str  # `general.architecture` of a GGUF file
    has_qkv_bias: bool | None = None  # None: `attention_bias` says, and then the output product has one too
    has_qk_norm: bool = False  # each head's queries and keys are normalised before they are rotated
    has_plain_window: bool = True  # `sliding_window` is of all layers, and needs no `use_sliding_window`
    is_rotary_permuted: bool = False  # llama.cpp stores rotary pairs side by side, not half a head apart


_FAMILIES = (
    Family("LlamaForCausalLM", "llama", is_rotary_permuted=True),
    Family("MistralForCausalLM", "llama", has_qkv_bias=False, is_rotary_permuted=True),
    Family("Qwen2ForCausalLM", "qwen2", has_qkv_bias=True, has_plain_window=False),
    Family("Qwen3ForCausalLM", "qwen3", has_qk_norm=True, has_plain_window=False),
)


def find_by_architecture(name: str) -> Family:
    """Look up the family of a config.json's architecture."""
    for family in _FAMILIES:
        if family.architecture == name:
            return family
    known = ", ".join(family.architecture for family in _FAMILIES)
    raise ModelLoadError(f"models of architecture {name!r} are not supported; supported are {known}")


def find_by_gguf_name(name: str) -> Family:
    """Look up the family of a GGUF file's `general.architecture`; the first of its name speaks for all."""
    for family in _FAMILIES:
        if family.gguf_name == name:
            return family
    known = ", ".join(sorted({family.gguf_name for family in _FAMILIES}))
    raise ModelLoadError(f"GGUF files of architecture {name!r} are not supported; supported are {known}")
