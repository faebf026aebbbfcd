"""Operators applied to tensors: each call records and runs a program of one operator.

Names and arguments are those of `tgi_asgi.ops`, with tensors for arrays, because the references compute with
tensors. `batch` is the step, for operators that read or write a cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.support.open_program import OpenProgram
from tgi_asgi import ops
from tgi_asgi.ops import Cache, FlatRows, GateUpWeight, LinearWeight, NormWeight, QkvWeight, RopeTable, Value
from tgi_asgi.ops.recorder import Kind


def norm_weight(weight: Tensor, eps: float, bias: Tensor | None = None) -> NormWeight:
    return NormWeight(weight.numpy(), eps, array_of(bias))


def array_of(tensor: Tensor | None) -> Any:
    """Return a tensor as the array that `ops` takes, or None."""
    return None if tensor is None else tensor.contiguous().numpy()


def arrays_of(given: dict[str, Any]) -> dict[str, Any]:
    """Return arguments with tensors as arrays."""
    return {name: array_of(each) if isinstance(each, Tensor) else each for name, each in given.items()}


@dataclass(frozen=True)
class Samples:
    """A `SampleResult` of tensors."""

    token_ids: Tensor
    is_finite: Tensor
    logprobs: Tensor
    top_ids: Tensor
    top_logprobs: Tensor
    num_top: Tensor
    is_accepted: Tensor | None


def sample(logits: Tensor, state: ops.SampleState, slots: Sequence[int], **given: Any) -> Samples:
    return samples_of(ops.sample(logits.numpy(), state, slots, **given))


def samples_of(found: ops.SampleResult) -> Samples:
    tensors: Any = [None if each is None else torch.from_numpy(each) for each in astuple(found)]
    return Samples(*tensors)


def token_logprobs(logits: Tensor, token_ids: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the log-probabilities, and the ids and log-probabilities of the top tokens."""
    found = ops.token_logprobs(logits.numpy(), token_ids.numpy(), num_top)
    return (*map(torch.from_numpy, astuple(found)),)  # type: ignore[return-value]


def activation(x: Tensor) -> Tensor:
    return _run(lambda _, x: ops.activation(x), (x, Kind.RESIDUAL))


def linear_of_columns(rows: Tensor, columns: int, weight: LinearWeight) -> Tensor:
    """Return the product of the first columns of rows."""
    return _run(lambda _, x: ops.linear(ops.activation(x, columns), weight), (rows, Kind.ROWS))


def norm(x: Tensor, weight: NormWeight, kind: Kind = Kind.RESIDUAL) -> Tensor:
    return _run(lambda _, x: ops.norm(x, weight), (x, kind))


def norm_in_place(x: Tensor, weight: NormWeight, first_column: int | None = None) -> Tensor:
    kind = Kind.RESIDUAL if first_column is None else Kind.ROWS
    return _run(lambda _, x: ops.norm_in_place(x, weight, first_column), (x, kind))


def norm_add(rows: Tensor, weight: NormWeight, x: Tensor, factor: float = 1.0) -> Tensor:
    return _run(
        lambda _, rows, x: ops.norm_add(rows, weight, x, factor), (rows, Kind.ROWS), (x, Kind.RESIDUAL)
    )


def linear(a: Tensor, weight: LinearWeight) -> Tensor:
    return _run(lambda _, a: ops.linear(a, weight), (a, Kind.ACTIVATION))


def linear_add(a: Tensor, weight: LinearWeight, x: Tensor, factor: float = 1.0) -> Tensor:
    return _run(
        lambda _, a, x: ops.linear_add(a, weight, x, factor), (a, Kind.ACTIVATION), (x, Kind.RESIDUAL)
    )


def up(a: Tensor, weight: LinearWeight, activation: str, alphas: tuple[float, float] | None = None) -> Tensor:
    return _run(lambda _, a: ops.up(a, weight, activation, alphas), (a, Kind.ACTIVATION))


def gate_up(a: Tensor, weight: GateUpWeight, activation: str = "silu") -> Tensor:
    return _run(lambda _, a: ops.gate_up(a, weight, activation), (a, Kind.ACTIVATION))


