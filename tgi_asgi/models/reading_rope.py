"""Reads rotary embeddings and their scaling, from a config.json or a GGUF file."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from tgi_asgi.errors import check
from tgi_asgi.models.config_bounds import MAX_CONTEXT, check_computed
from tgi_asgi.models.layer_spec import RopeScaling, RopeSpec
from tgi_asgi.models.reader import Reader, as_float

EditRope = Callable[[dict[str, Any]], object]
KINDS_OF_LAYERS = ("full_attention", "sliding_attention")
_SCALINGS = ("linear", "dynamic", "llama3", "yarn", "longrope")
_SCALING_NUMBERS = (
    "factor", "low_freq_factor", "high_freq_factor", "short_factor", "long_factor", "beta_fast", "beta_slow",
    "attention_factor", "attn_factor", "mscale", "mscale_all_dim",
)  # fmt: skip


def read_rope(
    reader: Reader, head_dim: int, *, has_partial_rotary: bool = False, edit: EditRope | None = None
) -> RopeSpec:
    """Read the rotary embedding: `rope_parameters` of transformers 5, or the several keys of 4.

    Args:
        has_partial_rotary: Whether the architecture supports `partial_rotary_factor`.
        edit: Turns settings that only this family has into usual ones, by the names of `rope_parameters`.
    """
    if reader.is_gguf:
        dim = reader.integer("rope.dimension_count", head_dim)
        return RopeSpec(dim, reader.number("rope_theta", 10000.0), _scaling_of_gguf(reader))
    values = rope_values(reader)
    if edit is not None:
        edit(values)
    check_computed(
        not any(isinstance(value, dict) for value in values.values()),
        "`rope_parameters` differ by kind of layer, which this server does not know for this architecture",
    )
    return _make_rope(reader, values, head_dim, has_partial_rotary=has_partial_rotary)


def read_ropes(reader: Reader, head_dim: int, theta: float, local_theta: float) -> dict[bool, RopeSpec]:
    """Read the rotary embeddings of layers with a window (True) and without (False).

    transformers 5 has an object for each kind. Before, `rope_scaling` applied only to layers without a
    window, and llama.cpp's files work that way.

    Args:
        theta: Default base of layers without a window.
        local_theta: Default base of layers with a window.
    """
    if reader.is_gguf:
        rope = read_rope(reader, head_dim)
        base = rope.theta if local_theta == theta else local_theta
        local = RopeSpec(rope.dim, reader.number("rope.freq_base_swa", base))
        return {False: rope, True: local}
    values = _rope_object(reader, "rope_parameters")
    nested = {kind: values.pop(kind, None) for kind in KINDS_OF_LAYERS}
    check_computed(
        not values, f"`rope_parameters` must be those of each kind of layer, got {', '.join(values)[:100]}"
    )
    base = reader.number("rope_theta", theta)
    local_base = reader.number("rope_local_base_freq", base if local_theta == theta else local_theta)
    given = {
        "full_attention": {"rope_theta": base},
        "sliding_attention": {"rope_theta": local_base},
    }
    for kind, own in nested.items():
        check(own is None or isinstance(own, dict), f"`rope_parameters` of {kind} must be an object")
        given[kind] |= {name: value for name, value in (own or {}).items() if value is not None}
    given["full_attention"] |= _rope_object(reader, "rope_scaling")
    return {
        kind == "sliding_attention": _make_rope(reader, given[kind], head_dim) for kind in KINDS_OF_LAYERS
    }


def read_ropes_of_kinds(
    reader: Reader, head_dims: Mapping[str, int], defaults: Mapping[str, Mapping[str, Any]]
) -> dict[str, RopeSpec]:
    """Read the rotary embeddings of kinds of layers, each default or proportional.

    Args:
        head_dims: The sizes of their heads, by kind.
        defaults: What a config.json without `rope_parameters` means.
    """
    given = reader.get("rope_parameters") or defaults
    check(isinstance(given, Mapping), f"rope_parameters must be an object, got {str(given)[:100]}")
    unknown = set(given) - set(defaults)
    check_computed(
        not unknown, f"rope_parameters must be those of each kind of layer, got {str(unknown)[:100]}"
    )
    found = {}
    for kind, head_dim in head_dims.items():
        check(isinstance(given.get(kind), Mapping), f"rope_parameters of {kind} must be an object")
        rope = Reader.of_json(given[kind])
        rope_type, theta = rope.get("rope_type") or "default", rope.number("rope_theta", 1e4)
        check_computed(
            rope_type in ("default", "proportional"),
            f"rope_type {str(rope_type)[:100]!r} of {kind} is unknown",
        )
        rope.require(factor=1.0)
        share = rope.number("partial_rotary_factor", 1.0)
        check(0 < share <= 1, f"partial_rotary_factor must be in (0, 1], got {share}")
        rope.finish()
        dim = head_dim
        if rope_type == "proportional":
            dim = 2 * int(share * head_dim // 2)
            check_computed(dim > 0, f"partial_rotary_factor of {share} rotates no pair of {head_dim} dims")
        else:
            check_computed(share == 1, f"partial_rotary_factor is {share}, but {kind} rotates whole heads")
        found[kind] = RopeSpec(dim, theta, whole_dim=None if dim == head_dim else head_dim)
    return found


def rope_values(reader: Reader) -> dict[str, Any]:
    """Return a config.json's settings of rotary embeddings, by the names of `rope_parameters`.

    As in transformers 5, a `rope_scaling` replaces `rope_parameters`, and only a key beside them states the
    base; the original context beside them comes before one within.
    """
    values: dict[str, Any] = {name: reader.get(name) for name in ("rope_theta", "partial_rotary_factor")}
    scaling, parameters = (_rope_object(reader, key) for key in ("rope_scaling", "rope_parameters"))
    values |= scaling or parameters
    original = reader.get("original_max_position_embeddings")
    return values if original is None else {**values, "original_max_position_embeddings": original}


def default_rope(reader: Reader, values: Mapping[str, Any]) -> None:
    """Set the `rope_parameters` of a config.json that has none, nor a `rope_scaling`."""
    if not (reader.is_gguf or reader.get("rope_scaling") or reader.get("rope_parameters")):
        reader.replace("rope_parameters", values)


def _rope_object(reader: Reader, key: str) -> dict[str, Any]:
    """Return an object's values; empty if there is none."""
    nested = reader.get(key)
    check(nested is None or isinstance(nested, dict), f"`{key}` must be an object, got {str(nested)[:100]}")
    return {name: value for name, value in (nested or {}).items() if value is not None}


