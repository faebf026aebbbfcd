"""Reads what most configurations share: sizes, rotary embeddings, windows."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tgi_asgi.errors import check
from tgi_asgi.models.config import (
    MAX_CONTEXT,
    MAX_HEADS,
    MAX_LAYERS,
    LayerSpec,
    RopeScaling,
    RopeSpec,
    check_computed,
)
from tgi_asgi.models.reader import Reader, as_float

logger = logging.getLogger(__name__)

# Keys that the classes of older architectures do not have; they use other names for the same things.
LLAMA_NAMES = ("num_key_value_heads", "head_dim", "intermediate_size", "hidden_act", "layer_norm_eps")
_SCALINGS = ("linear", "dynamic", "llama3", "yarn", "longrope")
_SCALING_NUMBERS = (
    "factor", "low_freq_factor", "high_freq_factor", "short_factor", "long_factor", "beta_fast", "beta_slow",
    "attention_factor", "attn_factor", "mscale", "mscale_all_dim",
)  # fmt: skip
# Names that configurations use for the functions of `ops.ACTIVATIONS`.
_ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "swiglu": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu", "relu2": "relu_squared",
    "xielu": "xielu",
}  # fmt: skip
# llama.cpp's tensors of products that may have biases; the second of q, k and v is all three in one.
_PRODUCTS = {"qkv": ("attn_q", "attn_qkv"), "output": ("attn_output",), "mlp": ("ffn_up",)}
EditRope = Callable[[dict[str, Any]], object]
_DEFAULT_CONTEXT = 2048  # vLLM's, and that of most classes of `transformers`
_KINDS_OF_LAYERS = ("full_attention", "sliding_attention")


def read_sizes(
    reader: Reader, *, eps: str = "rms_norm_eps", activation: str = "silu", default_eps: float = 1e-6
) -> dict[str, Any]:
    """Read the sizes and constants that every decoder has, as arguments of `ModelConfig`.

    Args:
        eps: Key of the norms' epsilon.
        activation: The MLP's function if the file does not state it; GGUF files never do.
    """
    hidden_size = reader.integer("hidden_size")
    num_heads = reader.positive("num_attention_heads", MAX_HEADS)
    head_dim = reader.integer("head_dim", hidden_size // num_heads)
    check(head_dim > 0, f"head_dim must be positive, got {head_dim}")  # families compute its root
    if reader.is_gguf:
        value_dim = reader.integer("attention.value_length", head_dim)
        check(value_dim == head_dim, f"attention.value_length is {value_dim}, but keys have {head_dim}")
        # Keys of files from 2023 and 2024 about how they were made, which llama.cpp no longer reads.
        reader.ignore("use_parallel_residual", "tensor_data_layout")
    elif reader.get("max_position_embeddings") is None:
        reader.replace("max_position_embeddings", _default_context(reader))
    return {
        "vocab_size": reader.integer("vocab_size"),
        "hidden_size": hidden_size,
        "intermediate_size": reader.integer("intermediate_size"),
        "num_heads": num_heads,
        "num_kv_heads": reader.integer("num_key_value_heads", num_heads),
        "head_dim": head_dim,
        "context_length": reader.positive("max_position_embeddings", MAX_CONTEXT),
        "norm_eps": reader.number(eps, default_eps),
        "activation": _read_activation(reader, activation),
        "has_tied_embeddings": _has_tied_embeddings(reader),
    }


def _default_context(reader: Reader) -> int:
    """Return the context of a config.json that names none: that of the type's class in `transformers`."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = reader.get("model_type")
    parsed = CONFIG_MAPPING[kind]() if isinstance(kind, str) and kind in CONFIG_MAPPING else None
    found = getattr(parsed, "max_position_embeddings", None)
    context = found if type(found) is int else _DEFAULT_CONTEXT
    logger.warning(
        "config.json has no `max_position_embeddings`: the context is the %s's, %d tokens",
        "server" if found is None else f"default of {kind!r}", context,
    )  # fmt: skip
    return context


def _read_activation(reader: Reader, default: str) -> str:
    """Return the function that `hidden_act` names; the keys of others may only say the same."""
    names = {key: reader.get(key) for key in ("hidden_act", "hidden_activation", "activation")}
    given = {key: name for key, name in names.items() if name is not None}
    for key, name in given.items():
        known = isinstance(name, str) and name in _ACTIVATIONS
        check_computed(
            known, f"{key} {str(name)[:100]!r} is not supported, only {', '.join(_ACTIVATIONS)} are"
        )
    functions = {key: _ACTIVATIONS[name] for key, name in given.items()}
    own = functions.get("hidden_act", default)
    check_computed(
        set(functions.values()) <= {own}, f"besides {own}, there are several activation functions: {given}"
    )
    return own


def _has_tied_embeddings(reader: Reader) -> bool:
    """Return whether the head is the embedding; a GGUF file then has no separate tensor for it."""
    if reader.is_gguf:
        return "output.weight" not in reader.tensors
    return reader.flag("tie_word_embeddings", False)


