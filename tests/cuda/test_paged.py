"""Attention of modules on a GPU, by kernels and by torch: every rule, and no memory but a sequence's own."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from tests.cuda import apart_device
from tests.cuda.emulated_runner import ON_GPU
from tests.emulation import bindings
from tests.reference.compare import assert_within
from tests.support.batches import flat_rows
from tests.support.paged_layers import NARROW, RULES, SHAPES, TOLERANCES, Layer
from tgi_asgi.models.config import CacheShape
from tgi_asgi.ops import AttentionSpec, KvDtype, cuda_padded
from tgi_asgi.ops.cuda_paged import CudaPagedAttention, DeviceKvPool


@pytest.fixture(autouse=True)
def device() -> torch.device:
    return apart_device.find_device()


@dataclass
class DeviceLayer(Layer):
    """A layer whose cache is on the device; heads come from the host and go back to it."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    is_clean: bool = False  # the kernels may read the rest of a sequence's last block, which is never NaN

    def pool(self, contexts: list[int]) -> DeviceKvPool:
        pool = DeviceKvPool(
            [CacheShape(self.kv_heads, self.head_dim, self.value_dim)] * 3,
            num_blocks=self.num_blocks(contexts), block_size=self.block_size,
            dtype=getattr(torch, self.dtype), device=self.device,
        )  # fmt: skip
        for layer in pool.layers if not self.is_clean else ():
            layer.keys.fill_(torch.nan)
            layer.values.fill_(torch.nan)
        return pool

    def attention(self, max_context: int) -> Any:
        return _HostSide(self.device)


class _HostSide:
    """The attention with tensors of the host."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._attention = device, CudaPagedAttention(device)
        self.begin = self._attention.begin

    def run(self, layer: Any, *heads_and_spec: Any) -> torch.Tensor:
        *heads, spec = heads_and_spec
        q, k, v = (each.to(self._device) for each in heads)
        return self._attention.run(layer, q, k, v, spec).cpu()


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "value_dim", "block_size"), [*SHAPES[2:], *NARROW])
def test_heads_that_no_kernel_has_equal_the_reference(
    device: torch.device, heads: int, kv_heads: int, head_dim: int, value_dim: int, block_size: int
) -> None:
    DeviceLayer(heads, kv_heads, head_dim, value_dim, "float32", block_size, device=device).check(
        [2, 17, 33, 257, 300]
    )


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_what_a_layer_sees_and_does_with_scores_equals_the_reference(
    device: torch.device, rules: dict[str, Any], dtype: KvDtype
) -> None:
    DeviceLayer(4, 2, 64, 32, dtype, rules=rules, device=device).check([3, 49, 130, 300], last=2)


@pytest.mark.parametrize("limit", [4 * 49, 4 * 49 * 49, 4 * 2 * 130 * 130])
def test_pieces_of_any_size_give_the_same(
    device: torch.device, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few queries at a time, some of a sequence, and two sequences together."""
    monkeypatch.setattr(cuda_padded, "_MAX_SCORES", limit)
    DeviceLayer(4, 2, 32, 32, "float32", rules=RULES["window"], device=device).check([3, 40, 49, 130], last=2)


@pytest.mark.parametrize("rules", [RULES["all"], RULES["window"], RULES["everything"]])
def test_tokens_of_an_image_see_each_other(device: torch.device, rules: dict[str, Any]) -> None:
    layer = DeviceLayer(4, 2, 64, 64, "float16", rules=rules, device=device)
    given = layer.heads_of([200, 20])
    ends = [torch.arange(1, 201), torch.arange(1, 21)]
    for first, stop in ((3, 9), (100, 190), (199, 200)):
        ends[0][first:stop] = stop
    ends[1][:20] = 20
    found = layer.run(given, [[(0, 200), (0, 20)]], torch.cat(ends).int())
    for each, end, out in zip(given, ends, found, strict=True):
        assert_within(out, layer.expected(each, end), whole=2e-3, worst=4e-3)


@pytest.mark.parametrize("name", ["all", "window", "soft cap", "sinks", "slopes"])
def test_kernels_compute_steps_that_decode_and_steps_with_prompts(device: torch.device, name: str) -> None:
    """Steps of prompts, of prompts beside single tokens in any order, and of single tokens only."""
    layer = DeviceLayer(4, 2, 64, 64, "float16", rules=RULES[name], device=device, is_clean=True)
    given = layer.heads_of([40, 61, 30])
    steps = [
        [(0, 20), (0, 0), (0, 29)],
        [(20, 38), (0, 60), (29, 30)],
        [(38, 39), (60, 61), (0, 0)],
        [(39, 40), (0, 0), (0, 0)],
    ]
    launched: set[str] = set()
    with nullcontext() if ON_GPU else bindings.observed(launched.add):
        found = torch.cat(layer.run(given, steps))
    assert ON_GPU or {"attention_decode", "attention_prefill"} <= launched
    expected = torch.cat([layer.expected(each) for each in given])
    assert_within(found, expected, whole=TOLERANCES["float16"], worst=3 * TOLERANCES["float16"])


def test_copied_blocks_hold_the_same_in_every_layer(device: torch.device) -> None:
    pool = DeviceKvPool(
        [CacheShape(2, 16, 16), CacheShape(1, 24, 8)], num_blocks=5, block_size=16, dtype=torch.float32,
        device=device,
    )  # fmt: skip
    for layer in pool.layers:
        for part in (layer.keys, layer.values):
            part.copy_(torch.randn(part.shape))
    before = [(layer.keys.cpu().clone(), layer.values.cpu().clone()) for layer in pool.layers]
    pool.copy([])
    pool.copy([(0, 3), (2, 4)])
    for layer, (keys, values) in zip(pool.layers, before, strict=True):
        for part, old in ((layer.keys.cpu(), keys), (layer.values.cpu(), values)):
            assert torch.equal(part, old[[0, 1, 2, 0, 2]])


def test_keys_of_another_layer_are_attended(device: torch.device) -> None:
    layer = DeviceLayer(4, 2, 64, 64, "float32", device=device)
    [(q, k, v)] = layer.heads_of([40])
    pool, attention = layer.pool([40]), CudaPagedAttention(device)
    attention.begin(flat_rows([(0, 40)], [[2, 0, 1]], 16))
    attention.run(pool.layers[0], q.to(device), k.to(device), v.to(device), AttentionSpec(layer.scale))
    other = torch.randn_like(q)
    found = attention.run(pool.layers[0], other.to(device), None, None, AttentionSpec(layer.scale)).cpu()
    assert_within(found.flatten(1), layer.expected((other, k, v)), whole=2e-5, worst=4e-5)


def test_queries_of_another_shape_are_refused(device: torch.device) -> None:
    layer = DeviceLayer(4, 2, 32, 32, "float32", device=device)
    with pytest.raises(ValueError, match=r"`q` must be \[3, 4, 32\], got \[3, 4, 16\]"):
        layer.run([(torch.zeros(3, 4, 16), torch.zeros(3, 2, 32), torch.zeros(3, 2, 32))], [[(0, 3)]])
