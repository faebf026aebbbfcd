"""What a module of `transformers` computes on: the device's memory, products, cache and attention."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tgi_asgi import ops
from tgi_asgi.models.generic.rope import RotaryLookup
from tgi_asgi.ops import AdapterLayout, ClampedGate, ExpertsWeight, GateUpWeight, LinearWeight, direct
from tgi_asgi.ops.cuda_direct import CudaDirect
from tgi_asgi.ops.cuda_paged import CudaPagedAttention, DeviceKvPool
from tgi_asgi.ops.cuda_quant import Repacking
from tgi_asgi.ops.kv import HeadShape
from tgi_asgi.ops.paged import PagedAttention


class Stack(Protocol):
    """A product per expert, for rows sorted by expert; see `direct.LinearStack`."""

    nbytes: int

    def multiply(self, x: Tensor, sizes: Tensor, is_exact: bool = False) -> Tensor: ...


class Kernels(Protocol):
    """The functions of `ops/direct.py`: products of float32 rows with packed weights."""

    def linear(
        self, weight: LinearWeight, x: Tensor, is_exact: bool = False, step: ops.FlatRows | None = None,
        adapters: AdapterLayout | None = None,
    ) -> Tensor: ...  # fmt: skip

    def gate_up(
        self, weight: GateUpWeight, x: Tensor, activation: str, is_exact: bool = False,
        step: ops.FlatRows | None = None, adapters: AdapterLayout | None = None,
    ) -> Tensor: ...  # fmt: skip

    def embed(self, weight: LinearWeight, ids: Tensor, factor: float = 1.0) -> Tensor: ...

    def experts(
        self, weight: ExpertsWeight, x: Tensor, ids: Tensor, weights: Tensor, activation: str = "silu",
        clamped: ClampedGate | None = None, is_exact: bool = False,
    ) -> Tensor: ...  # fmt: skip

    def stack(self, weights: Sequence[LinearWeight]) -> Stack: ...


class Paged(Protocol):
    """Attention over a cache; see `ops/paged.py`."""

    def begin(self, batch: ops.FlatRows, visible_until: Tensor | None = None) -> None: ...

    def run(
        self, layer: Any, q: Tensor, k: Tensor | None, v: Tensor | None, spec: ops.AttentionSpec
    ) -> Tensor: ...


class Pool(Protocol):
    """The keys and values of all layers; see `ops/kv.py`."""

    @property
    def layers(self) -> Sequence[Any]: ...

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None: ...

    def stop_supply(self) -> None: ...


class Backend(Protocol):
    """A device, as far as modules need it.

    Attributes:
        device: Where activations are.
        kernels: Products with packed weights.
        has_row_kernels: Whether norms and activations have native kernels, with a row's bits its own.
        attention_size: Queries times keys in a piece of a vision tower's attention.
        served_kv: Type of keys and values that native attention kernels read; None: float32, too.
    """

    @property
    def device(self) -> torch.device: ...
    @property
    def kernels(self) -> Kernels: ...
    @property
    def has_row_kernels(self) -> bool: ...
    @property
    def attention_size(self) -> int: ...
    @property
    def served_kv(self) -> ops.KvDtype | None: ...

    def pool(
        self, shapes: Sequence[HeadShape], *, num_blocks: int, block_size: int, dtype: ops.KvDtype
    ) -> Pool:
        """Return memory for keys and values, with one block table for all layers.

        Any device has float32, for self-checks.
        """

    def paged(self, max_context: int) -> Paged:
        """Return attention over such a pool, for sequences of up to `max_context` tokens."""

    def computing(self) -> AbstractContextManager[None]:
        """Return the context in which a step is computed."""

    def take(self, model: nn.Module) -> None:
        """Bring what the module keeps in torch's tensors to the device."""

    def wait(self) -> None:
        """Wait until the device has done everything called so far."""

    def fetch(self, rows: Tensor) -> Tensor:
        """Return rows in the host's memory."""


