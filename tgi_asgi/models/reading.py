"""Reads what most configurations share: sizes, biases, layers, windows."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tgi_asgi.errors import check
from tgi_asgi.models.config_bounds import MAX_CONTEXT, MAX_HEADS, MAX_LAYERS, check_computed
from tgi_asgi.models.layer_spec import LayerSpec, RopeSpec
from tgi_asgi.models.reader import Reader
from tgi_asgi.models.reading_rope import KINDS_OF_LAYERS, EditRope, read_rope

logger = logging.getLogger(__name__)

# Keys that the classes of older architectures do not have; they use other names for the same things.
LLAMA_NAMES = ("num_key_value_heads", "head_dim", "intermediate_size", "hidden_act", "layer_norm_eps")
# Names that configurations use for the functions of `ops.ACTIVATIONS`.
_ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "swiglu": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu", "relu2": "relu_squared",
    "xielu": "xielu",
}  # fmt: skip
# llama.cpp's tensors of products that may have biases; the second of q, k and v is all three in one.
_PRODUCTS = {"qkv": ("attn_q", "attn_qkv"), "output": ("attn_output",), "mlp": ("ffn_up",)}
_DEFAULT_CONTEXT = 2048  # vLLM's, and that of most classes of `transformers`


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


@contextlib.contextmanager
def text_of(reader: Reader) -> Iterator[Reader]:
    """Yield a reader of the text's configuration, which may be nested; refuse what remains unread in it."""
    part = reader.get("text_config")
    if part is None:
        yield reader
        return
    check(isinstance(part, dict), f"text_config must be an object, got {str(part)[:100]}")
    tied = reader.get("tie_word_embeddings")
    text = Reader.of_json(part if tied is None else {**part, "tie_word_embeddings": tied})
    yield text
    text.finish()


def rms_eps_key(reader: Reader) -> str:
    """Return the key of an RMSNorm's epsilon, which GGUF files may call a LayerNorm's.

    llama.cpp's converter does if config.json says `layer_norm_epsilon`.
    """
    is_other = reader.is_gguf and reader.get("rms_norm_eps") is None
    return "layer_norm_eps" if is_other else "rms_norm_eps"


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
    kinds: object, count: int, known: Sequence[str] = KINDS_OF_LAYERS, *, key: str = "layer_types"
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
