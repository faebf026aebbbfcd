"""torch.ops.tgi_cuda on the CPU with emulated kernels: code built on the operators runs without a GPU.

The schemas are read from the extension's own source, and its program is compiled from there.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.emulation import library, program
from tests.emulation.device import TYPES, Device
from tgi_asgi.ops import ACTIVATIONS

_BINDINGS = Path(__file__).parents[2] / "csrc" / "bindings" / "cuda" / "library.cpp"


@functools.cache
def register() -> None:
    """Define the operators, once per process; if the built extension has them, only for the CPU."""
    is_built = hasattr(torch.ops.tgi_cuda, "attention_plan")
    device = Device(library.build())
    device.library.emu_allow_host(True)
    operators = torch.library.Library("tgi_cuda", "IMPL" if is_built else "DEF")
    for schema in schemas():
        name = schema.partition("(")[0]
        key = _KEYS.get(name, "CPU")
        if not is_built:
            operators.define(schema)
        if not is_built or key == "CPU":
            operators.impl(name, functools.partial(_IMPLEMENTATIONS[name], device), key)
    _KEPT.append(operators)
    if not is_built:
        program.install()


_KEPT: list[Any] = []  # collecting a library would remove its operators
_KEYS = dict.fromkeys(
    ("attention_workspace_bytes", "experts_max_tiles", "sample_workspace_bytes", "set_dependent_launches"),
    "CompositeExplicitAutograd",
)


def schemas() -> list[str]:
    """Return the schemas of all operators."""
    text = re.sub(r'"\s*\n\s*"', "", _BINDINGS.read_text())
    return re.findall(r'm\.def\(\s*"([^"]+)"', text)


def _embed(device: Device, ids: Tensor, table: Tensor, out: Tensor) -> None:
    device.launch(
        "embed", ids=ids, table=table, out=out, num_tokens=ids.shape[0], num_rows=table.shape[0],
        hidden=table.shape[1], type=TYPES[table.dtype],
    )  # fmt: skip


def _norm(
    device: Device, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, rows: Tensor | None,
    out: Tensor,
) -> None:  # fmt: skip
    is_wide = out.dtype is torch.float32
    device.launch(
        "norm", x=x, weight=weight, bias=bias, rows=rows, out=out, num_tokens=x.shape[0],
        num_rows=out.shape[0], hidden=x.shape[1], eps=eps, factor=1.0, is_wide=is_wide, is_added=False,
        type=0 if is_wide else TYPES[out.dtype],
    )  # fmt: skip


def _norm_add(
    device: Device, rows: Tensor, weight: Tensor, bias: Tensor | None, eps: float, factor: float, x: Tensor
) -> None:
    device.launch(
        "norm", x=rows, weight=weight, bias=bias, rows=None, out=x, num_tokens=x.shape[0],
        num_rows=x.shape[0], hidden=x.shape[1], eps=eps, factor=factor, is_wide=True, is_added=True, type=0,
    )  # fmt: skip


def _activate(device: Device, x: Tensor, activation: str, above: float, below: float, out: Tensor) -> None:
    device.launch(
        "activate", x=x, out=out, num_tokens=out.shape[0], intermediate=out.shape[1],
        activation=ACTIVATIONS.index(activation), above=above, below=below,
        is_gated=x.shape[1] != out.shape[1], type=TYPES[out.dtype],
    )  # fmt: skip


def _gate(device: Device, gate_up: Tensor, activation: str, out: Tensor) -> None:
    _activate(device, gate_up, activation, 0.0, 0.0, out)


def _rope_kv_write(
    device: Device, qkv: Tensor, positions: Tensor, slots: Tensor, cos: Tensor, sin: Tensor,
    q_norm: Tensor | None, k_norm: Tensor | None, q_bias: Tensor | None, k_bias: Tensor | None,
    is_norm_last: bool, eps: float, key_scale: float, value_scale: float, q: Tensor, kv: Tensor,
) -> None:  # fmt: skip
    is_each = q_norm is not None and q_norm.numel() != q.shape[2]
    device.launch(
        "rope_kv_write", qkv=qkv, positions=positions, slots=slots, cos=cos, sin=sin, q_norm=q_norm,
        k_norm=k_norm, q_bias=q_bias, k_bias=k_bias, norm_stride=q.shape[2] if is_each else 0,
        is_norm_last=is_norm_last, q=q, kv=kv, num_tokens=q.shape[0], num_positions=cos.shape[0],
        num_heads=q.shape[1],
        num_kv_heads=kv.shape[2], head_dim=q.shape[2], rotary_dim=2 * cos.shape[1], num_blocks=kv.shape[0],
        block_size=kv.shape[3], eps=eps, key_scale=key_scale, value_scale=value_scale, type=TYPES[q.dtype],
        kv_type=TYPES[kv.dtype],
    )  # fmt: skip


def _attention(device: Device, name: str, **given: Any) -> None:
    none: dict[str, Any] = dict.fromkeys(
        ("q", "kv", "query_start", "out", "sinks", "slopes", "plan", "workspace")
    )
    zeros = dict.fromkeys(
        ("num_tokens", "max_query_len", "num_heads", "head_dim", "num_blocks", "scale", "soft_cap"), 0
    )
    ones = dict.fromkeys(("num_kv_heads", "key_scale", "value_scale"), 1)
    kinds = {"type": 0, "kv_type": 0}
    table = given["block_table"]
    shape = {"num_sequences": table.shape[0], "block_table_stride": table.shape[1]}
    q, kv = given.get("q"), given.get("kv")
    if q is not None and kv is not None:
        shape |= {"num_tokens": q.shape[0], "num_heads": q.shape[1], "head_dim": q.shape[2]}
        shape |= {"num_blocks": kv.shape[0], "num_kv_heads": kv.shape[2], "block_size": kv.shape[3]}
        kinds = {"type": TYPES[q.dtype], "kv_type": TYPES[kv.dtype]}
    device.launch(name, **(none | zeros | ones | kinds | shape | given))


def _attention_plan(
    device: Device, context_len: Tensor, block_table: Tensor, block_size: int, window: int, plan: Tensor
) -> None:
    _attention(
        device, "attention_plan", context_len=context_len, block_table=block_table, block_size=block_size,
        window=window, plan=plan,
    )  # fmt: skip


def _attention_decode(
    device: Device, q: Tensor, kv: Tensor, context_len: Tensor, block_table: Tensor, window: int,
    scale: float, soft_cap: float, sinks: Tensor | None, slopes: Tensor | None, key_scale: float,
    value_scale: float, plan: Tensor, workspace: Tensor, out: Tensor,
) -> None:  # fmt: skip
    _attention(
        device, "attention_decode", q=q, kv=kv, context_len=context_len, block_table=block_table,
        window=window, scale=scale, soft_cap=soft_cap, sinks=sinks, slopes=slopes, key_scale=key_scale,
        value_scale=value_scale, plan=plan, workspace=workspace, out=out,
    )  # fmt: skip


def _attention_prefill(
    device: Device, q: Tensor, kv: Tensor, query_start: Tensor, context_len: Tensor, block_table: Tensor,
    max_query_len: int, window: int, scale: float, soft_cap: float, sinks: Tensor | None,
    slopes: Tensor | None, key_scale: float, value_scale: float, out: Tensor,
) -> None:  # fmt: skip
    _attention(
        device, "attention_prefill", q=q, kv=kv, query_start=query_start, context_len=context_len,
        block_table=block_table, max_query_len=max_query_len, window=window, scale=scale, soft_cap=soft_cap,
        sinks=sinks, slopes=slopes, key_scale=key_scale, value_scale=value_scale, out=out,
    )  # fmt: skip


def _attention_workspace_bytes(device: Device, *sizes: int) -> int:
    return device.attention_workspace_bytes(*sizes)


def _sample_workspace_bytes(device: Device, num_rows: int) -> int:
    return device.sample_workspace_bytes(num_rows)


def _sample(
    device: Device, logits: Tensor, slots: Tensor, records: Tensor, counts: Tensor, biased_ids: Tensor,
    biased_values: Tensor, masked_ids: Tensor, mask: Tensor | None, mask_rows: Tensor | None, scratch: Tensor,
    workspace: Tensor, token_ids: Tensor, is_finite: Tensor, logprobs: Tensor, top_ids: Tensor,
    top_logprobs: Tensor, num_top: Tensor,
) -> None:  # fmt: skip
    device.launch(
        "sample", logits=logits, slots=slots, records=records, counts=counts, biased_ids=biased_ids,
        biased_values=biased_values, masked_ids=masked_ids, mask=mask, mask_rows=mask_rows,
        num_masks=0 if mask is None else mask.shape[0], token_ids=token_ids,
        is_finite=is_finite, logprobs=logprobs, top_ids=top_ids, top_logprobs=top_logprobs, num_top=num_top,
        vocab=logits.shape[1], biased_stride=biased_ids.shape[1], masked_stride=masked_ids.shape[1],
        max_top=top_ids.shape[1], scratch=scratch, workspace=workspace, num_rows=logits.shape[0],
        num_slots=records.shape[0],
    )  # fmt: skip


def _token_logprobs(
    device: Device, logits: Tensor, token_ids: Tensor, logprobs: Tensor, top_ids: Tensor, top_logprobs: Tensor
) -> None:
    device.launch(
        "token_logprobs", logits=logits, token_ids=token_ids, logprobs=logprobs, top_ids=top_ids,
        top_logprobs=top_logprobs, vocab=logits.shape[1], num_top=top_ids.shape[1], num_rows=logits.shape[0],
    )  # fmt: skip


def _linear(
    device: Device, a: Tensor, weight: Tensor, bias: Tensor | None, is_added: bool, out: Tensor
) -> None:
    device.launch(
        "linear", a=a, weight=weight, bias=bias, out=out, num_tokens=a.shape[0], num_rows=weight.shape[0],
        num_columns=a.shape[1], is_wide=out.dtype is torch.float32, is_added=is_added, type=TYPES[a.dtype],
    )  # fmt: skip


def matrix_params(
    codes: Tensor, scales: Tensor, offsets: Tensor | None, bits: int, zero: int
) -> dict[str, Any]:
    """Return the fields of a `QuantMatrix`."""
    columns = codes.shape[1] * 8 // bits
    return {
        "codes": codes, "scales": scales, "offsets": offsets, "num_rows": codes.shape[0],
        "num_columns": columns, "group": columns // scales.shape[1], "bits": bits, "zero": zero,
        "has_wide_scales": scales.dtype is torch.float32,
        "has_float_codes": codes.dtype is not torch.uint8 or scales.dtype is torch.uint8,
    }  # fmt: skip


def _quant_linear(
    device: Device, a: Tensor, codes: Tensor, scales: Tensor, offsets: Tensor | None, bias: Tensor | None,
    bits: int, zero: int, out: Tensor,
) -> None:  # fmt: skip
    device.launch(
        "quant_linear", **matrix_params(codes, scales, offsets, bits, zero), a=a, bias=bias, out=out,
        num_tokens=a.shape[0], is_wide=out.dtype is torch.float32, type=TYPES[a.dtype],
    )  # fmt: skip


def _dequantise(
    device: Device, codes: Tensor, scales: Tensor, offsets: Tensor | None, bits: int, zero: int, out: Tensor
) -> None:
    matrix = matrix_params(codes, scales, offsets, bits, zero)
    device.launch("dequantise", **matrix, out=out, type=TYPES[out.dtype])


def _lora_product(
    adapters: Tensor, places: Tensor, pool: Tensor, product: int, rank: int, columns: int
) -> dict[str, Any]:
    return {
        "adapters": adapters, "places": places, "pool": pool, "num_tokens": len(adapters),
        "num_slots": pool.shape[0], "num_products": places.shape[1], "product": product,
        "slot_stride": pool.shape[1], "num_columns": columns, "rank": rank, "type": TYPES[pool.dtype],
    }  # fmt: skip


def _lora_down(
    device: Device, x: Tensor, adapters: Tensor, places: Tensor, pool: Tensor, product: int, rank: int,
    inner: Tensor,
) -> None:  # fmt: skip
    of_product = _lora_product(adapters, places, pool, product, rank, x.shape[1])
    device.launch("lora_down", **of_product, x=x, inner=inner, num_inner=inner.shape[1])


def _lora_up(
    device: Device, inner: Tensor, adapters: Tensor, places: Tensor, pool: Tensor, product: int, rank: int,
    columns: int, first_end: int, second_end: int, factor: float, out: Tensor,
) -> None:  # fmt: skip
    device.launch(
        "lora_up", **_lora_product(adapters, places, pool, product, rank, columns), inner=inner, out=out,
        num_rows=out.shape[1], num_inner=inner.shape[1], first_end=first_end, second_end=second_end,
        factor=factor, is_wide=out.dtype is torch.float32,
    )  # fmt: skip


def _route(
    device: Device, logits: Tensor, slots: Tensor, correction: Tensor | None, kind: str, num_groups: int,
    top_groups: int, sums_top_two: bool, is_renormalised: bool, eps: float, scale: float, jitter: float,
    ids: Tensor, weights: Tensor,
) -> None:  # fmt: skip
    device.launch(
        "route", logits=logits, slots=slots, correction=correction, ids=ids, weights=weights,
        num_tokens=len(ids), num_experts=logits.shape[1], top_k=ids.shape[1], num_groups=num_groups,
        top_groups=top_groups, sums_top_two=sums_top_two, is_renormalised=is_renormalised, eps=eps,
        scale=scale, jitter=jitter, kind=("softmax", "sigmoid", "sparsemixer").index(kind),
    )  # fmt: skip


def _experts_plan(
    device: Device, ids: Tensor, num_experts: int, is_streamed: bool, pairs: Tensor, tiles: Tensor
) -> None:
    assert len(tiles) > device.experts_max_tiles(ids.numel(), num_experts, is_streamed)
    device.launch(
        "experts_plan", ids=ids, pairs=pairs, tiles=tiles, num_pairs=ids.numel(), num_experts=num_experts,
        is_streamed=is_streamed,
    )  # fmt: skip


def _experts_product(
    device: Device, a: Tensor, weight: Tensor, scales: Tensor | None, offsets: Tensor | None,
    bias: Tensor | None, bits: int, zero: int, num_experts: int, pairs: Tensor, tiles: Tensor,
    is_streamed: bool, *gate: Any,
) -> None:  # fmt: skip
    *gated, out = gate
    activation, limit, slope, offset = gated or ("silu", 0.0, 1.0, 0.0)
    if scales is None:
        matrix: dict[str, Any] = {
            "codes": weight, "scales": None, "offsets": None, "num_rows": weight.shape[0],
            "num_columns": weight.shape[1], "group": 0, "bits": bits, "zero": zero,
            "has_wide_scales": False, "has_float_codes": False,
        }  # fmt: skip
    else:
        matrix = matrix_params(weight, scales, offsets, bits, zero)
    device.launch(
        "experts_product", **matrix, a=a, bias=bias, pairs=pairs, tiles=tiles, out=out,
        num_pairs=pairs.numel(), num_experts=num_experts,
        pairs_per_row=pairs.shape[1] if a.dim() == 2 else 1, is_gated=bool(gated), is_streamed=is_streamed,
        activation=ACTIVATIONS.index(activation), limit=limit, slope=slope, offset=offset,
        type=TYPES[a.dtype],
    )  # fmt: skip


def _experts_sum(
    device: Device, rows: Tensor, ids: Tensor, weights: Tensor, num_experts: int, factor: float, x: Tensor
) -> None:
    device.launch(
        "experts_sum", rows=rows, ids=ids, weights=weights, x=x, num_tokens=len(x), num_experts=num_experts,
        top_k=ids.shape[1], hidden=x.shape[1], factor=factor, type=TYPES[rows.dtype],
    )  # fmt: skip


def _gated_add(device: Device, rows: Tensor, gate: Tensor, factor: float, x: Tensor) -> None:
    device.launch("gated_add", rows=rows, gate=gate, x=x, num_tokens=len(x), hidden=x.shape[1], factor=factor)


_IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "embed": _embed,
    "norm": _norm,
    "norm_add": _norm_add,
    "gate": _gate,
    "activate": _activate,
    "rope_kv_write": _rope_kv_write,
    "attention_plan": _attention_plan,
    "attention_decode": _attention_decode,
    "attention_prefill": _attention_prefill,
    "set_dependent_launches": lambda device, is_on: None,
    "attention_workspace_bytes": _attention_workspace_bytes,
    "linear": _linear,
    "quant_linear": _quant_linear,
    "dequantise": _dequantise,
    "lora_down": _lora_down,
    "lora_up": _lora_up,
    "route": _route,
    "experts_plan": _experts_plan,
    "experts_gate_up": _experts_product,
    "experts_down": _experts_product,
    "experts_sum": _experts_sum,
    "gated_add": _gated_add,
    "experts_max_tiles": lambda device, *sizes: device.experts_max_tiles(*sizes),
    "sample": _sample,
    "sample_workspace_bytes": _sample_workspace_bytes,
    "token_logprobs": _token_logprobs,
}
