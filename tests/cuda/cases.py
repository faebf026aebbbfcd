"""Checks of every operator's results as calls that take a device: the emulated one, or a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from tests.cuda import (
    test_attention_decode,
    test_attention_parts,
    test_attention_prefill,
    test_begin_step,
    test_draft_slots,
    test_embed_and_activate,
    test_experts,
    test_linear,
    test_lora,
    test_norm,
    test_quant_linear,
    test_quantise,
    test_residual_add,
    test_rope_kv_write,
    test_sample,
)
from tests.cuda.paged_cache import Shape
from tgi_asgi.types import SamplingParams

BF16, FP16, FP8 = torch.bfloat16, torch.float16, torch.float8_e4m3fn

Case = tuple[str, torch.dtype, Callable[[Any], None]]  # operator, dtype, check


def small() -> Iterator[Case]:
    """Yield a few small cases per operator: for sanitizers, and for the emulation's own test of this list."""
    for dtype in (BF16, FP16):
        yield "norm", dtype, _of(test_norm.check, 3, 576, dtype)
        yield "embed", dtype, _of(test_embed_and_activate.check_embed, 17, 64, dtype)
        yield "activate", dtype, _of(test_embed_and_activate.check_activate, 5, 264, dtype)
        for rotary_dim in (64, 20):
            rope = _of(test_rope_kv_write.check, 7, 80, rotary_dim, dtype=dtype, kv_dtype=dtype)
            yield "rope_kv_write", dtype, rope
        yield from attention([300, 17, 1], 64, dtype, prefix=20)
        yield from parts(37, 19, 64, dtype)
        yield "residual_add", dtype, _of(test_residual_add.check, 5, 264, dtype)
        for tokens in (1, 9, 70):
            yield "linear", dtype, _of(test_linear.check, tokens, 35, 296, dtype=dtype)
        yield "lora_down", dtype, _of(test_lora.check_down, 37, 264, 3, dtype)
        yield "lora_up", dtype, _of(test_lora.check_up, 37, (48, 64, 80), dtype, is_wide=False)
        yield from experts(9, 64, 24, dtype)
        yield "dequantise", dtype, _of(test_quant_linear.check_every_mxfp4, dtype)
        for has_groups in (False, True):
            yield "quantise", dtype, _of(test_quantise.check, 6, 640, dtype, has_groups=has_groups)
        for is_streamed in (False, True):
            exact = _of(test_experts.check_every_mxfp4, dtype, is_streamed=is_streamed)
            yield "experts_product", dtype, exact
    yield from products(3, 17, 512)
    yield from routes(3)
    yield "sample", torch.float32, _of(_sample, 300)
    yield "draft_slots", torch.float32, _of(test_draft_slots.check_all)
    yield "begin_step", torch.int32, _of(test_begin_step.check, 3)


def large() -> Iterator[Case]:
    """Yield cases of realistic sizes with all head sizes: seconds on a GPU."""
    for dtype in (BF16, FP16):
        yield "norm", dtype, _of(test_norm.check, 300, 4096, dtype)
        yield "embed", dtype, _of(test_embed_and_activate.check_embed, 300, 4096, dtype)
        yield "activate", dtype, _of(test_embed_and_activate.check_activate, 300, 14336, dtype)
        for head_dim in (64, 80, 96, 128, 256):
            for kv_dtype in (dtype, FP8):
                yield from attention([1, 513, 2049, 8200], head_dim, dtype, prefix=1000, kv_dtype=kv_dtype)
        yield from parts(8200, 248, 128, dtype)
        for has_groups in (False, True):
            yield "quantise", dtype, _of(test_quantise.check, 300, 14336, dtype, has_groups=has_groups)
        yield "residual_add", dtype, _of(test_residual_add.check, 300, 4096, dtype)
        for tokens in (1, 8, 16, 32, 64, 200):
            yield "linear", dtype, _of(test_linear.check, tokens, 4096, 4096, dtype=dtype)
        for tokens in (300, 520):
            yield "lora_down", dtype, _of(test_lora.check_down, tokens, 4096, 3, dtype)
        for is_wide in (False, True):
            ends = (4096, 5120, 6144)
            yield "lora_up", dtype, _of(test_lora.check_up, 300, ends, dtype, is_wide=is_wide)
        for tokens in (1, 64, 600):
            yield from experts(tokens, 2048, 768, dtype)
    yield from products(8, 1024, 4096)
    yield from routes(300)
    for name in test_quant_linear.FORMATS:
        for tokens in (8, 400):
            check = _of(
                test_experts.check_product, name, tokens, 2048, 256, num_experts=16, top_k=4, is_gated=True
            )
            yield "experts_product", BF16, check
    yield "sample", torch.float32, _of(_sample, 32000)
    yield "begin_step", torch.int32, _of(test_begin_step.check, 3, stride=8192)


