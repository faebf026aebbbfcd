"""A paged cache on an emulated device, sequences scattered over it, and the reference for attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.emulation.device import TYPES, Device
from tests.reference.compare import assert_within


@dataclass(frozen=True, slots=True)
class Shape:
    """The parameters of an attention case."""

    contexts: Sequence[int]
    queries: Sequence[int]  # per sequence
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    block_size: int = 16
    window: int = 0
    dtype: torch.dtype = torch.bfloat16
    kv_dtype: torch.dtype | None = None  # None: dtype
    magnitude: float = 1.0  # of queries: the spread of the scores
    soft_cap: float = 0.0
    sinks: float | None = None  # of the middle head; heads differ
    has_slopes: bool = False


def random_shape(max_context: int, *, is_decode: bool) -> Shape:
    """Generate a shape with torch's generator: windows, caps, sinks and slopes in any combination."""

    def pick(*choices: Any) -> Any:
        return choices[int(torch.randint(len(choices), ()))]

    contexts = [int(torch.randint(1, max_context, ())) for _ in range(pick(1, 2, 5))]
    queries = [1 if is_decode else int(torch.randint(1, context + 1, ())) for context in contexts]
    num_kv_heads = pick(1, 2, 3)
    return Shape(
        contexts, queries, num_heads=num_kv_heads * pick(1, 2, 5, 8), num_kv_heads=num_kv_heads,
        head_dim=pick(64, 64, 80, 128), block_size=pick(16, 32), window=pick(0, 1, 7, 16, 100),
        dtype=pick(torch.bfloat16, torch.float16), magnitude=pick(1.0, 20.0), soft_cap=pick(0.0, 3.0, 30.0),
        sinks=pick(None, 0.0, 6.0), has_slopes=pick(False, True),
    )  # fmt: skip


