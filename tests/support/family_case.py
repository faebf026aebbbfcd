"""A family's test model and its faults, for the tests that compare families with `transformers`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

NUM_BEST = 5  # tokens compared at each position, in addition to the one that follows


@dataclass(frozen=True, slots=True)
class Fault:
    """A change to a checkpoint that simulates a wrong implementation; the tests must detect it."""

    name: str
    config: Mapping[str, Any] = field(default_factory=dict)  # overrides config.json, nested objects too
    tensors: str = ""  # glob pattern for the names of the tensors to change
    change: Literal["to ones", "to zeros", "swap halves"] = "to zeros"


def ignores_weights(norm: str) -> Fault:
    """Return the fault of a model that ignores the weights of these norms."""
    return Fault(f"no-{norm.rpartition('.')[2]}", tensors=f"*{norm}.weight", change="to ones")


def ignores_biases(module: str) -> Fault:
    """Return the fault of a model that ignores the biases of these modules."""
    return Fault(f"no-{module.rpartition('.')[2]}-bias", tensors=f"*{module}.bias")


@dataclass(frozen=True, slots=True)
class FamilyCase:
    """One model: its class and configuration, how it is stored, and faults that must show.

        _case("llama-tied", {"tie_word_embeddings": True}, faults=(_MLP_NORM,), gguf=("f32", "q8_0"))

    If `gguf` lists a type other than "f32", all types in `gguf` represent the matrices exactly, so one
    reference is right for all of them.
    """

    name: str
    architecture: str  # a class of transformers
    config: Mapping[str, Any]  # arguments of its configuration class
    faults: tuple[Fault, ...]
    gguf: tuple[str, ...] = ("f32",)  # types for llama.cpp's converter; empty if it drops needed values
    rounded: tuple[str, ...] = ()  # types that round, as their blocks run along other rows
    dtype: str = "float32"  # of the checkpoint
    json: Mapping[str, Any] = field(default_factory=dict)  # overrides config.json, like a fault's
    drops: tuple[str, ...] = ()  # keys that older versions did not write into config.json
    prompt_length: int = 40
    max_total_tokens: int | None = None  # the setting
    is_fused: bool = False  # stored as by transformers 5, experts in one tensor, not as published
    attention: str = "eager"  # the correct attention implementation of transformers

    @property
    def served_as(self) -> str:
        """The architecture that config.json names."""
        names: list[str] = self.json.get("architectures", [self.architecture])
        return names[0]


# Values that most configuration classes accept by these names and do not default to something small.
BASE: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}


def case_of(
    architectures: Mapping[str, str],
    name: str,
    config: Mapping[str, Any] | None = None,
    *,
    faults: tuple[Fault, ...],
    **more: Any,
) -> FamilyCase:
    """Return a case; its name begins with a key of `architectures`, and `config` overrides `BASE`."""
    architecture = architectures[name.partition("-")[0]]
    return FamilyCase(name, architecture, {**BASE, **(config or {})}, faults, **more)


def overlaid(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return `values` overridden by `changes`, merging objects key by key."""
    result = dict(values)
    for key, value in changes.items():
        old = result.get(key)
        both = isinstance(old, dict) and isinstance(value, dict)
        result[key] = overlaid(old, value) if both else value  # type: ignore[arg-type]
    return result
