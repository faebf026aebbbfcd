"""One layer of attention over a pool, its steps and its expected results, for any device."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.reference.attention import attention as reference
from tests.reference.compare import assert_within
from tests.support.batches import flat_rows, random_blocks
from tests.support.eager_ops import arrays_of
from tests.support.kv import poisoned_pool
from tgi_asgi.ops import AttentionSpec, KvDtype
from tgi_asgi.ops.paged import PagedAttention

DTYPES = ["float32", "bfloat16", "int8"]
TOLERANCES = {"float32": 2e-5, "bfloat16": 1e-2, "float16": 2e-3, "int8": 3e-4}


def rounded_as_cached(x: Tensor, dtype: KvDtype) -> Tensor:
    """Return heads rounded as in a cache of this dtype; int8 has a float16 scale per strip of 32 dims."""
    if dtype != "int8":
        return x.to(getattr(torch, dtype)).float()
    dim = x.shape[-1]
    strips = torch.nn.functional.pad(x, (0, -dim % 32)).unflatten(-1, (-1, 32))
    scale = strips.abs().amax(-1, keepdim=True) / 127
    codes = (strips / scale.clamp_min(1e-30)).round()
    kept: Tensor = (codes * scale.half().float()).flatten(-2)[..., :dim]
    return kept


@dataclass
class Layer:
    """One layer of some shape: computes steps of sequences and their expected results."""

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    dtype: KvDtype
    block_size: int = 16
    rules: dict[str, Any] = field(default_factory=dict)

    @property
    def scale(self) -> float:
        return float(self.head_dim**-0.5)

    def num_blocks(self, contexts: list[int]) -> int:
        return sum(-(-context // self.block_size) for context in contexts) + 2

    def pool(self, contexts: list[int]) -> Any:
        """Return a pool of three layers that holds these sequences, full of NaN."""
        return poisoned_pool(
            num_layers=3, num_blocks=self.num_blocks(contexts), num_kv_heads=self.kv_heads,
            head_dim=self.head_dim, value_dim=self.value_dim, block_size=self.block_size, dtype=self.dtype,
        )  # fmt: skip

    def attention(self, max_context: int) -> Any:
        return PagedAttention(max_context=max_context)

    def heads_of(self, contexts: list[int]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return queries, keys and values of whole sequences."""
        shapes = (
            (self.heads, self.head_dim),
            (self.kv_heads, self.head_dim),
            (self.kv_heads, self.value_dim),
        )
        return [tuple(torch.randn(n, *shape) for shape in shapes) for n in contexts]  # type: ignore[misc]

    def run(
        self,
        given: list[tuple[Tensor, Tensor, Tensor]],
        steps: list[list[tuple[int, int]]],
        visible_until: Tensor | None = None,
    ) -> list[Tensor]:
        """Compute steps; each has a span of every sequence, possibly empty. Return the sequences' rows."""
        contexts = [len(q) for q, _, _ in given]
        pool = self.pool(contexts)
        blocks = random_blocks(contexts, self.num_blocks(contexts), self.block_size)
        attention = self.attention(max(contexts))
        spec = AttentionSpec(self.scale, **arrays_of(self.rules))
        found: list[list[Tensor]] = [[] for _ in given]
        for spans in steps:
            inside = [s for s, (start, stop) in enumerate(spans) if start < stop]
            batch = flat_rows([spans[s] for s in inside], [blocks[s] for s in inside], self.block_size)
            attention.begin(batch, visible_until)
            q, k, v = (torch.cat([given[s][i][slice(*spans[s])] for s in inside]) for i in range(3))
            out = attention.run(pool.layers[1], q, k, v, spec)
            for s, part in zip(inside, out.split([spans[s][1] - spans[s][0] for s in inside]), strict=True):
                found[s].append(part.flatten(1))
        return [torch.cat(parts) for parts in found]

    def expected(self, given: tuple[Tensor, Tensor, Tensor], visible_until: Tensor | None = None) -> Tensor:
        q, k, v = given
        return reference(
            q,
            rounded_as_cached(k, self.dtype),
            rounded_as_cached(v, self.dtype),
            self.scale,
            visible_until=visible_until,
            **self.rules,
        )

    def check(self, contexts: list[int], last: int = 1) -> None:
        """Compare sequences, with their last tokens in a separate step, with the reference."""
        given = self.heads_of(contexts)
        steps = [[(0, n - last) for n in contexts], [(n - last, n) for n in contexts]]
        found = torch.cat(self.run(given, steps))
        tolerance = TOLERANCES[self.dtype]
        assert_within(
            found, torch.cat([self.expected(each) for each in given]), whole=tolerance, worst=2 * tolerance
        )


# Heads, KV heads, dims of keys and of values, block size.
SHAPES = [
    (9, 3, 64, 64, 16),
    (4, 2, 80, 80, 32),
    (4, 1, 192, 128, 64),
    (2, 2, 96, 256, 16),
    (2, 1, 512, 512, 32),
    (2, 2, 288, 352, 16),
]
NARROW = [(1, 1, 16, 16, 16), (3, 1, 6, 2, 16), (6, 2, 24, 40, 64), (3, 3, 20, 52, 32), (2, 1, 50, 18, 16)]
RULES: dict[str, dict[str, Any]] = {
    "all": {},
    "window": {"window": 70},
    "chunk": {"chunk": 48},
    "chunk and window": {"chunk": 300, "window": 64},
    "soft cap": {"soft_cap": 1.5},
    "sinks": {"sinks": torch.tensor([1.0, -2.0, 30.0, -torch.inf])},
    "slopes": {"slopes": torch.tensor([0.5, 0.25, 0.125, 1.0])},
    "everything": {
        "window": 300, "chunk": 512, "soft_cap": 2.0, "sinks": torch.tensor([1.0, -2.0, 0.0, 3.0]),
        "slopes": torch.tensor([0.01, 0.5, 0.1, 0.0]),
    },
}  # fmt: skip
