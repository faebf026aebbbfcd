"""Operators outside a recording: each call is a program of one operator, on the same kernels."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from tgi_asgi._C import FlatRows
from tgi_asgi.ops.recorder import Recorder
from tgi_asgi.ops.values import Kind, Value


def at_once(
    operator: Callable[..., Value], *inputs: tuple[Tensor, Kind], batch: FlatRows | None = None
) -> Tensor:
    """Run `operator(recorder, *values)` on tensors [n_tokens, columns] float32; return its result as one.

    A residual that it adds to is written to in place.

    Raises:
        ValueError: the tensors are of different numbers of tokens, or what the step itself refuses.
    """
    from tgi_asgi.ops.cpu_program import CpuProgram

    tensors = [tensor for tensor, _ in inputs]
    if any(tensor.dim() != 2 or tensor.dtype is not torch.float32 for tensor in tensors):
        raise ValueError("operands must be float32 [n_tokens, columns]")
    sizes = {int(tensor.shape[0]) for tensor in tensors} | ({len(batch.ids)} if batch is not None else set())
    if len(sizes) != 1:
        raise ValueError(f"operands must be all of the same number of tokens, not of {sorted(sizes)}")
    num_tokens = sizes.pop()
    recorder = Recorder()
    values = [recorder.value(kind, int(tensor.shape[1])) for tensor, kind in inputs]
    out = operator(recorder, *values)
    if num_tokens == 0:
        added = (tensor for value, tensor in zip(values, tensors, strict=True) if out.root is value)
        return next(added, torch.empty(0, out.columns))
    batch = _no_cache(num_tokens) if batch is None else batch
    program = CpuProgram(
        recorder, max_tokens=num_tokens, max_sequences=len(batch.context_len), max_rows=num_tokens,
        max_context=int(max(batch.context_len)), inputs=values, outputs=[out],
    )  # fmt: skip
    for value, tensor in zip(values, tensors, strict=True):
        program.write(value, tensor)
    program.run(batch, range(num_tokens) if out.kind is Kind.LOGITS else ())
    for value, tensor in zip(values, tensors, strict=True):
        if out.root is value:
            return tensor.copy_(program.read(out, num_tokens))
    return program.read(out, num_tokens)


def _no_cache(num_tokens: int) -> FlatRows:
    """Return a batch for operators that need nothing of it."""
    zeros = np.zeros(num_tokens, np.int32)
    return FlatRows(
        ids=zeros, positions=zeros, slots=zeros.astype(np.int64), query_start=np.array([0, num_tokens]),
        context_len=np.array([num_tokens]), block_table=np.zeros((1, 1), np.int32),
    )  # fmt: skip