def _make_rope(
    reader: Reader, values: Mapping[str, Any], head_dim: int, *, has_partial_rotary: bool = False
) -> RopeSpec:
    """Make a rotary embedding from the result of `rope_values`."""
    rope = Reader.of_json(values)
    factor = rope.number("partial_rotary_factor", 1.0)
    check(0 < factor <= 1, f"partial_rotary_factor must be in (0, 1], got {factor}")
    check_computed(
        has_partial_rotary or factor == 1,
        f"partial_rotary_factor is {factor}, but this architecture rotates whole heads",
    )
    theta = rope.number("rope_theta", 10000.0)
    context = reader.positive("max_position_embeddings", MAX_CONTEXT)
    scaling = _scaling_of_json(rope, context)
    rope.finish()
    return RopeSpec(int(head_dim * factor), theta, scaling)


def _scaling_of_json(rope: Reader, context: int) -> RopeScaling | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    rope.ignore("rope_type", "type")
    original = rope.integer("original_max_position_embeddings", 0) or None
    if kind == "default":
        rope.ignore(*_SCALING_NUMBERS)  # leftovers without effect
        return None
    kind = "longrope" if kind == "su" else kind  # Phi-3's first name for it
    check_computed(
        kind in _SCALINGS,
        f"rope scaling of type {kind!r} is not supported; supported are {', '.join(_SCALINGS)}",
    )
    if kind == "linear":
        return RopeScaling("linear", rope.number("factor"))
    if kind == "dynamic":
        return RopeScaling("dynamic", rope.number("factor"), context)
    if kind == "llama3":
        return RopeScaling(
            "llama3", rope.number("factor"), original or rope.integer("original_max_position_embeddings"),
            rope.number("low_freq_factor"), rope.number("high_freq_factor"),
        )  # fmt: skip
    original = original or context
    factor = rope.number("factor", context / original)
    if kind == "yarn":
        return _yarn(rope, factor, original)
    default = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 and original > 1 else 1.0
    return RopeScaling(
        "longrope", max(factor, 1.0), original, attention_factor=rope.number("attention_factor", default),
        short_factors=_factors(rope, "short_factor"), long_factors=_factors(rope, "long_factor"),
    )  # fmt: skip