def gated_add(rows: Tensor, gate: Tensor, x: Tensor, factor: float = 1.0) -> Tensor:
    return _run(
        lambda _, rows, gate, x: ops.gated_add(rows, gate, x, factor),
        (rows, Kind.ROWS), (gate, Kind.ROWS), (x, Kind.RESIDUAL),
    )  # fmt: skip


def head(x: Tensor, norm: NormWeight, weight: LinearWeight, **options: float) -> Tensor:
    return _run(lambda _, x: ops.head(x, norm, weight, **options), (x, Kind.RESIDUAL))


def embed(
    batch: FlatRows, table: LinearWeight, factor: float = 1.0, positions: Tensor | None = None
) -> Tensor:
    return _run(lambda recorder: ops.embed(recorder.batch, table, factor, array_of(positions)), batch=batch)


def qkv(
    a: Tensor,
    weight: QkvWeight,
    cache: Cache,
    rope: RopeTable | None,
    batch: FlatRows | None = None,
    clip: float | None = None,
    query_scales: Tensor | None = None,
) -> Tensor:
    return _run(
        lambda _, a: ops.qkv(a, weight, cache, rope, clip, array_of(query_scales)),
        (a, Kind.ACTIVATION),
        batch=batch,
    )


def attention(
    q: Tensor,
    cache: Cache,
    scale: float,
    *,
    batch: FlatRows,
    rotary_dim: int | None = None,
    gate: Tensor | None = None,
    **rules: Any,
) -> Tensor:
    """Compute attention for rotated q [n_tokens, num_heads * head_dim]; `rotary_dim` is the keys'."""
    spec = ops.AttentionSpec(scale, **arrays_of(rules))

    def attend(_: ops.Recorder, q: ops.Value, gate: ops.Value | None = None) -> ops.Value:
        return ops.attention(q, cache, spec, gate=gate)

    gates = [] if gate is None else [(gate, Kind.ROWS)]
    return _run(attend, (q, Kind.QUERY), *gates, batch=batch, rotary_dim=rotary_dim)


def _run(
    operator: Callable[..., Value],
    *inputs: tuple[Tensor, Kind],
    batch: FlatRows | None = None,
    rotary_dim: int | None = None,
) -> Tensor:
    """Record `operator(recorder, *values)`, run it and return its output; the inputs stay unchanged."""
    recorder = ops.Recorder()
    values = [recorder.value(kind, tensor.shape[1]) for tensor, kind in inputs]
    out = operator(recorder, *values)
    batch = step(len(inputs[0][0])) if batch is None else batch
    num_tokens = len(batch.ids)
    assert all(len(tensor) == num_tokens and tensor.dtype is torch.float32 for tensor, _ in inputs)
    room = max(num_tokens, 1)
    num_sequences, max_context = max(len(batch.context_len), 1), max([1, *batch.context_len])
    limits = ops.StepLimits(
        max_tokens=room, max_sequences=num_sequences, max_rows=room, max_context=max_context
    )
    program = OpenProgram(recorder, limits, inputs=values, outputs=[out], rotary_dim=rotary_dim)
    for value, (tensor, _) in zip(values, inputs, strict=True):
        program.write(value, tensor.numpy())
    logits = program.run(batch, range(num_tokens) if out.kind is Kind.LOGITS else ())
    rows = logits.copy() if out.kind is Kind.LOGITS else program.read(out, num_tokens)
    return torch.from_numpy(rows)


def step(num_tokens: int, num_sampled: int = 0) -> FlatRows:
    """Return a step for operators that only use its tokens; the first `num_sampled` were sampled."""
    zeros = np.zeros(num_tokens, np.int32)
    starts = sorted({0, num_sampled, num_tokens})
    lengths = np.diff(starts)
    return FlatRows(
        ids=zeros, positions=zeros, slots=zeros.astype(np.int64), query_start=np.array(starts),
        context_len=lengths, block_table=np.zeros((len(lengths), 1), np.int32), num_generated=num_sampled,
    )  # fmt: skip