def attention(
    contexts: list[int],
    head_dim: int,
    dtype: torch.dtype,
    *,
    prefix: int,
    kv_dtype: torch.dtype | None = None,
) -> Iterator[Case]:
    """Yield decode and prefill of these contexts; prefill's longest chunk follows a prefix."""
    kinds: dict[str, Any] = {"head_dim": head_dim, "dtype": dtype, "kv_dtype": kv_dtype, "num_heads": 6}
    ones = Shape(contexts, [1] * len(contexts), **kinds)
    queries = [min(context, 200) if context > prefix else context for context in contexts]
    chunks = Shape([max(context, 1) for context in contexts], queries, **kinds)
    yield "attention_decode", dtype, _of(test_attention_decode.check, ones)
    yield "attention_prefill", dtype, _of(test_attention_prefill.check, chunks)


def parts(context: int, num_zeros: int, head_dim: int, dtype: torch.dtype) -> Iterator[Case]:
    """Yield what surrounds a library's attention of a prompt."""
    for kv_dtype in (dtype, FP8):
        shape = Shape([context], [1], head_dim=head_dim, dtype=dtype, kv_dtype=kv_dtype)
        yield "attention_gather", dtype, _of(test_attention_parts.check_gather, shape, num_zeros)
    check = _of(test_attention_parts.check_merge, context // 8, 6, head_dim, 5, dtype)
    yield "attention_merge", dtype, check


def products(tokens: int, rows: int, columns: int) -> Iterator[Case]:
    """Yield a product with weights of each format."""
    for name in test_quant_linear.FORMATS:
        yield "quant_linear", BF16, _of(test_quant_linear.check_product, name, tokens, rows, columns)


def routes(tokens: int) -> Iterator[Case]:
    """Yield routes of each kind, and plans of their tokens."""
    for spec in test_experts.SPECS:
        yield "route", torch.float32, _of(test_experts.check_route, spec, tokens)
    yield "gated_add", torch.float32, _of(test_experts.check_gated_add, tokens, 64)


def experts(tokens: int, columns: int, inner: int, dtype: torch.dtype) -> Iterator[Case]:
    """Yield both products of a layer with experts, and the sum of their results."""
    for is_gated in (True, False):
        check = _of(
            test_experts.check_product, "plain", tokens, columns, inner, num_experts=8, top_k=2, dtype=dtype,
            is_gated=is_gated, has_bias=True,
        )  # fmt: skip
        yield "experts_product", dtype, check
    yield "experts_sum", dtype, _of(test_experts.check_sum, tokens, 3, columns, dtype)


def _of(check: Callable[..., object], *arguments: Any, **options: Any) -> Callable[[Any], None]:
    """Bind all arguments of a check except the device."""

    def run(device: Any) -> None:
        check(device, *arguments, **options)

    return run


def _sample(device: Any, vocab: int) -> None:
    for sampling in test_sample.WAYS:
        test_sample.check(device, torch.randn(1, vocab) * 3, [sampling])
    test_sample.check(device, torch.zeros(1, vocab), [SamplingParams(temperature=0)])
