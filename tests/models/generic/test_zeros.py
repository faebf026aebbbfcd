"""A run of a module on zeros instead of its weights."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tgi_asgi.models.generic.zeros import NotProbed, run_on_zeros

_TOKENS, _HUGE = 3, 1 << 21  # a matrix of _HUGE rows and columns would take 16 TiB


class _Product(nn.Module):
    """Multiplies an embedded token by a matrix, in one of the ways in which the code of models does."""

    def __init__(self, multiply: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(_HUGE, _HUGE, device="meta")
        self.matrix = nn.Parameter(torch.empty(_HUGE, _HUGE, device="meta"), requires_grad=False)
        self.multiply = multiply

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.multiply(self.embedding(input_ids)[0], self.matrix)


@pytest.mark.parametrize(
    "multiply",
    [
        nn.functional.linear,
        lambda rows, matrix: nn.functional.linear(input=rows, weight=matrix),
        lambda rows, matrix: nn.functional.linear(matrix[:_TOKENS], weight=matrix),
        lambda rows, matrix: rows @ matrix.T,
        lambda rows, matrix: torch.matmul(rows, matrix),
        lambda rows, matrix: rows.mm(matrix),
        lambda rows, matrix: torch.addmm(torch.zeros(_HUGE), rows, matrix),
        lambda rows, matrix: torch.bmm(rows[None], matrix[None])[0],
        lambda rows, matrix: torch.baddbmm(torch.zeros(1, 1, 1), rows[None], matrix[None])[0],
        lambda rows, matrix: torch.einsum("ti,oi->to", rows, matrix),
        lambda rows, matrix: rows @ matrix.div_(2),
    ],
    ids=[
        "linear",
        "linear by name",
        "linear of a matrix",
        "@",
        "matmul",
        "mm",
        "addmm",
        "bmm",
        "baddbmm",
        "einsum",
        "div_",
    ],
)
@torch.no_grad()
def test_a_product_needs_no_memory_for_its_matrix(multiply: Callable[[Tensor, Tensor], Tensor]) -> None:
    model = _Product(multiply)
    result = run_on_zeros(model, _TOKENS)
    assert result.shape == (_TOKENS, _HUGE)
    assert result.device.type == "cpu"
    assert not result.any()
    assert all(value.is_meta for value in model.parameters())


def _scan(ids: Tensor, chunk_size: int = 64, scale: float = 1.0) -> tuple[int, float]:
    return chunk_size, scale


@functools.wraps(_scan)
def _decorated_scan(ids: Tensor) -> tuple[int, float]:
    return _scan(ids)


class _Changing(nn.Module):
    """Changes itself when it is called, and notes the sizes of its chunks."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2, 2, device="meta"), requires_grad=False)
        self.register_buffer("frequencies", torch.ones(2))
        self.chunk_size, self.num_calls = 256, 0
        self.chunks: list[int] = []

    def forward(self, input_ids: Tensor, fails: bool = False) -> Tensor:
        size, scale = _decorated_scan(input_ids)
        assert scale == 1
        self.chunks += [self.chunk_size, size]
        self.num_calls += 1
        self.register_buffer("frequencies", torch.zeros(2))
        self.weight = nn.Parameter(torch.ones(1))
        if fails:
            raise RuntimeError("as asked")
        return input_ids


def test_a_run_leaves_the_module_as_it_was() -> None:
    model = _Changing()
    run_on_zeros(model, _TOKENS)
    with pytest.raises(NotProbed, match="RuntimeError: as asked"):
        run_on_zeros(model, _TOKENS, fails=True)
    assert model.chunk_size == 256
    assert _decorated_scan(torch.zeros(1)) == (64, 1.0)
    assert model.num_calls == 0
    assert model.get_buffer("frequencies").tolist() == [1, 1]
    assert model.weight.is_meta


def test_a_chunk_is_no_longer_than_the_tokens() -> None:
    """Mamba 2 pads a text to chunks of 256 tokens, a delta net to chunks of 64."""
    model = _Changing()
    run_on_zeros(model, _TOKENS)
    assert model.chunks == [_TOKENS, _TOKENS]
