"""What bench/gpu_stages.py times: the kernels in Llama-3-8B's shapes, and a whole decode step of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor

from bench import gpu_stages
from bench.gpu_stages import copies_past_l2, random
from tgi_asgi import ops
from tgi_asgi.ops.cuda import CudaBatch, CudaKvLayer, CudaProgram

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE, LAYERS, VOCAB = 4096, 32, 8, 128, 14336, 32, 128256
BLOCK = 16
DECODES = ((1, 8192), (1, 32768), (16, 1024), (16, 8192), (64, 1024))  # sequences, context
PREFILLS, ROWS, DRAWS = (2048, 8192), (64, 4096), (1, 64)
_kernels: Any = torch.ops.tgi_cuda

Call = Callable[[], object]
Measurement = tuple[str, str, int, str, list[Call], tuple[str, Call] | None]


def measurements() -> Iterator[Measurement]:
    """Yield operator, shape, bytes (or FLOP), the ceiling they meet, calls on rotating data, and a peer."""
    for batch, context in DECODES:
        yield _decode(batch, context)
    for tokens in PREFILLS:
        yield _prefill(tokens)
    for rows in ROWS:
        yield _norm(rows)
        yield _act_mul(rows)
        yield _rope(rows)
    for rows in DRAWS:
        yield _sample(rows)


def decode_program(batch: int, context: int) -> tuple[Call, int, int]:
    """Return a decode step with random weights, the bytes it must read, and how many calls it makes."""
    program = CudaProgram(
        max_tokens=batch, max_sequences=batch, max_rows=batch, max_blocks=context // BLOCK,
        dtype=torch.bfloat16, device=gpu_stages.DEVICE,
    )  # fmt: skip
    table = _pool(batch, context)[0]
    rope = ops.RopeTable.create([10000 ** (-2 * i / HEAD_DIM) for i in range(HEAD_DIM // 2)], context)
    norms = random(HIDDEN, dtype=torch.float32)
    weights = [
        _linear(rows, columns)
        for rows, columns in (
            ((HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN), (HIDDEN, HEADS * HEAD_DIM),
            (2 * INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE), (VOCAB, HIDDEN),
        )
    ]  # fmt: skip
    x = program.record_embed(weights[4])
    num_bytes = weights[4].num_bytes
    for _ in range(LAYERS):
        layer = cast(ops.KvLayer, CudaKvLayer(_pool(batch, context)[1]))
        qkv, output, gate_up, down = (_linear(*weight.matrix.shape) for weight in weights[:4])
        num_bytes += sum(weight.num_bytes for weight in (qkv, output, gate_up, down))
        num_bytes += 4 * batch * context * KV_HEADS * HEAD_DIM
        a = program.record_norm(norms, 1e-5)
        q = program.record_qkv(a, ops.QkvWeight(qkv, HEADS, KV_HEADS, HEAD_DIM), layer, rope)
        x = program.record_linear_add(program.record_attention(q, layer, HEAD_DIM**-0.5), output, x)
        a = program.record_gate_up(program.record_norm(norms, 1e-5), ops.GateUpWeight(gate_up), "silu")
        x = program.record_linear_add(a, down, x)
    program.record_head(norms, 1e-5, weights[4])
    full = torch.full((batch,), context, dtype=torch.int32, device=gpu_stages.DEVICE)
    inputs = CudaBatch(
        ids=torch.arange(batch, dtype=torch.int32, device=gpu_stages.DEVICE), positions=full - 1,
        slots=table[:, -1].long() * BLOCK + BLOCK - 1,
        query_start=torch.arange(batch + 1, dtype=torch.int32, device=gpu_stages.DEVICE), context_len=full,
        block_table=table, num_decodes=batch, max_query_len=0,
    )  # fmt: skip
    rows = torch.arange(batch, dtype=torch.int32, device=gpu_stages.DEVICE)

    def call() -> None:
        program.forward(inputs)
        program.head(rows)

    return call, num_bytes, program.num_calls + 2


def _linear(rows: int, columns: int) -> ops.LinearWeight:
    return ops.LinearWeight(random(rows, columns) * columns**-0.5)


def _pool(batch: int, context: int) -> tuple[Tensor, Tensor]:
    """Return block tables in random order, and a layer's pool."""
    num_blocks = batch * context // BLOCK
    table = torch.randperm(num_blocks, device=gpu_stages.DEVICE).int().view(batch, -1)
    return table, random(num_blocks, 2, KV_HEADS, BLOCK, HEAD_DIM)


