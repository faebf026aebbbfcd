"""torch.library.opcheck over every operator: schema, mutation marks, meta function, autograd's absence."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tgi_asgi import ops
from tgi_asgi.types import SamplingParams


def ints(*values: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


def sample_operands() -> tuple[Any, ...]:
    state = ops.SampleState(2, 40)
    state.start(0, SamplingParams(logprobs=3, top_p=0.9), choice=0, prompt_ids=[1])
    state.start(1, SamplingParams(temperature=0), choice=0, prompt_ids=[1])
    outputs = [torch.zeros(2, dtype=dtype) for dtype in (torch.int32, torch.bool, torch.float32)]
    tops = [torch.zeros(2, 3, dtype=torch.int32), torch.zeros(2, 3), torch.zeros(2, dtype=torch.int32)]
    scratch = torch.zeros(4, 4, 40)
    head = (torch.randn(2, 40), ints(0, 1), state.record_bytes.clone(), torch.zeros(2, 40, dtype=torch.int32))
    return (
        *head,
        *state.biased,
        state.masked,
        torch.full((2, 2), -1, dtype=torch.int32),
        scratch,
        *outputs,
        *tops,
    )


def pool() -> torch.Tensor:
    return torch.randn(3, 2, 2, 1, 16 * 16)[:, 1]  # the second of two layers


OPERANDS: dict[str, Any] = {
    "embed": lambda: (ints(2, 0), torch.randn(3, 8), torch.zeros(2, 8)),
    "rms_norm": lambda: (torch.randn(3, 8), torch.randn(8), 1e-5, ints(2), torch.zeros(1, 8)),
    "rope_kv_write": lambda: (
        torch.randn(2, 64), ints(0, 1), ints(4, 40, dtype=torch.int64), torch.randn(2, 8), torch.randn(2, 8),
        16, torch.zeros(2, 2, 16), pool(),
    ),
    "attention": lambda: (
        torch.randn(2, 2, 16), pool(), ints(0, 2), ints(20), ints(1, 2)[None], 16, 0.25, torch.zeros(2, 32),
    ),
    "act_mul": lambda: (torch.randn(2, 16), "silu", torch.zeros(2, 8)),
    "matmul": lambda: (torch.randn(2, 8), torch.randn(5, 8), torch.randn(5), torch.zeros(2, 5)),
    "dequantise": lambda: (torch.zeros(68, dtype=torch.uint8), "Q8_0", torch.zeros(2, 32)),
    "advise_huge_pages": lambda: (torch.zeros(16),),
    "sample": sample_operands,
    "token_logprobs": lambda: (
        torch.randn(2, 9), ints(0, 8), torch.zeros(2), torch.zeros(2, 4, dtype=torch.int32),
        torch.zeros(2, 4),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERANDS)
def test_an_operator_keeps_torchs_rules(name: str) -> None:
    operator = getattr(torch.ops.tgi, name).default
    torch.library.opcheck(operator, OPERANDS[name](), test_utils=("test_schema", "test_faketensor"))


def test_every_operator_of_the_schemas_is_checked() -> None:
    text = Path("csrc/bindings/library.cpp").read_text()
    assert set(re.findall(r'm\.def\(\s*"(\w+)\(', text)) == set(OPERANDS)


@pytest.mark.parametrize("name", OPERANDS)
def test_operands_of_another_dtype_are_refused(name: str) -> None:
    operands = list(OPERANDS[name]())
    if name == "advise_huge_pages":
        return
    operands[0] = operands[0].double()
    with pytest.raises(RuntimeError, match="must be"):
        getattr(torch.ops.tgi, name)(*operands)
