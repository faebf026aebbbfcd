"""Weights with an order of columns, as act-order has them: products of an input in the same order."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.ops.helpers import EXACT, FAST, rounded
from tests.reference.compare import assert_close, assert_same_bits
from tests.reference.layers import activate, linear, norm
from tests.support import eager_ops
from tests.support.eager_ops import norm_weight
from tests.support.gguf_blocks import random_matrix
from tests.support.open_program import OpenProgram
from tests.support.quantised import Codes, ordered_source, random_codes
from tgi_asgi import _C, ops
from tgi_asgi.formats.gguf_converted import BY_NAME
from tgi_asgi.ops import direct
from tgi_asgi.ops.recorder import Kind
from tgi_asgi.ops.tensors import from_tensor

BY_KIND = ops.Packing(is_exact=False, has_float_prompts=True)
TOKENS = (1, 2, 3, 7, 40)  # up to two tokens, members have private inputs; many are divided by rows


def matrix_of(rows: int, columns: int, seed: int, *, bits: int = 4, group: int = 32) -> Codes:
    return random_codes(rows, columns, group, bits=bits, is_centred=bits == 8, order_seed=seed)


def seen(a: Tensor, precision: str, seed: int, group: int = 32) -> Tensor:
    """Return an input in float64 as a product reads it: rounded in blocks of columns in its order."""
    order = torch.argsort(matrix_of(1, a.shape[1], seed, group=group).groups, stable=True)
    found = torch.empty_like(a, dtype=torch.float64)
    found[:, order] = rounded(a[:, order], precision)
    return found


@pytest.mark.parametrize("packing", [EXACT, FAST], ids=["exact", "fast"])
@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, 128), (8, 64)])
def test_products_equal_those_of_the_plain_matrix(
    kernel_set: str, packing: ops.Packing, bits: int, group: int
) -> None:
    matrix, bias = matrix_of(100, 384, 5, bits=bits, group=group), torch.randn(100)
    weight = ops.linear_weight(ordered_source(matrix, bits=bits), packing, bias=from_tensor(bias))
    assert weight.made.matrix.format == (f"INT4_{group}" if bits == 4 else "Q8_0")
    for tokens, threads in itertools.product(TOKENS, (1, 3)):
        _C.set_num_threads(threads)
        a, x = torch.randn(tokens, 384), torch.randn(tokens, 100)
        expected = linear(seen(a, weight.made.precision, 5, group), matrix.weights(), bias)
        assert_close(eager_ops.linear(a, weight), expected, length=384)
        assert_close(eager_ops.linear_add(a, weight, x, -0.4), x.double() - 0.4 * expected, length=385)
        assert_close(eager_ops.up(a, weight, "gelu"), activate(expected, "gelu"), length=4 * 384)
        assert_close(direct.linear(weight, a), expected, length=384)


@pytest.mark.parametrize("packing", [EXACT, FAST], ids=["exact", "fast"])
@pytest.mark.parametrize("seeds", [(1, 1), (1, 2)], ids=["one order", "two orders"])
def test_gate_and_up_may_have_two_orders(
    kernel_set: str, packing: ops.Packing, seeds: tuple[int, int]
) -> None:
    _C.set_num_threads(2)
    gate, up = (matrix_of(96, 160, seed) for seed in seeds)
    weight = ops.gate_up_weight(ordered_source(gate), ordered_source(up), packing)
    parts = weight.made.parts
    assert len(parts) == len(set(seeds))
    for tokens in TOKENS:
        a = torch.randn(tokens, 160)
        products = [
            linear(seen(a, parts[0].precision, seed), matrix.weights())
            for seed, matrix in zip(seeds, (gate, up), strict=True)
        ]
        expected = activate(products[0], "silu") * products[1]
        assert_close(eager_ops.gate_up(a, weight), expected, length=4 * 160)
        assert_close(direct.gate_up(weight, a, "silu"), expected, length=4 * 160)


@pytest.mark.parametrize("seeds", [(1, 1, 1), (1, 1, 2)], ids=["one order", "two orders"])
def test_queries_keys_and_values_share_an_order_or_are_apart(seeds: tuple[int, int, int]) -> None:
    matrices = [matrix_of(rows, 96, seed) for rows, seed in zip((64, 32, 32), seeds, strict=True)]
    heads = ops.QkvHeads(2, 1, 32, rotary_dim=32)
    weight = ops.qkv_weight([ordered_source(each) for each in matrices], FAST, heads)
    parts = weight.made.parts
    assert len(parts) == (1 if len(set(seeds)) == 1 else 3)
    for part, matrix in zip(parts, matrices, strict=False):
        assert part.order.indices.tolist() == torch.argsort(matrix.groups, stable=True).tolist()


@pytest.mark.parametrize("num_sampled", [0, 1, 6, 9])
def test_prompt_tokens_have_their_own_precision(kernel_set: str, num_sampled: int) -> None:
    """The input of a product is made from float32 for both kinds of tokens."""
    _C.set_num_threads(2)
    matrix = matrix_of(64, 256, 3)
    weight = ops.linear_weight(ordered_source(matrix), BY_KIND)
    recorder = ops.Recorder()
    a = recorder.value(Kind.ACTIVATION, 256)
    out = ops.linear(a, weight)
    limits = ops.StepLimits(max_tokens=9, max_sequences=2, max_rows=1, max_context=9)
    program = OpenProgram(recorder, limits, inputs=[a], outputs=[out])
    given = torch.randn(9, 256)
    program.write(a, given.numpy())
    program.run(eager_ops.step(9, num_sampled), [])
    found = torch.from_numpy(program.read(out, 9))
    expected = linear(seen(given, "int8", 3), matrix.weights())
    values = matrix.weights().bfloat16().double()
    prompts = rounded(given, "bfloat16") @ values.T
    assert_close(found[:num_sampled], expected[:num_sampled], length=256)
    assert_close(found[num_sampled:], prompts[num_sampled:], length=256)


def test_a_row_has_the_same_bits_in_any_batch_and_team(kernel_set: str) -> None:
    weight = ops.linear_weight(ordered_source(matrix_of(100, 256, 1)), FAST)
    a, x = torch.randn(40, 256), torch.randn(40, 100)
    alone = torch.cat([eager_ops.linear_add(a[r : r + 1], weight, x[r : r + 1]) for r in range(40)])
    for threads in (1, 2, 3, 7):
        _C.set_num_threads(threads)
        for size in (1, 2, 3, 6, 7, 20, 40):
            assert_same_bits(eager_ops.linear_add(a[:size], weight, x[:size]), alone[:size])


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("tokens", TOKENS)
def test_readers_of_a_norm_get_it_each_in_its_order(kernel_set: str, tokens: int, threads: int) -> None:
    """Two products share an order, one has its own and one has none; each norm is private with few tokens."""
    _C.set_num_threads(threads)
    matrices = [matrix_of(64, 96, seed) for seed in (1, 1, 2)]
    plain = torch.randn(64, 96)
    sources = [*map(ordered_source, matrices), from_tensor(plain)]
    weights = [ops.linear_weight(source, EXACT) for source in sources]
    scale = norm_weight(torch.rand(96) + 0.5, 1e-5)
    recorder = ops.Recorder()
    x = recorder.value(Kind.RESIDUAL, 96)
    a = ops.norm(x, scale)
    outs = [ops.linear(a, weight) for weight in weights]
    limits = ops.StepLimits(max_tokens=tokens, max_sequences=1, max_rows=1, max_context=1)
    program = OpenProgram(recorder, limits, inputs=[x], outputs=outs)
    assert program.native.num_operators == 1 + 2 + 4  # norm, an order each, products
    for _ in range(3):  # a member that runs ahead must not change what another still reads
        given = torch.randn(tokens, 96)
        program.write(x, given.numpy())
        program.run(eager_ops.step(tokens), [])
        normed = norm(given, scale)
        for out, matrix in zip(outs, [*(each.weights() for each in matrices), plain], strict=True):
            assert_close(torch.from_numpy(program.read(out, tokens)), linear(normed, matrix), length=200)


@pytest.mark.parametrize("use", ["vocabulary", "router", "heads", "experts"])
def test_what_cannot_read_another_order_is_decoded(use: str) -> None:
    matrix = matrix_of(64, 64, 1)
    source = ordered_source(matrix)
    made: dict[str, Callable[[], Any]] = {
        "vocabulary": lambda: ops.linear_weight(source, FAST, is_vocabulary=True),
        "router": lambda: ops.router_weight(source, FAST),
        "heads": lambda: ops.heads_weight(source, FAST, num_heads=2),
        "experts": lambda: ops.linear_weight(source, FAST.for_experts()),
    }
    part = made[use]().made
    assert (part.matrix.format, part.order) == ("F16", None)
    found = torch.from_numpy(part.matrix.unpack())[:64, :64]
    torch.testing.assert_close(found, matrix.weights(), rtol=2**-11, atol=0)


def test_experts_with_an_order_are_refused() -> None:
    source = ordered_source(matrix_of(64, 64, 1))
    expert = ops.gate_up_weight(source, source, FAST), ops.linear_weight(source, FAST)
    with pytest.raises(ValueError, match="must have its order of columns"):
        ops.experts_weight([expert], FAST)


@pytest.mark.parametrize(
    ("order", "precision", "columns", "message"),
    [
        (np.arange(64), "float32", 96, r"`order` must have shape \[96\]"),
        (np.arange(1, 97), "float32", 96, r"`order`\[95\] must be in \[0, 96\)"),
        (np.arange(-1, 95), "float32", 96, r"`order`\[0\] must be in \[0, 96\)"),
        (np.arange(96), "int8", 96, "`source` must be another activation in float32, of 96 columns"),
        (np.arange(64), "float32", 64, "`source` must be another activation in float32, of 64 columns"),
    ],
)
def test_the_extension_checks_what_it_is_given(
    order: np.ndarray, precision: str, columns: int, message: str
) -> None:
    program = _C.Program(max_tokens=3, max_sequences=1, max_rows=1, max_context=1)
    source, out = program.activation(96, precision), program.activation(columns, "int8")
    with pytest.raises(ValueError, match=message):
        program.reorder(source=source, order=order.astype(np.int32), out=out)
    with pytest.raises(ValueError, match="another activation"):
        program.reorder(source=source, order=np.arange(96, dtype=np.int32), out=source)


@pytest.mark.parametrize("form", ["F32", "F16", "Q8_0", "Q4_K", "IQ2_XS", "FP4_16"])
@pytest.mark.parametrize("packing", [EXACT, FAST], ids=["exact", "fast"])
def test_any_format_may_have_an_order(form: str, packing: ops.Packing) -> None:
    random, columns = np.random.default_rng(3), 96 if form in ("F32", "F16", "Q8_0") else 512
    # Heads are interleaved, and narrower than a block.
    order = np.arange(columns).reshape(4, -1, 8).swapaxes(0, 1).reshape(-1)
    if form in ("F32", "F16"):
        values = random.normal(size=(48, columns))
        source = ops.from_floats(values.astype(np.float16) if form == "F16" else values.astype(np.float32))
    else:
        kind = "NVFP4" if form == "FP4_16" else form
        data = random_matrix(kind, 48, columns, 1.0, random).data.reshape(-1)
        data = BY_NAME[kind].convert(data) if kind in BY_NAME else data
        source = ops.WeightSource(data, form, (48, columns))
    plain = torch.from_numpy(ops.decode(source)[:, np.argsort(order)].copy())
    weight = ops.linear_weight(source.with_order(order), packing)
    a = torch.randn(5, columns)
    sorted_a = a.double()
    if form in ("F32", "F16"):
        sorted_a = rounded(a, weight.made.precision)
    else:
        assert weight.made.matrix.format == form
        sorted_a[:, order] = rounded(a[:, order], weight.made.precision)
    assert_close(eager_ops.linear(a, weight), linear(sorted_a, plain), length=columns)
