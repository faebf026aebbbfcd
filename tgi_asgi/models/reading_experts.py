"""Reads what configurations say about experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from tgi_asgi.errors import check
from tgi_asgi.models.layer_spec import ExpertsSpec, LayerSpec
from tgi_asgi.models.reader import Reader

# Keys that only training uses.
_TRAINING = (
    "router_aux_loss_coef", "router_z_loss_coef", "aux_loss_alpha", "seq_aux", "output_router_logits",
    "input_jitter_noise", "moe_capacity", "moe_aux_loss_lambda",
)  # fmt: skip
SOFTMAX, SIGMOID = 1, 2  # llama.cpp's numbers for them


def read_experts(
    reader: Reader, *, count: str, top_k: str, size: str = "moe_intermediate_size", **more: Any
) -> ExpertsSpec:
    """Read what all experts have: their number, how many each token uses, and their size.

    Args:
        count, top_k, size: Keys of these.
        more: Other arguments of `ExpertsSpec`.
    """
    reader.ignore(*_TRAINING)
    return ExpertsSpec(
        num_experts=reader.integer(count), top_k=reader.integer(top_k),
        intermediate_size=reader.integer(size), **more,
    )  # fmt: skip


def read_mixtral_experts(reader: Reader) -> ExpertsSpec:
    """Read the experts of Mixtral, whose size is that of the MLP in its other keys."""
    return read_experts(
        reader, count="num_local_experts", top_k="num_experts_per_tok", size="intermediate_size",
        is_renormalised=True,
    )  # fmt: skip


def read_corrected(reader: Reader) -> ExpertsSpec:
    """Read experts as in DeepSeek V3: sigmoid scores with a correction for the selection, in groups."""
    check_sigmoid(reader)
    size = reader.integer("moe_intermediate_size")
    return read_experts(
        reader, count="n_routed_experts", top_k="num_experts_per_tok", kind="sigmoid",
        # A GGUF file lacks a correction that is all zeros in its source.
        has_correction=not reader.is_gguf or has_corrections(reader), num_groups=reader.integer("n_group", 1),
        top_groups=reader.integer("topk_group", 1), sums_top_two=True,
        is_renormalised=reader.flag("norm_topk_prob", not reader.is_gguf), eps=1e-20,
        scale=read_scale(reader),
        shared_size=size * reader.integer("n_shared_experts", 0),
    )  # fmt: skip


def read_scale(reader: Reader) -> float:
    """Return the factor on experts' weights; 0 in a GGUF file means that there is none, as in llama.cpp."""
    scale = reader.number("routed_scaling_factor", 1.0)
    return 1.0 if reader.is_gguf and scale == 0 else scale


def check_sigmoid(reader: Reader) -> None:
    """Refuse a GGUF file whose experts are scored otherwise than by sigmoids."""
    kind = reader.integer("expert_gating_func", SIGMOID) if reader.is_gguf else SIGMOID
    check(kind == SIGMOID, f"expert_gating_func {kind} is not supported here, only {SIGMOID} is")


def has_corrections(reader: Reader) -> bool:
    """Return whether a GGUF file corrects experts' scores for the selection."""
    return any("exp_probs_b" in name for name in reader.tensors)


def with_experts(
    reader: Reader, layers: Sequence[LayerSpec], spec: ExpertsSpec, where: Callable[[int], bool]
) -> tuple[LayerSpec, ...]:
    """Return the layers with experts added at these indices; in a GGUF file, tensors show which have them.

    Args:
        where: Returns whether the layer of an index has experts, according to config.json.
    """
    if reader.is_gguf:
        reader.ignore("leading_dense_block_count", "interleave_moe_layer_step")

    def has_experts(index: int) -> bool:
        return f"blk.{index}.ffn_gate_inp.weight" in reader.tensors if reader.is_gguf else where(index)

    return tuple(
        replace(layer, experts=spec) if has_experts(index) else layer for index, layer in enumerate(layers)
    )


def everywhere(index: int) -> bool:
    """Return True: every layer has experts."""
    return True


def after_first_dense(reader: Reader) -> Callable[[int], bool]:
    """Return a predicate for layers with experts: all after the first dense ones."""
    first = 0 if reader.is_gguf else reader.integer("first_k_dense_replace", 0)
    return lambda index: index >= first


def read_sparse_steps(reader: Reader) -> Callable[[int], bool]:
    """Return a predicate for layers with experts, from Qwen's two keys."""
    if reader.is_gguf:
        return everywhere
    step, dense = reader.integer("decoder_sparse_step", 1), reader.get("mlp_only_layers") or []
    check(step >= 1, f"decoder_sparse_step must be positive, got {step}")
    check(
        isinstance(dense, list) and all(type(index) is int for index in dense),
        f"mlp_only_layers must be a list of integers, got {str(dense)[:100]}",
    )
    return lambda index: index not in dense and (index + 1) % step == 0