def _decode(batch: int, context: int) -> Measurement:
    num_bytes = 4 * batch * context * KV_HEADS * HEAD_DIM
    lengths = torch.full((batch,), context, dtype=torch.int32, device=gpu_stages.DEVICE)
    sets = [_pool(batch, context) for _ in range(copies_past_l2(num_bytes))]
    q = random(batch, HEADS, HEAD_DIM)
    out = torch.empty_like(q)
    sizes = (batch, context // BLOCK, BLOCK, HEADS, HEAD_DIM)
    workspace = torch.empty(
        _kernels.attention_workspace_bytes(*sizes), dtype=torch.uint8, device=gpu_stages.DEVICE
    )
    _kernels.attention_plan(lengths, sets[0][0], BLOCK, 0, workspace)

    def call(table: Tensor, kv: Tensor) -> None:
        _kernels.attention_decode(q, kv, lengths, table, 0, HEAD_DIM**-0.5, 1.0, 1.0, workspace, out)

    calls: list[Call] = [functools.partial(call, *one) for one in sets]
    k, v = (random(batch, KV_HEADS, context, HEAD_DIM) for _ in range(2))

    def peer() -> Tensor:
        attend: Any = torch.nn.functional.scaled_dot_product_attention
        result: Tensor = attend(q[:, :, None], k, v, enable_gqa=True)
        return result

    return "attention_decode", f"B{batch} x {context}", num_bytes, "read", calls, ("SDPA", peer)


def _prefill(tokens: int) -> Measurement:
    table, kv = _pool(1, tokens)
    q, starts = (
        random(tokens, HEADS, HEAD_DIM),
        torch.tensor([0, tokens], dtype=torch.int32, device=gpu_stages.DEVICE),
    )
    out, lengths = torch.empty_like(q), starts[1:].clone()
    k, v = (random(1, KV_HEADS, tokens, HEAD_DIM) for _ in range(2))
    turned = q.transpose(0, 1)[None].contiguous()

    def call() -> None:
        _kernels.attention_prefill(
            q, kv, starts, lengths, table, tokens, 0, HEAD_DIM**-0.5, 1.0, 1.0, out
        )  # fmt: skip

    def peer() -> Tensor:
        attend: Any = torch.nn.functional.scaled_dot_product_attention
        result: Tensor = attend(turned, k, v, is_causal=True, enable_gqa=True)
        return result

    flops = 2 * tokens * tokens * HEADS * HEAD_DIM  # of the lower triangle, both products
    return "attention_prefill", f"{tokens} causal", flops, "bf16", [call], ("SDPA", peer)


def _norm(rows: int) -> Measurement:
    num_bytes, weight = rows * HIDDEN * 6, random(HIDDEN, dtype=torch.float32)
    sets = [
        (random(rows, HIDDEN, dtype=torch.float32), random(rows, HIDDEN))
        for _ in range(copies_past_l2(num_bytes))
    ]
    calls: list[Call] = [
        lambda x=x, out=out: _kernels.rms_norm(x, weight, 1e-5, None, out) for x, out in sets
    ]

    @functools.cache
    def compiled() -> Any:
        return torch.compile(lambda x: torch.nn.functional.rms_norm(x, (HIDDEN,), weight).bfloat16())

    def peer() -> Any:
        return compiled()(sets[0][0])

    return "rms_norm", f"{rows} rows", num_bytes, "copy", calls, ("torch.compile", peer)


def _act_mul(rows: int) -> Measurement:
    num_bytes = rows * INTERMEDIATE * 6
    sets = [
        (random(rows, 2 * INTERMEDIATE), random(rows, INTERMEDIATE)) for _ in range(copies_past_l2(num_bytes))
    ]
    calls: list[Call] = [functools.partial(_kernels.act_mul, x, "silu", out) for x, out in sets]
    return "act_mul", f"{rows} rows", num_bytes, "copy", calls, None


def _rope(rows: int) -> Measurement:
    width = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    num_bytes = rows * width * 4
    angles = torch.rand(rows, HEAD_DIM // 2, device=gpu_stages.DEVICE)
    cos, sin = angles.cos(), angles.sin()
    _, kv = _pool(1, -(-rows // BLOCK) * BLOCK)
    positions = torch.arange(rows, dtype=torch.int32, device=gpu_stages.DEVICE)
    slots, q = torch.randperm(rows, device=gpu_stages.DEVICE), random(rows, HEADS, HEAD_DIM)
    sets = [random(rows, width) for _ in range(copies_past_l2(num_bytes))]

    def call(qkv: Tensor) -> None:
        _kernels.rope_kv_write(qkv, positions, slots, cos, sin, None, None, 0.0, 1.0, 1.0, q, kv)

    calls: list[Call] = [functools.partial(call, one) for one in sets]
    return "rope_kv_write", f"{rows} rows", num_bytes, "copy", calls, None


def _sample(rows: int) -> Measurement:
    from tgi_asgi.ops.cuda_sample_state import CudaSampleState
    from tgi_asgi.ops.sample import SampleResult
    from tgi_asgi.types import SamplingParams

    device = gpu_stages.DEVICE
    state = CudaSampleState(rows, VOCAB, device)
    for slot in range(rows):
        sampling = SamplingParams(temperature=0.8, top_k=50, top_p=0.9, seed=slot)
        state.start(slot, sampling, choice=0, prompt_ids=[1])
    logits, slots = (
        random(rows, VOCAB, dtype=torch.float32) * 3,
        torch.arange(rows, device=gpu_stages.DEVICE).int(),
    )
    host = SampleResult.allocate(rows, 0)
    names = ("token_ids", "is_finite", "logprobs", "top_ids", "top_logprobs", "num_top")
    result = SampleResult(**{name: getattr(host, name).to(device) for name in names})
    calls: list[Call] = [lambda: state.draw(logits, slots, None, result)]
    return "sample", f"{rows} rows, top-k and top-p", logits.nbytes, "read", calls, None
