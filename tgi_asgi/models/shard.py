"""Cuts a model into shards: the attention heads, MLP columns and vocabulary ids of each. Without torch.

    9 query heads, 3 KV heads, two shards       queries 0..5 with KV heads 0 and 1 | 6..8 with 2
    2 KV heads for 8 query heads, four shards   queries 0, 1 with KV head 0 | 2, 3 with 0 | 4, 5 with 1 | ...

Matrices that produce heads and inner values are cut by rows, matrices that consume them by columns, in whole
blocks of their format (Shoeybi et al., Megatron-LM, arXiv 1909.08053, section 3).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from tgi_asgi.errors import ModelLoadError

_STRIP = 32  # rows and columns per kernel strip: padding is less than that
_MAX_SHARDS = 64
CUT_COLUMNS = ("self_attn.o_proj", "mlp.down_proj")  # the products of a layer that are cut by columns


@dataclass(frozen=True, slots=True)
class ModelCut:
    """One shard's part of a model.

    Attributes:
        rank, count: The shard's number, and how many there are.
        heads, kv_heads: Query heads, and the KV heads that they read.
        inner: Columns between an MLP's products.
        vocab_ids: Vocabulary ids.
    """

    rank: int
    count: int
    heads: range
    kv_heads: range
    inner: range
    vocab_ids: range


def cut_model(
    count: int, *, num_heads: int, num_kv_heads: int, head_dim: int, intermediate_size: int, vocab_size: int,
    output_block: int = 1, down_block: int = 1,
) -> list[ModelCut]:  # fmt: skip
    """Cut a model into `count` shards, as evenly as possible; the first shards get the remainder.

    Args:
        output_block: Columns per block of the attention output product; blocks cannot be cut.
        down_block: The same for the product of the MLP's inner values.

    Raises:
        ModelLoadError: if there are more shards than parts.
    """
    if not 2 <= count <= _MAX_SHARDS:
        raise ModelLoadError(f"--num-shard must be in 1..{_MAX_SHARDS}, got {count}")
    heads, kv_heads = _cut_heads(count, num_heads, num_kv_heads, head_dim, output_block)
    # Kernels pad columns to strips; parts are whole strips if there are enough.
    unit = math.lcm(down_block, _STRIP) if intermediate_size >= count * _STRIP else down_block
    inner = _split(count, intermediate_size, unit, f"{intermediate_size} columns of the MLP")
    unit = 1 if vocab_size < count * _STRIP else _STRIP
    vocab_ids = _split(count, vocab_size, unit, f"{vocab_size} vocabulary ids")
    parts = zip(heads, kv_heads, inner, vocab_ids, strict=True)
    return [ModelCut(rank, count, *part) for rank, part in enumerate(parts)]


def _cut_heads(
    count: int, num_heads: int, num_kv_heads: int, head_dim: int, block: int
) -> tuple[list[range], list[range]]:
    """Assign each shard KV heads with all their queries, or part of one head's queries if too few."""
    group = num_heads // num_kv_heads
    if count <= num_kv_heads:
        columns = group * head_dim
        unit = math.lcm(columns, block) // columns
        kv_heads = _split(count, num_kv_heads, unit, f"{num_kv_heads} KV heads")
        return [range(part.start * group, part.stop * group) for part in kv_heads], kv_heads
    unit = math.lcm(head_dim, block) // head_dim
    owners = [rank * num_kv_heads // count for rank in range(count)]
    heads = []
    for kv_head in range(num_kv_heads):
        parts = _split(owners.count(kv_head), group, unit, f"{group} query heads of each KV head")
        heads += [range(kv_head * group + part.start, kv_head * group + part.stop) for part in parts]
    if any(part.start * head_dim % block for part in heads):
        raise ModelLoadError(
            f"--num-shard {count}: a KV head's queries end within a block of {block} columns"
        )
    return heads, [range(owner, owner + 1) for owner in owners]


def _split(count: int, size: int, unit: int, what: str) -> list[range]:
    """Split [0, size) into `count` parts of whole units; the last unit may be smaller."""
    units = -(-size // unit)
    if units < count:
        blocks = f", in {units} parts that cannot be cut (of {unit})," if unit > 1 else ""
        raise ModelLoadError(f"{what}{blocks} are too few for {count} shards: lower --num-shard")
    each, extra = divmod(units, count)
    firsts = [(rank * each + min(rank, extra)) * unit for rank in range(count + 1)]
    return [range(first, min(last, size)) for first, last in itertools.pairwise(firsts)]
