"""The operators on a real GPU, with the interface of the emulated device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tests.emulation.device import KernelFault
from tgi_asgi.ops import ACTIVATIONS
from tgi_asgi.runner.cuda_device import CudaDevice

_ops: Any = torch.ops.tgi_cuda


class GpuDevice:
    """Runs `torch.ops.tgi_cuda` on a device; tensors belong to the host and are copied for each run.

    Fresh memory is poisoned as on the emulated device; accesses to parts of it cannot be forbidden here.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Make a tensor filled with NaN bytes."""
        count = torch.Size(shape).numel() * dtype.itemsize
        return torch.full((count,), 0xFF, dtype=torch.uint8).view(dtype).view(tuple(shape))

    def tensor(self, values: Tensor) -> Tensor:
        """Copy a tensor."""
        return values.clone()

    def constant(self, values: Tensor) -> Tensor:
        """Copy a tensor."""
        return values.clone()

    def forbid(self, part: Tensor, is_forbidden: bool = True) -> None:
        """Do nothing: a GPU does not watch single elements."""

    def attention_workspace_bytes(self, *sizes: int) -> int:
        """Return the workspace size of decode attention."""
        return int(_ops.attention_workspace_bytes(*sizes))

    def sample_workspace_bytes(self, num_rows: int) -> int:
        """Return the workspace size for sampling this many rows."""
        return int(_ops.sample_workspace_bytes(num_rows))

    def experts_max_tiles(self, num_pairs: int, num_experts: int, is_streamed: bool) -> int:
        """Return the maximum number of tiles of a plan of routed experts."""
        return int(_ops.experts_max_tiles(num_pairs, num_experts, is_streamed))

    def run(self, name: str, outputs: Sequence[Tensor], **params: Any) -> None:
        """Run an operator twice from the same outputs, and require bit-identical results."""
        before = [output.clone() for output in outputs]
        self.launch(name, **params)
        first = [output.clone() for output in outputs]
        for output, start in zip(outputs, before, strict=True):
            output.copy_(start)
        self.launch(name, **params)
        for one, two in zip(first, outputs, strict=True):
            if not torch.equal(_bytes(one), _bytes(two)):
                raise KernelFault("order", f"{name}: two runs give two results")

    def launch(self, name: str, seed: int = 1, **params: Any) -> None:
        """Run an operator once, and copy back every tensor that it may have written."""
        moved: dict[int, tuple[Tensor, Tensor]] = {}

        def move(value: Any) -> Any:
            if isinstance(value, list):
                return [move(each) for each in value]
            if not isinstance(value, Tensor):
                return value
            if value.data_ptr() not in moved or value.numel() == 0:
                moved[value.data_ptr()] = (value, value.contiguous().to(self.device, copy=True))
            return moved[value.data_ptr()][1]

        getattr(self, f"_{name}")(_Params({key: move(value) for key, value in params.items()}))
        for host, there in moved.values():
            host.copy_(there)

    def _begin_step(self, p: Any) -> None:
        _ops.begin_step(
            p.records, p.from_slot, p.context_len, p.table_slots, p.table_firsts, p.table_starts, p.entries,
            p.block_size, p.ids, p.kept, p.tables,
        )  # fmt: skip

    def _embed(self, p: Any) -> None:
        _ops.embed(p.ids, p.table, p.out)

    def _norm(self, p: Any) -> None:
        if p.is_added:
            _ops.norm_add(p.x, p.weight, p.bias, p.eps, p.factor, p.out)
        else:
            _ops.norm(p.x, p.weight, p.bias, p.eps, p.rows, p.out)

    def _activate(self, p: Any) -> None:
        name = ACTIVATIONS[p.activation]
        if p.is_gated:
            _ops.gate(p.x, name, p.out)
        else:
            _ops.activate(p.x, name, p.above, p.below, p.out)

    def _rope_kv_write(self, p: Any) -> None:
        _ops.rope_kv_write(
            p.qkv.flatten(1), p.positions, p.slots, p.cos, p.sin, p.q_norm, p.k_norm, p.q_bias, p.k_bias,
            bool(p.is_norm_last), p.eps, p.key_scale, p.value_scale, p.q, p.kv,
        )  # fmt: skip

    def _attention_plan(self, p: Any) -> None:
        _ops.attention_plan(p.context_len, p.block_table, p.block_size, p.window, p.plan)

    def _attention_decode(self, p: Any) -> None:
        _ops.attention_decode(
            p.q, p.kv, p.context_len, p.block_table, p.window, p.scale, p.soft_cap, p.sinks, p.slopes,
            p.key_scale, p.value_scale, p.plan, p.workspace, p.out,
        )  # fmt: skip

    def _attention_prefill(self, p: Any) -> None:
        _ops.attention_prefill(
            p.q, p.kv, p.query_start, p.context_len, p.block_table, p.max_query_len, p.window, p.scale,
            p.soft_cap, p.sinks, p.slopes, p.key_scale, p.value_scale, p.out,
        )  # fmt: skip

    def _attention_gather(self, p: Any) -> None:
        _ops.attention_gather(p.kv, p.block_table, p.context_len, p.num_rows, p.out)

    def _attention_merge(self, p: Any) -> None:
        sums = [each[:, : p.num_tokens] for each in p.lses]
        _ops.attention_merge(p.parts, sums, p.value_scale, p.out)

    def _residual_add(self, p: Any) -> None:
        _ops.residual_add(p.rows, p.factor, p.x)

    def _linear(self, p: Any) -> None:
        _ops.linear(p.a, p.weight, p.bias, bool(p.is_added), p.out)

    def _quant_linear(self, p: Any) -> None:
        _ops.quant_linear(p.a, p.codes, p.scales, p.offsets, p.bias, p.bits, p.zero, bool(p.is_added), p.out)

    def _dequantise(self, p: Any) -> None:
        _ops.dequantise(p.codes, p.scales, p.offsets, p.bits, p.zero, p.out)

    def _quantise(self, p: Any) -> None:
        _ops.quantise(p.x, bool(p.has_groups), p.codes.view(torch.float8_e4m3fn), p.scales.flatten())

    def _lora_down(self, p: Any) -> None:
        _ops.lora_down(p.x, p.adapters, p.places, p.pool, p.product, p.rank, p.inner)

    def _lora_up(self, p: Any) -> None:
        _ops.lora_up(
            p.inner, p.adapters, p.places, p.pool, p.product, p.rank, p.num_columns, p.first_end,
            p.second_end, p.factor, p.out,
        )  # fmt: skip

    def _route(self, p: Any) -> None:
        _ops.route(
            p.logits, p.slots, p.correction, ("softmax", "sigmoid", "sparsemixer")[p.kind], p.num_groups,
            p.top_groups, bool(p.sums_top_two), bool(p.is_renormalised), p.eps, p.scale, p.jitter, p.ids,
            p.weights,
        )  # fmt: skip

    def _experts_plan(self, p: Any) -> None:
        _ops.experts_plan(p.ids, p.num_experts, bool(p.is_streamed), p.pairs, p.tiles)

    def _experts_product(self, p: Any) -> None:
        given = (
            p.a, p.codes, p.scales, p.offsets, p.bias, p.bits, p.zero, p.num_experts, p.pairs, p.tiles,
            bool(p.is_streamed),
        )  # fmt: skip
        if p.is_gated:
            _ops.experts_gate_up(*given, ACTIVATIONS[p.activation], p.limit, p.slope, p.offset, p.out)
        else:
            _ops.experts_down(*given, p.out)

    def _experts_sum(self, p: Any) -> None:
        _ops.experts_sum(p.rows, p.ids, p.weights, p.num_experts, p.factor, p.x)

    def _gated_add(self, p: Any) -> None:
        _ops.gated_add(p.rows, p.gate, p.factor, p.x)

    def _sample(self, p: Any) -> None:
        _ops.sample(
            p.logits, p.slots, p.records, p.counts, p.biased_ids, p.biased_values, p.masked_ids, p.mask,
            p.mask_rows, p.scratch, p.workspace, p.token_ids, p.is_finite, p.logprobs, p.top_ids,
            p.top_logprobs, p.num_top,
        )  # fmt: skip

    def _draft_slots(self, p: Any) -> None:
        _ops.draft_slots(
            p.records, p.counts, p.biased_ids, p.biased_values, p.masked_ids, p.slots, p.ahead, p.drafts
        )

    def _accept_drafts(self, p: Any) -> None:
        _ops.accept_drafts(p.records, p.counts, p.slots, p.ahead, p.drafts)


class CountedGpu(CudaDevice):
    """A GPU for the tests of the runner, which otherwise use an `EmulatedDevice`; it has the same attributes.

    Several tests share the GPU, so each sees only a little of its memory.
    """

    def __init__(self, index: int = 0) -> None:
        super().__init__(index)
        self.captured = 0
        self.replayed = 0
        self.failure: Exception | None = None
        self.peak = 0

    def capture(self, call: Callable[[], None]) -> Callable[[], None]:
        """Capture a graph whose replays are counted."""
        graph = super().capture(call)
        self.captured += 1

        def replay() -> None:
            self.replayed += 1
            if self.failure is not None:
                raise self.failure
            graph()

        return replay

    def free_bytes(self) -> int:
        """Return as much as the emulated device has."""
        return 1 << 30

    def peak_bytes(self, call: Callable[[], object]) -> int:
        """Return what a test says: most of the GPU's memory is out of sight, as above."""
        super().peak_bytes(call)
        return self.peak


class _Params:
    def __init__(self, values: dict[str, Any]) -> None:
        self.__dict__.update(values)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)
