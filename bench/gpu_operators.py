"""What bench/gpu_stages.py times one by one: the kernels in Llama-3-8B's shapes, each beside its peers."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bench import gpu_stages
from bench.gpu_stages import copies_past_l2, random
from tgi_asgi.ops.cuda_quant import CudaQuantMatrix

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE, VOCAB = 4096, 32, 8, 128, 14336, 128256
BLOCK = 16
DECODES = ((1, 8192), (1, 32768), (16, 1024), (16, 8192), (64, 1024))  # sequences, context
PREFILLS, ROWS, DRAWS = (2048, 8192), (64, 4096), (1, 64)
PRODUCTS, QUANT_PRODUCTS = (1, 8, 16, 32, 64), (1, 8, 16)  # tokens: where cuBLAS takes over is to be seen
# Weights of products: bits of a code, columns that share a scale, whether there are offsets.
CODES = {"int4": (4, 128, True), "q8_0": (8, 32, False), "q6_k": (8, 16, False), "fp8": (8, 128, False)}
_kernels: Any = torch.ops.tgi_cuda

Call = Callable[[], object]
Measurement = tuple[str, str, int, str, list[Call], dict[str, Call]]


def measurements() -> Iterator[Measurement]:
    """Yield operator, shape, bytes (or FLOP), the ceiling they meet, calls on rotating data, and peers."""
    for batch, context in DECODES:
        yield _decode(batch, context)
    for tokens in PREFILLS:
        yield _prefill(tokens)
    for rows in ROWS:
        yield _norm(rows)
        yield _gate(rows)
        yield _rope(rows)
    for rows in DRAWS:
        yield _sample(rows)
    for tokens in PRODUCTS:
        for rows, columns in ((2 * INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE)):
            yield _product(tokens, rows, columns)
    for tokens in QUANT_PRODUCTS:
        for name in CODES:
            yield _quant_product(tokens, name)


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
    plan = torch.empty(batch + 1, dtype=torch.int32, device=gpu_stages.DEVICE)
    _kernels.attention_plan(lengths, sets[0][0], BLOCK, 0, plan)

    def call(table: Tensor, kv: Tensor) -> None:
        _kernels.attention_decode(
            q, kv, lengths, table, 0, HEAD_DIM**-0.5, 0.0, None, None, 1.0, 1.0, plan, workspace, out
        )

    calls: list[Call] = [functools.partial(call, *one) for one in sets]
    k, v = (random(batch, KV_HEADS, context, HEAD_DIM) for _ in range(2))
    peers = _sdpa(q[:, :, None], k, v, is_causal=False)
    peers["FlashInfer"] = _flashinfer(q, *sets[0], context)
    return "attention_decode", f"B{batch} x {context}", num_bytes, "read", calls, peers


def _flashinfer(q: Tensor, table: Tensor, kv: Tensor, context: int) -> Call:
    """Return FlashInfer's decode on the same pool; made when it is first called, and only if it is there."""

    @functools.cache
    def wrapper() -> Any:
        import flashinfer

        made = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            torch.empty(128 << 20, dtype=torch.uint8, device=q.device), "HND", use_tensor_cores=True
        )
        starts = torch.arange(len(table) + 1, dtype=torch.int32, device=q.device) * table.shape[1]
        last = torch.full((len(table),), (context - 1) % BLOCK + 1, dtype=torch.int32, device=q.device)
        made.plan(
            starts, table.flatten(), last, HEADS, KV_HEADS, HEAD_DIM, BLOCK, q_data_type=q.dtype,
            kv_data_type=kv.dtype,
        )  # fmt: skip
        return made

    return lambda: wrapper().run(q, kv)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool) -> dict[str, Call]:
    """Return torch's own attention by each backend."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    attend: Any = torch.nn.functional.scaled_dot_product_attention

    def call(backend: SDPBackend) -> Any:
        with sdpa_kernel(backend):
            return attend(q, k, v, is_causal=is_causal, enable_gqa=True)

    backends = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION)
    return {f"SDPA {backend.name}": functools.partial(call, backend) for backend in backends}


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
            q, kv, starts, lengths, table, tokens, 0, HEAD_DIM**-0.5, 0.0, None, None, 1.0, 1.0, out
        )  # fmt: skip

    flops = 2 * tokens * tokens * HEADS * HEAD_DIM  # of the lower triangle, both products
    peers = _sdpa(turned, k, v, is_causal=True)
    return "attention_prefill", f"{tokens} causal", flops, "bf16", [call], peers


def _norm(rows: int) -> Measurement:
    num_bytes, weight = rows * HIDDEN * 6, random(HIDDEN, dtype=torch.float32)
    sets = [
        (random(rows, HIDDEN, dtype=torch.float32), random(rows, HIDDEN))
        for _ in range(copies_past_l2(num_bytes))
    ]
    calls: list[Call] = [
        functools.partial(_kernels.norm, x, weight, None, 1e-5, None, out) for x, out in sets
    ]

    peer = _compiled(lambda x: torch.nn.functional.rms_norm(x, (HIDDEN,), weight).bfloat16(), sets[0][0])
    return "norm", f"{rows} rows", num_bytes, "copy", calls, {"torch.compile": peer}


def _compiled(function: Callable[[Tensor], Tensor], x: Tensor) -> Call:
    """Return a call of what torch.compile (Triton) makes of a function, when it is first called."""

    @functools.cache
    def compiled() -> Any:
        return torch.compile(function)

    return lambda: compiled()(x)


def _gate(rows: int) -> Measurement:
    num_bytes = rows * INTERMEDIATE * 6
    sets = [
        (random(rows, 2 * INTERMEDIATE), random(rows, INTERMEDIATE)) for _ in range(copies_past_l2(num_bytes))
    ]
    calls: list[Call] = [functools.partial(_kernels.gate, x, "silu", out) for x, out in sets]

    def gate(x: Tensor) -> Tensor:
        return torch.nn.functional.silu(x[:, :INTERMEDIATE]) * x[:, INTERMEDIATE:]

    peer = _compiled(gate, sets[0][0])
    return "gate", f"{rows} rows", num_bytes, "copy", calls, {"torch.compile": peer}


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
        _kernels.rope_kv_write(qkv, positions, slots, cos, sin, *[None] * 4, False, 0.0, 1.0, 1.0, q, kv)

    calls: list[Call] = [functools.partial(call, one) for one in sets]
    return "rope_kv_write", f"{rows} rows", num_bytes, "copy", calls, {}


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
    ids, num_top = (torch.empty(rows, dtype=torch.int32, device=device) for _ in range(2))
    is_finite, logprobs = torch.empty(rows, dtype=torch.bool, device=device), torch.empty(rows, device=device)
    no_ids, no_logprobs = ids.new_empty(rows, 0), logprobs.new_empty(rows, 0)
    result = SampleResult(ids, is_finite, logprobs, no_ids, no_logprobs, num_top)
    calls: list[Call] = [lambda: state.draw(logits, slots, None, None, result)]
    return "sample", f"{rows} rows, top-k and top-p", logits.nbytes, "read", calls, {}


def _product(tokens: int, rows: int, columns: int) -> Measurement:
    num_bytes = 2 * (rows * columns + tokens * (rows + columns))
    sets = [random(rows, columns) for _ in range(copies_past_l2(num_bytes))]
    a, out = random(tokens, columns), random(tokens, rows)
    calls: list[Call] = [functools.partial(_kernels.linear, a, w, None, False, out) for w in sets]
    peers: dict[str, Call] = {
        "torch.mm": _in_turn([functools.partial(torch.mm, a, w.t(), out=out) for w in sets])
    }
    return "linear", f"{tokens} x {rows} x {columns} bf16", num_bytes, "read", calls, peers


def _in_turn(calls: list[Call]) -> Call:
    """Return a call that makes these in turn, so that a peer finds nothing in the cache either."""
    turns = itertools.cycle(calls)
    return lambda: next(turns)()


def _quant_product(tokens: int, name: str) -> Measurement:
    rows, columns = 2 * INTERMEDIATE, HIDDEN
    sets = [_codes(name, rows, columns)]
    sets += [_codes(name, rows, columns) for _ in range(copies_past_l2(sets[0].nbytes) - 1)]
    a, out = random(tokens, columns), random(tokens, rows)
    calls: list[Call] = [functools.partial(matrix.multiply, a, None, out) for matrix in sets]
    plain = random(rows, columns)
    peers: dict[str, Call] = {"torch.mm bf16": lambda: torch.mm(a, plain.t(), out=out)}
    num_bytes = sets[0].nbytes + 2 * tokens * (rows + columns)
    return "quant_linear", f"{tokens} x {rows} x {columns} {name}", num_bytes, "read", calls, peers


def _codes(name: str, rows: int, columns: int) -> CudaQuantMatrix:
    bits, group, has_offsets = CODES[name]
    group = min(group, columns)
    device = gpu_stages.DEVICE
    codes = torch.randint(0, 120, (rows, columns * bits // 8), dtype=torch.uint8, device=device)
    scales = torch.rand(rows, columns // group, device=device) * 0.01
    if name == "fp8":
        codes = codes.view(torch.float8_e4m3fn)
    elif name == "q8_0":
        scales = scales.half()
    zero = {"q8_0": 128, "q6_k": 32}.get(name, 0)
    return CudaQuantMatrix(codes, scales, -scales if has_offsets else None, (rows, columns), bits, zero)