class CpuBackend:
    """The CPU and its thread team."""

    device = torch.device("cpu")
    kernels: Kernels = direct
    has_row_kernels = True
    # All queries of a tile of 1,024 patches (12 heads of 64) take 11 ms on two cores. A photo of 12
    # megapixels has 60,000 patches in Qwen2-VL, which would take a minute per layer in one piece.
    attention_size = 1 << 20
    served_kv = None

    def pool(
        self, shapes: Sequence[HeadShape], *, num_blocks: int, block_size: int, dtype: ops.KvDtype
    ) -> ops.KvPool:
        """Return a pool; see `Backend.pool`."""
        return ops.KvPool(shapes, num_blocks=num_blocks, block_size=block_size, dtype=dtype)

    def paged(self, max_context: int) -> PagedAttention:
        """Return native attention; see `Backend.paged`."""
        return PagedAttention(max_context=max_context)

    def computing(self) -> AbstractContextManager[None]:
        """Let the team's threads wait for the next product without sleeping."""
        return ops.keep_threads_awake()

    def take(self, model: nn.Module) -> None:
        """Do nothing: the module is in this memory."""

    def wait(self) -> None:
        """Do nothing: a call returns when it is done."""

    def fetch(self, rows: Tensor) -> Tensor:
        """Return the rows themselves."""
        return rows


class CudaBackend:
    """A GPU. Products read weights that `arithmetic` has made."""

    has_row_kernels = False
    attention_size = 1 << 28

    def __init__(self, arithmetic: Repacking) -> None:
        self.device = arithmetic.device
        self.kernels: Kernels = CudaDirect(arithmetic.dtype)
        self.served_kv: ops.KvDtype = "float16" if arithmetic.dtype is torch.float16 else "bfloat16"
        # Products and convolutions of float32 keep its precision, whatever the environment says.
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        # cuDNN's attention makes a plan for each new shape, in tens of milliseconds, and keeps it for good.
        torch.backends.cuda.enable_cudnn_sdp(False)

    def pool(
        self, shapes: Sequence[HeadShape], *, num_blocks: int, block_size: int, dtype: ops.KvDtype
    ) -> DeviceKvPool:
        """Return a pool; see `Backend.pool`."""
        kind: torch.dtype = getattr(torch, dtype)
        return DeviceKvPool(
            shapes, num_blocks=num_blocks, block_size=block_size, dtype=kind, device=self.device
        )

    def paged(self, max_context: int) -> CudaPagedAttention:
        """Return attention by kernels, or by torch; see `Backend.paged`."""
        return CudaPagedAttention(self.device)

    def computing(self) -> AbstractContextManager[None]:
        """Do nothing: the team has nothing to compute."""
        return nullcontext()

    def take(self, model: nn.Module) -> None:
        """Move parameters, buffers, other tensors and rotary tables; native modules have moved theirs."""
        moved: dict[Tensor, Tensor] = {}  # tied tensors stay one
        for module in model.modules():
            if isinstance(forward := module.__dict__.get("forward"), RotaryLookup):
                forward.move(self.device)
            tensors: list[dict[str, Any]] = [module._parameters, module._buffers, module.__dict__]
            for held in tensors:
                for name, value in list(held.items()):
                    if isinstance(value, Tensor) and not value.is_meta and value.device != self.device:
                        if value not in moved:
                            moved[value] = _moved(value, self.device)
                        held[name] = moved[value]

    def wait(self) -> None:
        """Wait for the stream; see `Backend.wait`."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def fetch(self, rows: Tensor) -> Tensor:
        """Copy through pinned memory, which torch keeps: 128 rows of 150,000 logits are 77 MB."""
        if self.device.type != "cuda":
            return rows.cpu()
        host = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
        host.copy_(rows, non_blocking=True)
        self.wait()
        return host


def _moved(value: Tensor, device: torch.device) -> Tensor:
    moved = value.detach().to(device)
    return nn.Parameter(moved, requires_grad=False) if isinstance(value, nn.Parameter) else moved


def backend_of(arithmetic: ops.Arithmetic) -> Backend:
    """Return the device that computes with weights of this arithmetic."""
    return CudaBackend(arithmetic) if isinstance(arithmetic, Repacking) else CpuBackend()