def _yarn(rope: Reader, factor: float, original: int) -> RopeScaling:
    """Read YaRN's numbers, with the defaults of `transformers`.

    transformers ignores `attn_factor`, which DeepSeek's Qwen3 8B has; vLLM, SGLang and TGI multiply by it, as
    done here. So did that file's authors: the two factors multiply to 1.
    """
    mscale, mscale_all = rope.number("mscale", 0.0), rope.number("mscale_all_dim", 0.0)
    check(min(mscale, mscale_all) >= 0, "mscale and mscale_all_dim must not be negative")
    magnitude = yarn_magnitude(factor)
    if mscale and mscale_all:
        magnitude = yarn_magnitude(factor, mscale) / yarn_magnitude(factor, mscale_all)
    return RopeScaling(
        "yarn", factor, original, beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0), is_truncated=rope.flag("truncate", True),
        attention_factor=rope.number("attention_factor", magnitude * rope.number("attn_factor", 1.0)),
    )  # fmt: skip


def yarn_magnitude(factor: float, scale: float = 1.0) -> float:
    """Return YaRN's factor on cosines and sines (Peng et al., arXiv 2309.00071, section 3.4)."""
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _factors(rope: Reader, key: str) -> tuple[float, ...]:
    values = rope.get(key)
    check(
        isinstance(values, list) and all(type(value) in (int, float) for value in values),
        f"`{key}` must be a list of numbers",
    )
    return tuple(map(as_float, values))


def _scaling_of_gguf(reader: Reader) -> RopeScaling | None:
    """Read a file's scaling; llama3's is stored as a tensor of divisors instead (`rope_freqs.weight`).

    As in llama.cpp, a factor without a type is linear; files of 2023 have it under another name.
    """
    prefix = "rope.scaling."
    reader.ignore(f"{prefix}finetuned")
    kind = reader.get(f"{prefix}type")
    given = reader.get(f"{prefix}factor") or reader.get("rope.scale_linear")
    original = reader.integer(f"{prefix}original_context_length", 0) or None
    attention = reader.number(f"{prefix}attn_factor", 1.0)
    is_long = "rope_factors_long.weight" in reader.tensors
    if is_long:  # llama.cpp decides by the tensors; the type may be missing
        context = reader.positive("max_position_embeddings", MAX_CONTEXT)
        return RopeScaling(
            "longrope", max(context / (original or context), 1.0), original or context,
            attention_factor=attention,
        )  # fmt: skip
    if kind == "none" or (kind is None and given in (None, 0, 1)):
        return None if attention == 1 else RopeScaling("linear", attention_factor=attention)
    check(
        kind in (None, "linear", "yarn"),
        f"rope scaling of type {kind!r} is not supported in GGUF files, only linear, yarn and longrope are",
    )
    reader.ignore(f"{prefix}factor")
    factor = reader.number(f"{prefix}factor") if given is None else reader.number(f"{prefix}factor", given)
    if kind != "yarn":
        return RopeScaling("linear", factor, attention_factor=attention)
    # Of all models llama.cpp reads these for Grok alone; converters write the second from two different keys.
    reader.ignore(f"{prefix}yarn_ext_factor", f"{prefix}yarn_attn_factor")
    # llama.cpp's form of config.json's mscale_all_dim with an mscale of 1.
    undone = reader.number(f"{prefix}yarn_log_multiplier", 0.0)
    check(undone >= 0, f"{prefix}yarn_log_multiplier must not be negative, got {undone}")
    return RopeScaling(
        "yarn", factor, original or reader.positive("max_position_embeddings", MAX_CONTEXT),
        beta_fast=reader.number(f"{prefix}yarn_beta_fast", 32.0),
        beta_slow=reader.number(f"{prefix}yarn_beta_slow", 1.0),
        attention_factor=attention * yarn_magnitude(factor) / yarn_magnitude(factor, undone),
    )  # fmt: skip
