"""The kernels of routed experts for bench/gpu_operators.py, in Qwen3-30B-A3B's shapes, next to torch's.

A call is a layer's plan, both products and the sum. Its bytes are those of the experts that the tokens use.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bench import gpu_timing
from bench.gpu_model import random_codes
from bench.gpu_timing import Call, copies_past_l2, in_turn, random
from tgi_asgi.ops.cuda_quant import CudaQuantMatrix

HIDDEN, INNER, EXPERTS, TOP_K = 2048, 768, 128, 8
TOKENS, CODED = (1, 8, 64, 512, 4096), ("int4", "q8_0", "fp8", "mxfp4")
_FEW = 64  # tokens up to which reading the weights takes longer than the arithmetic
_kernels: Any = torch.ops.tgi_cuda

Measurement = tuple[str, str, int, str, list[Call], dict[str, Call]]


def makers() -> Iterator[functools.partial[Measurement]]:
    """Yield a function per measurement, as `gpu_operators.makers` does."""
    for tokens in TOKENS:
        yield functools.partial(_experts, tokens, "bf16")
    for tokens in TOKENS[:1] + TOKENS[-1:]:
        for name in CODED:
            yield functools.partial(_experts, tokens, name)
    yield functools.partial(_route, TOKENS[-1])


class _Layer:
    """Random experts; `arguments` are those of a product's matrix."""

    def __init__(self, name: str) -> None:
        shapes = ((EXPERTS * 2 * INNER, HIDDEN), (EXPERTS * HIDDEN, INNER))
        self.matrices = [random(*shape) if name == "bf16" else random_codes(name, *shape) for shape in shapes]

    @property
    def nbytes(self) -> int:
        return sum(matrix.nbytes for matrix in self.matrices)

    def arguments(self, index: int) -> tuple[object, ...]:
        matrix = self.matrices[index]
        if isinstance(matrix, CudaQuantMatrix):
            return matrix.codes, matrix.scales, matrix.offsets, None, matrix.bits, matrix.zero
        return matrix, None, None, None, 16, 0


def _experts(tokens: int, name: str) -> Measurement:
    device, shape = gpu_timing.DEVICE, (tokens, TOP_K)
    ids = torch.rand(tokens, EXPERTS, device=device).topk(TOP_K).indices.sort(1).values.int()
    num_used = len(ids.unique())
    layers = [_Layer(name)]
    num_bytes = layers[0].nbytes * num_used // EXPERTS
    layers += [_Layer(name) for _ in range(copies_past_l2(num_bytes) - 1)]
    pairs, weights = torch.empty_like(ids), torch.rand(shape, device=device)
    most = int(_kernels.experts_max_tiles(ids.numel(), EXPERTS, False))
    tiles = torch.empty(1 + most, 4, dtype=torch.int32, device=device)
    a, inner, rows = random(tokens, HIDDEN), random(*shape, INNER), random(*shape, HIDDEN)
    x = random(tokens, HIDDEN, dtype=torch.float32)

    def call(layer: _Layer) -> None:
        plan = (EXPERTS, pairs, tiles, False)
        _kernels.experts_plan(ids, EXPERTS, False, pairs, tiles)
        _kernels.experts_gate_up(a, *layer.arguments(0), *plan, "silu", 0.0, 1.0, 0.0, inner)
        _kernels.experts_down(inner, *layer.arguments(1), *plan, rows)
        _kernels.experts_sum(rows, ids, weights, EXPERTS, 1.0, x)

    peers: dict[str, Call] = {}
    if name == "bf16":
        peers["torch._grouped_mm"] = in_turn(
            [functools.partial(_by_torch, layer, a, ids, weights, x) for layer in layers]
        )
    flops = 2 * tokens * TOP_K * 3 * HIDDEN * INNER
    cost, ceiling = (num_bytes, "read") if tokens <= _FEW else (flops, "bf16")
    calls: list[Call] = [functools.partial(call, layer) for layer in layers]
    return "experts", f"{tokens} tokens, {num_used} experts {name}", cost, ceiling, calls, peers


def _by_torch(layer: _Layer, a: Tensor, ids: Tensor, weights: Tensor, x: Tensor) -> None:
    """Compute the same with torch's grouped product of sorted rows."""
    grouped: Any = torch._grouped_mm
    order = ids.flatten().argsort(stable=True)
    counts = torch.zeros(EXPERTS, dtype=torch.int32, device=ids.device)
    ends = counts.index_add_(0, ids.flatten(), torch.ones_like(ids.flatten())).cumsum(0).int()
    gate_up, down = (
        matrix.view(EXPERTS, -1, matrix.shape[1]) for matrix in layer.matrices if isinstance(matrix, Tensor)
    )
    both = grouped(a[order // TOP_K], gate_up.transpose(1, 2), offs=ends)
    inner = torch.nn.functional.silu(both[:, :INNER]) * both[:, INNER:]
    rows = grouped(inner, down.transpose(1, 2), offs=ends) * weights.flatten()[order, None]
    x.index_add_(0, order // TOP_K, rows)


def _route(tokens: int) -> Measurement:
    device, shape = gpu_timing.DEVICE, (tokens, TOP_K)
    num_bytes = 4 * tokens * (EXPERTS + 2 * TOP_K)
    sets = [random(tokens, EXPERTS, dtype=torch.float32) for _ in range(copies_past_l2(num_bytes))]
    slots = torch.arange(tokens, device=device)
    ids, weights = (torch.empty(shape, dtype=dtype, device=device) for dtype in (torch.int32, torch.float32))

    def call(logits: Tensor) -> None:
        _kernels.route(
            logits, slots, None, "softmax", 1, 1, False, True, 0.0, 1.0, 0.0, ids, weights
        )  # fmt: skip

    peers: dict[str, Call] = {"torch.topk": in_turn([functools.partial(_topk, logits) for logits in sets])}
    calls: list[Call] = [functools.partial(call, logits) for logits in sets]
    return "route", f"{tokens} x {EXPERTS}, {TOP_K} chosen", num_bytes, "copy", calls, peers


def _topk(logits: Tensor) -> Tensor:
    best = logits.softmax(1).topk(TOP_K).values
    return best / best.sum(1, keepdim=True)
