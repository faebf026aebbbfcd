"""The operator embed."""

from __future__ import annotations

import pytest
import torch

from tests.ops.helpers import random_source
from tgi_asgi import _C, ops


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "hidden"), [(0, 3), (1, 1), (17, 129), (40, 576)])
def test_rows_are_gathered(tokens: int, hidden: int, dtype: torch.dtype) -> None:
    _C.set_num_threads(3)
    table, source = random_source(11, hidden)
    ids = torch.randint(11, (tokens,), dtype=torch.int32)
    x = ops.embed(ids, ops.linear_weight(source, dtype=dtype))
    assert x.dtype is torch.float32
    assert torch.equal(x, table.to(dtype).float()[ids.long()])


@pytest.mark.parametrize("bad", [-1, 11])
def test_an_id_out_of_the_vocabulary_is_refused(bad: int) -> None:
    weight = ops.linear_weight(random_source(11, 4)[1], dtype=torch.float32)
    with pytest.raises(RuntimeError, match=r"`ids`\[1\] must be in \[0, 11\)"):
        ops.embed(torch.tensor([3, bad], dtype=torch.int32), weight)
