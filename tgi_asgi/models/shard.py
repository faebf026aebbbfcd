"""Cuts a model into shards: the attention heads, inner columns and vocabulary ids of each. Without torch.

    9 query heads, 3 KV heads, two shards       queries 0..5 with KV heads 0 and 1 | 6..8 with 2
    2 KV heads for 8 query heads, four shards   queries 0, 1 with KV head 0 | 2, 3 with 0 | 4, 5 with 1 | ...

Matrices that produce heads and inner values are cut by rows, matrices that consume them by columns, in whole
blocks of their format (Shoeybi et al., Megatron-LM, arXiv 1909.08053, section 3).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import NamedTuple

from tgi_asgi.errors import ModelLoadError

_STRIP = 32  # rows and columns per kernel strip: padding is less than that
_MAX_SHARDS = 64
# The products of a layer that are cut by columns, but for those of experts, whose codes are held in order.
CUT_COLUMNS = (
    "self_attn.o_proj", "mlp.down_proj", "mlp.shared_experts.down_proj", "shared_mlp.output_linear",
    "shared_mlp.down_proj",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ModelCut:
    """One shard's part of a model.

    Attributes:
        rank, count: The shard's number, and how many there are.
        heads, kv_heads: Query heads, and the KV heads that they read.
        inner: Columns between an MLP's products; empty if no layer has an MLP.
        of_expert: The same of each expert; empty if no layer has experts.
        of_shared: The same of the MLP that all tokens use besides the experts.
        vocab_ids: Vocabulary ids.
    """

    rank: int
    count: int
    heads: range
    kv_heads: range
    inner: range
    of_expert: range
    of_shared: range
    vocab_ids: range


class Columns(NamedTuple):
    """A number of columns, of which `block` must stay together: they are a block of the weight's format."""

    number: int
    block: int = 1


NO_COLUMNS = Columns(0)


def cut_model(
    count: int, *, num_heads: int, num_kv_heads: int, head_dim: int, vocab_size: int, inner: Columns,
    of_expert: Columns = NO_COLUMNS, of_shared: Columns = NO_COLUMNS, output_block: int = 1,
) -> list[ModelCut]:  # fmt: skip
    """Cut a model into `count` shards, as evenly as possible; the first shards get the remainder.

    Args:
        inner, of_expert, of_shared: As in `ModelCut`; `NO_COLUMNS` if the model has no such columns.
        head_dim: Columns of the attention output product that belong to a head.
        output_block: Columns per block of that product; blocks cannot be cut.

    Raises:
        ModelLoadError: if there are more shards than parts.
    """
    if not 2 <= count <= _MAX_SHARDS:
        raise ModelLoadError(f"--num-shard must be in 1..{_MAX_SHARDS}, got {count}")
    heads, kv_heads = _cut_heads(count, num_heads, num_kv_heads, head_dim, output_block)
    columns = [
        _cut_columns(count, each, f"columns of {what}")
        for each, what in ((inner, "the MLP"), (of_expert, "each expert"), (of_shared, "the shared expert"))
    ]
    vocab_ids = _cut_columns(count, Columns(vocab_size), "vocabulary ids")
    parts = zip(heads, kv_heads, *columns, vocab_ids, strict=True)
    return [ModelCut(rank, count, *part) for rank, part in enumerate(parts)]


def _cut_columns(count: int, columns: Columns, what: str) -> list[range]:
    """Split columns into parts of whole blocks, which are whole strips if there are enough of these."""
    number, block = columns
    if number == 0:
        return [range(0)] * count
    unit = math.lcm(block, _STRIP) if number >= count * _STRIP else block
    return _split(count, number, unit, f"{number} {what}")


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
