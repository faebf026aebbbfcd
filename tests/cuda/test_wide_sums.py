"""Products added to the residual: by the native kernel, by cuBLAS in float32, or rounded (older torch)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.cuda.emulated_runner import make_device
from tests.reference.compare import assert_close
from tgi_asgi.ops import cuda_linear
from tgi_asgi.ops.cuda_linear import MAX_SKINNY_TOKENS, PlainLinear
from tgi_asgi.ops.cuda_list import Input, LaunchList, Size
from tgi_asgi.ops.cuda_scratch import Scratch

BF16 = torch.bfloat16


def add_product(
    total: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype, beta: Any = 1, alpha: Any = 1, *, out: Tensor
) -> Tensor:
    """Compute as CUDA's `addmm.dtype_out`, and require that it copies nothing."""
    assert (
        total.data_ptr() == out.data_ptr() and total.shape == out.shape and total._is_view() == out._is_view()
    )
    assert (dtype, beta, alpha) == (torch.float32, 1, 1) and out.dtype is dtype and a.dtype is b.dtype is BF16
    return out.copy_((total.double() + a.double() @ b.double()).float())


@pytest.fixture(params=[True, False], ids=["wide", "rounded"])
def has_wide_sums(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    device = make_device().device
    if device.type == "cuda":
        monkeypatch.setattr(cuda_linear, "_has_wide_sums", lambda *given: request.param)
        yield request.param
        return
    cuda_linear._has_wide_sums.cache_clear()
    library = torch.library.Library("aten", "IMPL")
    if request.param:
        library.impl("addmm.dtype_out", add_product, "CPU")
    yield request.param
    library._destroy()
    cuda_linear._has_wide_sums.cache_clear()


@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("tokens", [3, MAX_SKINNY_TOKENS, MAX_SKINNY_TOKENS + 1, 70])
def test_a_product_is_added_to_the_residual(has_wide_sums: bool, tokens: int, has_bias: bool) -> None:
    device = make_device().device
    a, weight = (torch.randn(size, 264).to(device, BF16) for size in (80, 40))
    x, bias = torch.randn(80, 40).to(device), torch.randn(40).bfloat16().float().to(device)
    expected = x.double()
    expected[:tokens] += a[:tokens].double() @ weight.double().T + (bias.double() if has_bias else 0)
    launches = LaunchList((Size.TOKENS,), (Input.IDS,))
    linear = PlainLinear(weight, bias if has_bias else None, Scratch(BF16, device), is_batch_invariant=False)
    linear.add(launches, a, x, torch.empty(80, 40, dtype=BF16, device=device), Size.TOKENS)
    launches.finish()
    launches.run((tokens,), (x[:1],))
    is_exact = has_wide_sums or tokens <= MAX_SKINNY_TOKENS
    assert_close(x.cpu(), expected.cpu(), length=264, dtype=torch.float32 if is_exact else BF16)
