"""An emulated device: its memory as torch tensors, its operators by name, and its fault reports."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from tests.emulation.structs import params_struct

_STRUCTS = {
    "begin_step": "BeginStepParams",
    "embed": "EmbedParams",
    "norm": "NormParams",
    "activate": "ActivateParams",
    "rope_kv_write": "RopeParams",
    "attention_plan": "AttentionParams",
    "attention_decode": "AttentionParams",
    "attention_prefill": "AttentionParams",
    "attention_gather": "AttentionGatherParams",
    "attention_merge": "AttentionMergeParams",
    "linear": "LinearParams",
    "quant_linear": "QuantLinearParams",
    "dequantise": "DequantiseParams",
    "quantise": "QuantiseParams",
    "lora_down": "LoraDownParams",
    "lora_up": "LoraUpParams",
    "route": "RouteParams",
    "experts_plan": "ExpertsPlanParams",
    "experts_product": "ExpertsProductParams",
    "experts_sum": "ExpertsSumParams",
    "residual_add": "ResidualAddParams",
    "gated_add": "GatedAddParams",
    "sample": "SampleParams",
    "draft_slots": "DraftSlotsParams",
    "accept_drafts": "DraftSlotsParams",
    "token_logprobs": "TokenLogprobsParams",
}
_SEEDS = (1, 2)
_USED_BY_HOST: set[Path] = set()
TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float8_e4m3fn: 2}


class KernelFault(AssertionError):
    """Raised when a kernel does something that CUDA forbids, or its result depends on the thread order."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