class PagedCase:
    """Random queries, keys and values of a shape, on the device; blocks that no sequence owns are forbidden.

    Blocks that no query's window reaches, and their entries in the block table, are forbidden as well.
    """

    def __init__(self, device: Device, shape: Shape) -> None:
        self.device, self.shape = device, shape
        size, kv_dtype = shape.block_size, shape.kv_dtype or shape.dtype
        self.counts = [-(-context // size) for context in shape.contexts]
        num_blocks = sum(self.counts) + 3
        order = torch.randperm(num_blocks)[: sum(self.counts)].int()
        columns = max(self.counts, default=0) + 1
        self.block_table = device.empty((len(shape.contexts), columns), torch.int32)
        pool_shape = (num_blocks, 2, shape.num_kv_heads, size, shape.head_dim)
        self.kv = device.empty(pool_shape, kv_dtype)
        self.kv_scales = (0.5, 2.0) if kv_dtype is torch.float8_e4m3fn else (1.0, 1.0)
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        first = 0
        for index, (context, count) in enumerate(zip(shape.contexts, self.counts, strict=True)):
            blocks = order[first : first + count]
            first += count
            self.block_table[index, :count] = blocks
            device.forbid(self.block_table[index, count:])
            self._fill(blocks.long(), context)
            first_seen = context - shape.queries[index] + 1 - shape.window if shape.window else 0
            behind = max(first_seen, 0) // size
            device.forbid(self.block_table[index, :behind])
            for block in blocks[:behind].tolist():
                device.forbid(self.kv[block])
        owned = set(order.tolist())
        for block in range(num_blocks):
            if block not in owned:
                device.forbid(self.kv[block])
        num_tokens = sum(shape.queries)
        self.q = device.tensor(
            (torch.randn(num_tokens, shape.num_heads, shape.head_dim) * shape.magnitude).to(shape.dtype)
        )
        self.out = device.empty(self.q.shape, shape.dtype)
        starts = torch.tensor([0, *shape.queries]).cumsum(0).int()
        self.query_start = device.tensor(starts)
        self.context_len = device.tensor(torch.tensor(shape.contexts, dtype=torch.int32))
        self.sinks = self.slopes = None
        if shape.sinks is not None:
            self.sinks = device.constant(torch.randn(shape.num_heads) + shape.sinks)
        if shape.has_slopes:
            self.slopes = device.constant(2.0 ** -(1 + torch.arange(shape.num_heads) / 2))

    def _fill(self, blocks: Tensor, context: int) -> None:
        shape, size = self.shape, self.shape.block_size
        both = torch.randn(2, context, shape.num_kv_heads, shape.head_dim)
        both[1] += 1  # otherwise the mean of many values would be 0
        stored = torch.stack([both[0] / self.kv_scales[0], both[1] / self.kv_scales[1]]).to(self.kv.dtype)
        for token in range(context):
            self.kv[blocks[token // size], :, :, token % size] = stored[:, token]
        if len(blocks):  # slots past the context
            for plane in range(2):
                for head in range(shape.num_kv_heads):
                    rest = self.kv[blocks[-1], plane, head, (context - 1) % size + 1 :]
                    if rest.numel():
                        self.device.forbid(rest)
        wide = stored.double()
        self.keys.append(wide[0] * self.kv_scales[0])
        self.values.append(wide[1] * self.kv_scales[1])

    def params(self, **changes: object) -> dict[str, Any]:
        shape = self.shape
        return {
            "q": self.q, "kv": self.kv, "query_start": self.query_start, "context_len": self.context_len,
            "block_table": self.block_table, "out": self.out, "plan": None, "workspace": None,
            "sinks": self.sinks, "slopes": self.slopes, "soft_cap": shape.soft_cap,
            "num_tokens": self.q.shape[0], "num_sequences": len(shape.contexts),
            "max_query_len": max(shape.queries, default=0), "num_heads": shape.num_heads,
            "num_kv_heads": shape.num_kv_heads, "head_dim": shape.head_dim, "num_blocks": self.kv.shape[0],
            "block_size": shape.block_size, "block_table_stride": self.block_table.shape[1],
            "window": shape.window, "scale": shape.head_dim**-0.5, "key_scale": self.kv_scales[0],
            "value_scale": self.kv_scales[1], "type": TYPES[shape.dtype], "kv_type": TYPES[self.kv.dtype],
            **changes,
        }  # fmt: skip

    def expected(self) -> Tensor:
        """Compute attention in float64: [num_tokens, num_heads, head_dim]."""
        shape = self.shape
        group = shape.num_heads // shape.num_kv_heads
        out = torch.zeros(self.q.shape, dtype=torch.float64)
        row = 0
        for context, queries, key, value in zip(
            shape.contexts, shape.queries, self.keys, self.values, strict=True
        ):
            for i in range(queries):
                stop = context - queries + i + 1
                first = max(stop - shape.window, 0) if shape.window else 0
                if stop > first:
                    q = self.q[row].double().view(shape.num_kv_heads, group, -1)
                    scores = torch.einsum("kgd,tkd->kgt", q, key[first:stop]) * shape.head_dim**-0.5
                    weights = self._weights(scores.flatten(0, 1)).view(scores.shape)
                    seen = torch.einsum("kgt,tkd->kgd", weights, value[first:stop])
                    out[row] = seen.reshape(shape.num_heads, -1)
                row += 1
        return out

    def _weights(self, scores: Tensor) -> Tensor:
        """Return the weights of scores [num_heads, num_keys], the last of which is the query's own key."""
        keys = scores.shape[1]
        if self.shape.soft_cap:
            scores = self.shape.soft_cap * (scores / self.shape.soft_cap).tanh()
        if self.slopes is not None:
            scores = scores + self.slopes.double()[:, None] * torch.arange(1 - keys, 1)
        if self.sinks is None:
            return scores.softmax(-1)
        joined = torch.cat([scores, self.sinks.double()[:, None]], 1)
        return joined.softmax(-1)[:, :keys]


# Relative to the whole tensor: results are rounded once, and weights once before their product with the
# values.
_TOLERANCE = {torch.bfloat16: 5e-3, torch.float16: 7e-4}


def assert_attended(case: PagedCase) -> None:
    """Compare a case's output with the reference, as a whole and at its worst element."""
    limit = _TOLERANCE[case.shape.dtype]
    assert_within(case.out, case.expected(), whole=limit, worst=4 * limit)
