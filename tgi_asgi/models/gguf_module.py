"""Describes GGUF files that the code of `transformers` computes: configuration and names, from llama.cpp's.

Native families read their GGUF files themselves (`family.py`). Here are architectures that no family has.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from tgi_asgi.errors import check
from tgi_asgi.formats.gguf import GgufFile
from tgi_asgi.models import gguf_modules
from tgi_asgi.models.config_bounds import MAX_CONTEXT, MAX_HEADS, MAX_LAYERS
from tgi_asgi.models.family import GGUF_NAMES
from tgi_asgi.models.reader import Reader
from tgi_asgi.models.reading_latent import read_latent
from tgi_asgi.ops.arrays import Floats

MAX_SIZE = 1 << 24  # of a dimension, which bounds a damaged file: a vocabulary has fewer
_LAYER = re.compile(r"blk\.(\d+)\.(.+)")
_KINDS = ("weight", "bias")


@dataclass(frozen=True, slots=True)
class Merged:
    """How a checkpoint's tensor is made of two of the file's.

    Attributes:
        stored: Their names by llama.cpp, without layer.
        make: Computes the tensor from their values.
        shape: Returns its shape for theirs.
    """

    stored: tuple[str, str]
    make: Callable[[Floats, Floats], Floats]
    shape: Callable[[tuple[int, ...], tuple[int, ...]], tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class GgufModule:
    """One architecture.

        MODULES = (GgufModule("gemma4", read_config, common_names("self_attn.q_proj", ...) | {...}),)

    A module of `models/gguf_modules` with such a tuple is all that an architecture needs.

    Attributes:
        gguf_name: `general.architecture` of the file.
        read_config: Returns a config.json of `transformers`, with an architecture; reads and bounds all keys.
        names: llama.cpp's names of tensors, by those of checkpoints without layer and kind; with the kind if
            one of the two has none. A `*` is the index of a module whose matrix llama.cpp stacks on others.
        layers: What the names of layers begin with, before their index.
        parts: Names of checkpoints for equal parts of the rows of one tensor, by its name without kind.
        restored: By llama.cpp's names without layer, undoes what the converter does to a tensor's values.
        shapes: By the same names, what this does to the tensor's shape, if anything.
        unused: Names of tensors that nothing reads, or only `read_config`.
        joined: llama.cpp's names of two stacks of matrices, by a checkpoint's name for one stack of both, in
            which each matrix has the rows of the second below those of the first.
        paired: llama.cpp's names, without layer and kind, of tensors whose rows it stores in rotary pairs.
        row_orders: By llama.cpp's names without layer, the file's row of each row of a tensor.
        column_orders: By the same names, the matrix's column of each column in the file.
        merged: By a checkpoint's name, with kind, of a tensor that the file may have in two.
    """

    gguf_name: str
    read_config: Callable[[Reader, GgufFile], dict[str, Any]]
    names: Mapping[str, str]
    layers: str = "model.layers."
    parts: Mapping[str, Sequence[str]] = field(default_factory=dict)
    restored: Mapping[str, Callable[[Floats], Floats]] = field(default_factory=dict)
    shapes: Mapping[str, Callable[[tuple[int, ...]], tuple[int, ...]]] = field(default_factory=dict)
    unused: Sequence[str] = ()
    joined: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    paired: Sequence[str] = ()
    row_orders: Mapping[str, npt.NDArray[np.int64]] = field(default_factory=dict)
    column_orders: Mapping[str, npt.NDArray[np.int64]] = field(default_factory=dict)
    merged: Mapping[str, Merged] = field(default_factory=dict)

    def restore_of(self, stored: str) -> Callable[[Floats], Floats] | None:
        """Return what undoes the converter's change to a tensor of the file; None if it changed none."""
        return self.restored.get(self._prefix_of(stored)[1])

    def joined_of(self, stored: str) -> tuple[str, str, str] | None:
        """Return a checkpoint's name for the joined stack of a tensor, and the file's names of its parts."""
        prefix, name = self._prefix_of(stored)
        found = next(((own, pair) for own, pair in self.joined.items() if name in pair), None)
        if found is None:
            return None
        outer = stored.removesuffix(name)
        return f"{prefix}{found[0]}", f"{outer}{found[1][0]}", f"{outer}{found[1][1]}"

    def merged_of(self, stored: str) -> tuple[str, Merged, list[str]] | None:
        """Return a checkpoint's name for what a tensor is a part of, how it is made, and its parts' names."""
        prefix, name = self._prefix_of(stored)
        found = next(((own, each) for own, each in self.merged.items() if name in each.stored), None)
        if found is None:
            return None
        outer = stored.removesuffix(name)
        return f"{prefix}{found[0]}", found[1], [f"{outer}{part}" for part in found[1].stored]

    def is_paired(self, stored: str) -> bool:
        """Return whether the rows of a tensor of the file are stored in rotary pairs."""
        return self._prefix_of(stored)[1].rpartition(".")[0] in self.paired

    def orders_of(self, stored: str) -> tuple[npt.NDArray[np.int64] | None, npt.NDArray[np.int64] | None]:
        """Return the orders of a tensor's rows and columns, each None if it is the model's."""
        name = self._prefix_of(stored)[1]
        return self.row_orders.get(name), self.column_orders.get(name)

    def shape_of(self, stored: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of a tensor of the file after `restore_of`."""
        change = self.shapes.get(self._prefix_of(stored)[1])
        return shape if change is None else change(shape)

    def name_of(self, stored: str) -> str | None:
        """Return the name that a checkpoint has for a tensor of the file; None if it has none."""
        prefix, name = self._prefix_of(stored)
        stem, _, kind = name.rpartition(".")
        own = {known: own for own, known in self.names.items()}
        if name in own:
            return prefix + own[name]
        return f"{prefix}{own[stem]}.{kind}" if stem in own and kind in _KINDS else None

    def parts_of(self, stored: str) -> list[str]:
        """Return the names that a checkpoint has for equal parts of a tensor of the file; empty if none."""
        prefix, name = self._prefix_of(stored)
        stem, _, kind = name.rpartition(".")
        parts = self.parts.get(stem, ()) if kind in _KINDS else ()
        return [f"{prefix}{part}.{kind}" for part in parts]

    def _prefix_of(self, stored: str) -> tuple[str, str]:
        """Return what the names of a checkpoint begin with, and the file's own name without its layer."""
        layer = _LAYER.fullmatch(stored)
        return (f"{self.layers}{layer[1]}.", layer[2]) if layer else ("", stored)


def layer_of(stored: str) -> int | None:
    """Return the layer of a tensor of a file; None if it is of none."""
    layer = _LAYER.fullmatch(stored)
    return int(layer[1]) if layer else None


def read_common(reader: Reader) -> dict[str, Any]:
    """Return what every configuration has; the norms' epsilon as `rms_norm_eps`."""
    return {
        "vocab_size": reader.positive("vocab_size", MAX_SIZE),
        "hidden_size": reader.positive("hidden_size", MAX_SIZE),
        "num_hidden_layers": reader.positive("num_hidden_layers", MAX_LAYERS),
        "num_attention_heads": reader.positive("num_attention_heads", MAX_HEADS),
        "max_position_embeddings": reader.positive("max_position_embeddings", MAX_CONTEXT),
        "rms_norm_eps": reader.number("rms_norm_eps", 1e-6),
        "tie_word_embeddings": "output.weight" not in reader.tensors,
    }


def read_routing(reader: Reader, num_experts: int) -> dict[str, int]:
    """Return how many experts a token uses, and of how many groups, which the code of `transformers` trusts.

    It ranks groups by the sum of their two best experts. As in llama.cpp, no groups (0) are one.
    """
    groups = reader.integer("n_group", 0) or 1
    check(
        groups > 0 and num_experts % groups == 0 and num_experts // groups > 1,
        f"expert_group_count must divide the {num_experts} experts into groups of two or more, got {groups}",
    )
    given = reader.get("topk_group") or groups > 1
    used_groups = reader.positive("topk_group", groups) if given else 1
    return {
        "num_experts_per_tok": reader.positive("num_experts_per_tok", num_experts // groups * used_groups),
        "n_group": groups,
        "topk_group": used_groups,
    }


def read_latent_attention(reader: Reader) -> dict[str, Any]:
    """Return the sizes of latent attention; a file also has those of a latent, as one head's."""
    latent = read_latent(reader)
    sizes = {
        "kv_lora_rank": latent.rank,
        "qk_nope_head_dim": latent.plain_dim,
        "qk_rope_head_dim": latent.rotary_dim,
        "v_head_dim": latent.value_dim,
    }
    check(all(0 < each <= MAX_SIZE for each in sizes.values()), f"heads and latents cannot have {sizes}")
    rank = latent.query_rank
    check(rank is None or 0 < rank <= MAX_SIZE, f"attention.q_lora_rank must be positive, got {rank}")
    reader.ignore("num_key_value_heads", "head_dim", "attention.value_length")
    return {
        **sizes,
        "q_lora_rank": rank,
        "attention_bias": latent.has_bias,
        "num_key_value_heads": reader.positive("num_attention_heads", MAX_HEADS),
    }


def read_frequencies(reader: Reader, file: GgufFile, rotary_dim: int, max_positions: int) -> dict[str, Any]:
    """Return the `rope_parameters` of a file that may have a factor for each frequency.

    Llama 3's scaling becomes such factors in llama.cpp's converter. `transformers` calls any list of them
    LongRoPE, whose two lists are the same then.
    """
    theta = reader.number("rope_theta", 10000.0)
    reader.require(**{"rope.scaling.type": "none", "rope.scaling.factor": 1.0})
    name = "rope_freqs.weight"
    if name not in reader.tensors:
        return {"rope_type": "default", "rope_theta": theta}
    info = file.tensor(name)
    check(
        info.type == "F32" and info.shape == (rotary_dim // 2,),
        f"tensor {name!r} must have a factor for each of {rotary_dim // 2} frequencies",
    )
    factors = file.raw(name).view(np.float32)
    check(bool(np.isfinite(factors).all() and (factors > 0).all()), f"{name!r} must be positive")
    return {
        "rope_type": "longrope",
        "rope_theta": theta,
        "factor": 1.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": max_positions,
        "short_factor": factors.tolist(),
        "long_factor": factors.tolist(),
    }


def scaling_type(reader: Reader) -> Any:
    """Return the type of scaling of rotary positions; as in llama.cpp, a factor without a type is linear."""
    prefix = "rope.scaling."
    reader.ignore(f"{prefix}finetuned")
    reader.require(**{f"{prefix}attn_factor": 1.0})
    kind, factor = reader.get(f"{prefix}type"), reader.get(f"{prefix}factor")
    return ("none" if factor in (None, 0, 1) else "linear") if kind is None else kind


def read_yarn(reader: Reader) -> dict[str, Any]:
    """Return the `rope_parameters` of YaRN but for its base and its magnitudes."""
    prefix = "rope.scaling."
    reader.ignore(f"{prefix}yarn_ext_factor", f"{prefix}yarn_attn_factor")  # as for native families
    return {
        "rope_type": "yarn",
        "factor": reader.number(f"{prefix}factor"),
        "original_max_position_embeddings": reader.positive(f"{prefix}original_context_length", MAX_CONTEXT),
        "beta_fast": reader.number(f"{prefix}yarn_beta_fast", 32.0),
        "beta_slow": reader.number(f"{prefix}yarn_beta_slow", 1.0),
    }


def vocab_size_of(file: GgufFile) -> int:
    """Return the number of embeddings, for files that may not say it elsewhere."""
    table = file.tensor("token_embd.weight")
    check(len(table.shape) == 2, f"tensor {table.name!r} must be a matrix")
    return table.shape[0]


def per_layer(reader: Reader, key: str, num_layers: int, *, least: int = 1) -> list[int]:
    """Return a size of each layer, which the file has once or as a list."""
    given = reader.get(key)
    values = given if isinstance(given, list) else [given] * num_layers
    are_sizes = all(type(each) is int and least <= each <= MAX_SIZE for each in values)
    check(
        len(values) == num_layers and are_sizes,
        f"`{key}` must be a size, or one for each layer, got {str(given)[:100]}",
    )
    return values


def layer_types(
    reader: Reader, num_layers: int, period: int | None = None, *, wide_at: int = -1
) -> list[str]:
    """Return which layers have a window, which the file has as a list, or as a number if there is a period.

    Args:
        num_layers: The layers to return; a list may have more, of layers that only draft.
        period: One layer in so many has no window, unless the file says otherwise; None: it must have a list.
        wide_at: Which one of them.
    """
    slides = reader.get("sliding_window_pattern")
    if period is not None and not isinstance(slides, list):
        period = period if slides is None else reader.positive("sliding_window_pattern", MAX_LAYERS)
        slides = [index % period != wide_at % period for index in range(num_layers)]
    check(
        isinstance(slides, list) and len(slides) >= num_layers and all(type(each) is bool for each in slides),
        f"attention.sliding_window_pattern must be a list of {num_layers} values"
        + ("" if period is None else ", or a number"),
    )
    return ["sliding_attention" if each else "full_attention" for each in slides[:num_layers]]


def log_of_decay(stored: Floats) -> Floats:
    """Return Mamba's A_log, of which llama.cpp stores -exp(A_log)."""
    check(bool((stored < 0).all()), "ssm_a must be negative")
    found: Floats = np.log(-stored)
    return found


def _latent_heads(keys: Floats, values: Floats) -> Floats:
    """Return the rows of heads' keys and values, of matrices for each head; those of keys are transposed."""
    found: Floats = np.concatenate([keys.swapaxes(1, 2), values], axis=1)
    return found.reshape(-1, found.shape[2])


def _latent_shape(keys: tuple[int, ...], values: tuple[int, ...]) -> tuple[int, ...]:
    are_heads = len(keys) == len(values) == 3 and keys[0] == values[0] and keys[1] == values[2]
    check(are_heads, f"matrices of heads [{list(keys)}] and [{list(values)}] do not belong together")
    return (keys[0] * (keys[2] + values[1]), keys[1])


# The product of latents with which heads' keys and values begin; llama.cpp has a matrix of each head's.
LATENT_HEADS: Mapping[str, Merged] = {
    "self_attn.kv_b_proj.weight": Merged(("attn_k_b.weight", "attn_v_b.weight"), _latent_heads, _latent_shape)
}


def common_names(*names: str) -> dict[str, str]:
    """Return llama.cpp's names for names that most models have."""
    return {name: GGUF_NAMES[name] for name in names}


@functools.cache
def all_modules() -> tuple[GgufModule, ...]:
    """Import every module of `models/gguf_modules`, and return what they describe."""
    names = sorted(module.name for module in pkgutil.iter_modules(gguf_modules.__path__))
    imported = (importlib.import_module(f"{gguf_modules.__name__}.{name}") for name in names)
    return tuple(each for module in imported for each in module.MODULES)


def find_module(name: object) -> GgufModule | None:
    """Return what describes a `general.architecture`; None if nothing does."""
    return next((each for each in all_modules() if each.gguf_name == name), None)