class Device:
    """An emulated device.

        device = Device(library.build())
        x = device.tensor(torch.randn(3, 64))
        out = device.empty((3, 64), torch.bfloat16)
        device.run("norm", [out], x=x, out=out, ...)

    All its memory is initialised with bytes of 0xff, NaN in every type.
    """

    def __init__(self, library: Path) -> None:
        self._path = library
        self.library = ctypes.CDLL(str(library))
        self.library.emu_allocate.restype = ctypes.c_void_p
        self.library.emu_allocate.argtypes = [ctypes.c_size_t]
        self.library.emu_forbid.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_bool]
        self.library.emu_make_constant.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        self.library.emu_seed.argtypes = [ctypes.c_uint64]
        self.library.emu_reports.restype = ctypes.c_char_p
        self.library.emu_allow_host.argtypes = [ctypes.c_bool]
        self.library.emu_attention_workspace_bytes.restype = ctypes.c_int64
        self.library.emu_sample_workspace_bytes.restype = ctypes.c_int64
        self.library.emu_experts_max_tiles.restype = ctypes.c_int64
        for name, struct in _STRUCTS.items():
            size = getattr(self.library, f"emu_size_{name}")
            size.restype = ctypes.c_size_t
            assert size() == ctypes.sizeof(params_struct(struct)), f"{struct} was not read right"

    def attention_workspace_bytes(self, *sizes: int) -> int:
        """Return the workspace size of decode attention; `sizes` are named in csrc/cuda/kernels.h."""
        return int(self.library.emu_attention_workspace_bytes(*map(ctypes.c_int64, sizes)))

    def sample_workspace_bytes(self, num_rows: int) -> int:
        """Return the workspace size for sampling this many rows."""
        return int(self.library.emu_sample_workspace_bytes(ctypes.c_int64(num_rows)))

    def experts_max_tiles(self, num_pairs: int, num_experts: int, is_streamed: bool) -> int:
        """Return the maximum number of tiles of a plan of routed experts."""
        sizes = (ctypes.c_int64(num_pairs), ctypes.c_int64(num_experts), ctypes.c_bool(is_streamed))
        return int(self.library.emu_experts_max_tiles(*sizes))

    def allow_host(self) -> None:
        """Let kernels use the host's memory, whose state is not tracked, except those that `launch` runs.

        It holds for all users of the library in this process: for code built on its kernels.
        """
        _USED_BY_HOST.add(self._path)
        self.library.emu_allow_host(True)

    def reset(self) -> None:
        """Free all tensors."""
        self.library.emu_reset()

    def close(self) -> None:
        """Unmap the device's memory: of the tensors, which are gone, and of its threads' stacks.

        A stack and its guard are two mappings; the devices of all planted faults would exceed the kernel's
        65,530 mappings a process.
        """
        self.library.emu_close()

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Allocate a tensor filled with NaN bytes."""
        count = 1
        for size in shape:
            count *= size
        num_bytes = count * dtype.itemsize
        address = self.library.emu_allocate(num_bytes)
        assert address, "the device's memory is full"
        if num_bytes == 0:
            return torch.empty(tuple(shape), dtype=dtype)
        memory = (ctypes.c_uint8 * num_bytes).from_address(address)
        return torch.frombuffer(memory, dtype=torch.uint8).view(dtype).view(tuple(shape))

    def tensor(self, values: Tensor) -> Tensor:
        """Copy a tensor to the device."""
        out = self.empty(values.shape, values.dtype)
        out.copy_(values)
        return out

    def constant(self, values: Tensor) -> Tensor:
        """Copy a tensor that kernels may read before their wait, as they may read weights."""
        out = self.tensor(values)
        self.library.emu_make_constant(out.data_ptr(), out.nbytes)
        return out

    def forbid(self, part: Tensor, is_forbidden: bool = True) -> None:
        """Report any access to this contiguous part of a tensor."""
        assert part.is_contiguous()
        self.library.emu_forbid(part.data_ptr(), part.nbytes, is_forbidden)

    def run(self, name: str, outputs: Sequence[Tensor], **params: Any) -> None:
        """Run an operator under two schedules, from the same outputs, and require bit-identical results.

        Raises:
            KernelFault: if a kernel made a forbidden access, or the results differ.
        """
        before = [output.clone() for output in outputs]
        results = []
        for seed in _SEEDS:
            for output, start in zip(outputs, before, strict=True):
                output.copy_(start)
            self.launch(name, seed, **params)
            results.append([_bytes(output).clone() for output in outputs])
        for first, second in zip(*results, strict=True):
            if not torch.equal(first, second):
                raise KernelFault("order", f"{name}: two schedules give two results")

    def launch(self, name: str, seed: int = 1, **params: Any) -> None:
        """Run an operator once.

        Raises:
            KernelFault: if a kernel made a forbidden access.
        """
        struct = fill(params_struct(_STRUCTS[name])(), params)
        self.library.emu_seed(seed)
        self.library.emu_allow_host(False)
        status = getattr(self.library, f"emu_{name}")(ctypes.byref(struct))
        self.library.emu_allow_host(self._path in _USED_BY_HOST)
        reports = self.library.emu_reports().decode().splitlines()
        if reports:
            lines = [self._describe(line) for line in reports]
            raise KernelFault(reports[0].partition("|")[0], f"{name}, seed {seed}:\n" + "\n".join(lines))
        assert status == 0, f"{name} was refused"

    def _describe(self, line: str) -> str:
        kind, offset, text = line.split("|", 2)
        place = subprocess.run(
            ["addr2line", "-i", "-e", str(self._path), hex(max(int(offset, 16) - 1, 0))],
            capture_output=True,
            text=True,
        ).stdout.split()
        return f"  {kind}: {text} ({' in '.join(Path(part).name for part in place[:3])})"


def fill(struct: ctypes.Structure, params: dict[str, Any]) -> ctypes.Structure:
    """Set every field of a struct; a field without a value, or a value without a field, is an error."""
    params = dict(params)
    for name, kind in cast("list[tuple[str, Any]]", struct._fields_):
        if issubclass(kind, ctypes.Structure):
            setattr(struct, name, fill(kind(), {key: params.pop(key) for key, *_ in kind._fields_}))
            continue
        value = params.pop(name)
        if issubclass(kind, ctypes.Array):  # the first elements; the others stay zero
            value = kind(*(each.data_ptr() if isinstance(each, Tensor) else each for each in value))
        setattr(struct, name, value.data_ptr() if isinstance(value, Tensor) else value)
    assert not params, f"no such parameters: {', '.join(params)}"
    return struct


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)