def read_kv_heads(reader: Reader, attends: Sequence[bool]) -> None:
    """Read a GGUF file's list of KV heads per layer, which has zeros for layers without attention."""
    given = reader.get("num_key_value_heads")
    if not isinstance(given, list):
        return
    check(len(given) == len(attends), f"there must be KV heads of {len(attends)} layers, got {len(given)}")
    found = {heads for heads, each in zip(given, attends, strict=True) if each} or {1}
    check(len(found) == 1, f"layers of several numbers of KV heads are not supported: {sorted(found)}")
    reader.replace("num_key_value_heads", found.pop())


def read_biases(reader: Reader, **keys: str) -> dict[str, Any]:
    """Return which products of a layer have biases, as arguments of `ModelConfig`.

        read_biases(reader, qkv="attention_bias", output="attention_bias")

    Args:
        keys: Keys of config.json by products: `qkv`, `output`, `mlp`. In a GGUF file, tensors show it.
    """
    return {
        f"has_{product}_bias": read_bias(reader, key, *_PRODUCTS[product]) for product, key in keys.items()
    }


def read_bias(reader: Reader, key: str, *tensors: str, default: bool = False) -> bool:
    """Return whether a product has a bias: by a key of config.json, or llama.cpp's tensors of layer 0."""
    if not reader.is_gguf:
        return reader.flag(key, default)
    return any(f"blk.0.{name}.bias" in reader.tensors for name in tensors)


def leave_out_drafting(reader: Reader) -> None:
    """Reduce a GGUF file's number of layers by those at the end that draft (multi-token prediction)."""
    drafting = reader.integer("num_nextn_predict_layers", 0)
    reader.replace("num_hidden_layers", reader.integer("num_hidden_layers") - drafting)


def read_layers(
    reader: Reader,
    sizes: Mapping[str, Any],
    *,
    windows: Sequence[int | None] | None = None,
    has_rope: Sequence[bool] | None = None,
    ropes: Sequence[RopeSpec] | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    has_partial_rotary: bool = False,
    edit_rope: EditRope | None = None,
) -> tuple[LayerSpec, ...]:
    """Make the layers' specifications, with one rotary embedding unless `ropes` are given.

    Args:
        has_partial_rotary, edit_rope: As for `read_rope`.
    """
    count = num_layers(reader)
    if ropes is None:
        rope = read_rope(reader, sizes["head_dim"], has_partial_rotary=has_partial_rotary, edit=edit_rope)
        ropes = [rope] * count
    scale = sizes["head_dim"] ** -0.5 if scale is None else scale
    return tuple(
        LayerSpec(
            ropes[index] if has_rope is None or has_rope[index] else None,
            None if windows is None else windows[index],
            scale,
            soft_cap=soft_cap,
        )
        for index in range(count)
    )


def check_layer_types(
    kinds: object, count: int, known: Sequence[str] = _KINDS_OF_LAYERS, *, key: str = "layer_types"
) -> list[str]:
    """Return the layer types that a config.json lists.

    Raises:
        NotInFamily: if it is not a list with one of `known` per layer.
    """
    check_computed(
        isinstance(kinds, list) and len(kinds) == count and all(kind in known for kind in kinds),
        f"{key} must be {count} of {', '.join(known)}, got {str(kinds)[:100]}",
    )
    assert isinstance(kinds, list)
    return kinds


def num_layers(reader: Reader) -> int:
    """Return the number of layers, checked because lists of this length are created."""
    count = reader.integer("num_hidden_layers")
    check(1 <= count <= MAX_LAYERS, f"num_hidden_layers must be in 1..{MAX_LAYERS}, got {count}")
    return count


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
    nested = {kind: values.pop(kind, None) for kind in _KINDS_OF_LAYERS}
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
        kind == "sliding_attention": _make_rope(reader, given[kind], head_dim) for kind in _KINDS_OF_LAYERS
    }


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


def read_window(reader: Reader) -> list[int | None]:
    """Read a window that all layers have, or none; a config.json's other window keys have no effect."""
    reader.ignore("use_sliding_window", "layer_types", "max_window_layers")
    return [reader.integer("sliding_window", 0) or None] * num_layers(reader)


def read_windows(reader: Reader, where: Sequence[bool]) -> list[int | None]:
    """Read each layer's window: none unless switched on, then by `layer_types`, else by `where`."""
    window = reader.integer("sliding_window", 0) or None
    types = reader.get("layer_types")
    if types is not None:
        check_layer_types(types, len(where))
    if not reader.flag("use_sliding_window", False):
        return [None] * len(where)
    has_window = where if types is None else [kind == "sliding_attention" for kind in types]
    return [window if has else None for has in has_window]


def read_sliding(reader: Reader, period: int) -> list[bool]:
    """Return which layers have a window: those listed, else all except each `period`-th."""
    count = num_layers(reader)
    types, pattern = reader.get("layer_types"), reader.get("sliding_window_pattern")
    reader.ignore("_sliding_window_pattern")
    if types is not None:
        return [kind == "sliding_attention" for kind in check_layer_types(types, count)]
    if isinstance(pattern, (list, tuple)):
        check(len(pattern) == count, f"the pattern of windows must have {count} entries, got {len(pattern)}")
        return [bool(each) for each in pattern]
    period = period if pattern is None else pattern
    check(type(period) is int and period >= 1, f"sliding_window_pattern must be positive, got {period!r}")
    return [(index + 1) % period != 0 for index in range(count)]
