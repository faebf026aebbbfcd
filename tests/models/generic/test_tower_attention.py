"""A tower's attention on native kernels: against torch's in float64, in pieces, and what is left to torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.reference.compare import assert_within
from tgi_asgi import _C, ops
from tgi_asgi.models.generic.vision.tower_attention import TowerAttention

_HEADS = {"query": 4, "key": 2, "value": 2}
TOLERANCES: dict[ops.KvDtype, float] = {"float32": 2e-6, "bfloat16": 1e-2}


def heads(count: int, num_tokens: int, dim: int) -> Tensor:
    """Return heads [1, count, num_tokens, dim] as towers make them, with tokens before heads in memory."""
    return torch.randn(1, num_tokens, count, dim).transpose(1, 2)


def reference(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    parts = (query.double(), key.double(), value.double())
    found = torch.nn.functional.scaled_dot_product_attention(*parts, scale=scale, enable_gqa=True)
    return found.transpose(1, 2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "num_tokens", "dim", "value_dim"),
    [(12, 12, 300, 64, 64), (16, 16, 65, 72, 72), (2, 2, 1, 16, 16), (4, 2, 49, 80, 32), (3, 3, 1030, 6, 10)],
)
def test_every_query_sees_every_key(
    num_heads: int, num_kv_heads: int, num_tokens: int, dim: int, value_dim: int,
    dtype: ops.KvDtype,
) -> None:  # fmt: skip
    _C.set_num_threads(2)
    attention, scale = TowerAttention(dtype), dim**-0.5
    for layer in range(2):  # the second reuses the memory of the first, and fewer keys that of more
        count = max(num_tokens - 20 * layer, 1)
        query = heads(num_heads, count, dim)
        key, value = heads(num_kv_heads, count, dim), heads(num_kv_heads, count, value_dim)
        assert attention.takes(query, key, value, None, {"dropout": 0.0, "scaling": scale})
        attend = attention.over(key, value, scale)
        whole = attend(query)
        tolerance = TOLERANCES[dtype]
        expected = reference(query, key, value, scale)
        assert_within(whole, expected, whole=tolerance, worst=4 * tolerance)
        pieces = [attend(piece) for piece in query.split(7, dim=2)]
        assert torch.equal(torch.cat(pieces, dim=1), whole)


def test_memory_is_released_and_grows() -> None:
    attention = TowerAttention("float32")
    for num_tokens in (16, 17, 5, 200):
        query, key, value = (heads(2, num_tokens, 16) for _ in range(3))
        found = attention.over(key, value, 0.25)(query)
        assert_within(found, reference(query, key, value, 0.25), whole=2e-6, worst=8e-6)
        if num_tokens == 5:
            attention.forget()
            assert attention._pool is None


@pytest.mark.parametrize(
    ("change", "is_taken"),
    [
        ({}, True),
        ({"mask": torch.ones(1, 1, 9, 9, dtype=torch.bool)}, True),
        ({"mask": torch.ones(1, 1, 9, 9, dtype=torch.bool).tril()}, False),
        ({"mask": torch.zeros(1, 1, 9, 9)}, False),
        ({"query": heads(4, 10, 16)}, False),  # more than there are keys
        ({"query": heads(3, 9, 16)}, False),
        ({"query": heads(4, 9, 16).expand(2, -1, -1, -1)}, False),
        ({"query": heads(4, 9, 16).bfloat16()}, False),
        ({"query": heads(4, 9, 15), "key": heads(2, 9, 15)}, False),
        ({"others": {"position_bias": torch.zeros(1)}}, False),
        ({"others": {"dropout": 0.1}}, False),
        ({"others": {"cu_seq_lens_q": torch.zeros(2)}}, True),  # of attention that does not loop
    ],
)
def test_what_it_cannot_compute_is_left_to_torch(change: dict[str, Any], is_taken: bool) -> None:
    given: dict[str, Any] = {name: heads(count, 9, 16) for name, count in _HEADS.items()}
    given |= {"mask": None, "others": {}} | change
    assert TowerAttention("float32").takes(**given) == is_taken
