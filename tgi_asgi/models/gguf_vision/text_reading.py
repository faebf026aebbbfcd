"""What text models of GGUF files that accept images share: sizes, scalings of rotary positions, names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from tgi_asgi.errors import ModelLoadError, check
from tgi_asgi.formats.gguf import GgufFile
from tgi_asgi.models.config_bounds import MAX_HEADS
from tgi_asgi.models.gguf_module import (
    MAX_SIZE,
    common_names,
    read_common,
    read_yarn,
    scaling_type,
    vocab_size_of,
)
from tgi_asgi.models.reader import Reader
from tgi_asgi.ops.arrays import Floats

Orders = Mapping[str, npt.NDArray[np.int64]]


@dataclass(frozen=True, slots=True)
class Text:
    """One architecture.

    Attributes:
        read: Returns the decoder's configuration without its type.
        names: llama.cpp's names of a layer's tensors, by those of `transformers`.
        outer: Those of tensors outside layers, except the head.
        is_paired: Whether llama.cpp stores rotary pairs of queries and keys adjacent.
        restored, joined: As for `GgufModule`.
        orders: Returns `row_orders` and `column_orders` of `GgufModule` for a configuration.
    """

    read: Callable[[Reader, GgufFile], dict[str, Any]]
    names: Mapping[str, str]
    outer: Mapping[str, str] = field(
        default_factory=lambda: {"embed_tokens": "token_embd", "norm": "output_norm"}
    )
    is_paired: bool = False
    restored: Mapping[str, Callable[[Floats], Floats]] = field(default_factory=dict)
    joined: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    orders: Callable[[Mapping[str, Any]], tuple[Orders, Orders]] = lambda config: ({}, {})


def read_plain(
    reader: Reader, file: GgufFile, *, has_experts: bool = False, is_partly_rotary: bool = False
) -> dict[str, Any]:
    """Return what every decoder has.

    Args:
        is_partly_rotary: Whether a part of each head may be turned; the caller reads its size.
    """
    reader.replace("vocab_size", vocab_size_of(file))  # files may list more tokens, or fewer
    config = read_common(reader)
    num_heads = config["num_attention_heads"]
    head_dim = reader.integer("head_dim", config["hidden_size"] // num_heads)
    check(0 < head_dim <= MAX_SIZE, f"attention.key_length must be positive, got {head_dim}")
    reader.require(**{"attention.value_length": head_dim})
    if not is_partly_rotary:
        reader.require(**{"rope.dimension_count": head_dim})
    if not has_experts:
        reader.require(expert_count=0, expert_used_count=0)
    num_kv_heads = reader.integer("num_key_value_heads", num_heads)
    check(0 < num_kv_heads <= MAX_HEADS, f"attention.head_count_kv must be positive, got {num_kv_heads}")
    check(
        "rope_freqs.weight" not in reader.tensors,
        "its rotary embedding has a factor for each frequency (rope_freqs.weight)",
    )
    reader.ignore("use_parallel_residual", "tensor_data_layout")  # as for native families
    return {
        **config,
        "intermediate_size": reader.positive("intermediate_size", MAX_SIZE),
        "num_key_value_heads": num_kv_heads,
        "head_dim": head_dim,
        "pad_token_id": 0,  # takes the place of an image's tokens, whose rows are replaced
    }


def read_rope(reader: Reader) -> dict[str, Any]:
    """Return the `rope_parameters`, with the scalings that such files have."""
    theta = reader.number("rope_theta", 10000.0)
    kind, factor = scaling_type(reader), reader.number("rope.scaling.factor", 1.0)
    if kind == "none" or (kind == "linear" and factor in (0, 1)):
        return {"rope_type": "default", "rope_theta": theta}
    if kind == "linear":
        return {"rope_type": "linear", "rope_theta": theta, "factor": factor}
    if kind != "yarn":
        raise ModelLoadError(f"rope scaling of type {str(kind)[:100]!r} is not supported beside images")
    return {
        **read_yarn(reader),
        "rope_theta": theta,
        "mscale": 1.0,
        "mscale_all_dim": reader.number("rope.scaling.yarn_log_multiplier", 0.0),
    }


def read_sections(reader: Reader, half: int) -> list[int]:
    """Return how many of the rotary pairs, of which there are `half`, belong to each of three axes."""
    given = reader.get("rope.dimension_sections")
    sections = list(given) if isinstance(given, list) else []
    check(
        len(sections) in (3, 4)
        and all(type(each) is int and each >= 0 for each in sections)
        and sum(sections) == sum(sections[:3]) == half,
        f"rope.dimension_sections must be three parts of {half}, got {str(given)[:100]}",
    )
    return sections[:3]


def less_one(stored: Floats) -> Floats:
    """Return a norm's weights, to which llama.cpp's converter adds 1."""
    found: Floats = stored - stored.dtype.type(1)
    return found


NAMES = common_names(
    "input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip
WITH_NORMS = {**NAMES, **common_names("self_attn.q_norm", "self_attn.k_norm")}
