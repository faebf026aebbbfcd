"""The kernels that bench/gpu_kernels.py times one by one: Llama-3-8B's shapes, each compared with its peers.

Peers rotate their inputs as the native kernels do: neither finds them in the cache.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bench import gpu_experts, gpu_timing
from bench.gpu_model import BLOCK, CODES, KV_TYPES, TOP_P, float8, make_sampler, random_codes
from bench.gpu_timing import Call, copies_past_l2, in_turn, random
from tgi_asgi.ops import cuda_sdpa
from tgi_asgi.ops.cuda_attention import GatheredAttention, Gathering
from tgi_asgi.ops.cuda_float8 import Float8Matrix, float8_matrix
from tgi_asgi.ops.cuda_kv import CudaKvLayer
from tgi_asgi.ops.cuda_quant import CudaQuantMatrix
from tgi_asgi.ops.cuda_sdpa import Library, Workspace

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE, VOCAB = 4096, 32, 8, 128, 14336, 128256
DECODES = (  # sequences, context, type of the cache
    (1, 1024, "bf16"), (1, 8192, "bf16"), (1, 32768, "bf16"), (16, 1024, "bf16"), (16, 8192, "bf16"),
    (64, 1024, "bf16"), (16, 8192, "fp8"), (64, 1024, "fp8"),
)  # fmt: skip
PREFILLS, ROWS, SAMPLES = (2048, 8192), (64, 4096), (1, 64)
CHUNK = (512, 7680)  # of a prompt: tokens, and tokens before them
PRODUCTS = QUANT_PRODUCTS = (1, 8, 16, 32, 64)  # tokens; shows where cuBLAS takes over
FLOAT8_PRODUCTS = (32, 64, 512, 2048)
LORAS = (1, 64, 2048)  # tokens, which several adapters share evenly
ADAPTERS, RANK, MAX_RANK = 8, 16, 64
_kernels: Any = torch.ops.tgi_cuda

Measurement = tuple[str, str, int, str, list[Call], dict[str, Call]]


def makers() -> Iterator[functools.partial[Measurement]]:
    """Yield a function per measurement that makes it; making it uses memory.

    A measurement has the operator, shape, bytes (or FLOP), the ceiling that applies, calls on rotating data,
    and peers.
    """
    for batch, context, kv in DECODES:
        yield functools.partial(_decode, batch, context, kv)
    for tokens in PREFILLS:
        yield functools.partial(_prefill, tokens)
        yield functools.partial(_prefill_gathered, tokens)
    yield functools.partial(_prefill, *CHUNK)
    yield functools.partial(_prefill_gathered, *CHUNK)
    for rows in ROWS:
        for make in (_norm, _gate, _rope):
            yield functools.partial(make, rows)
    for rows in SAMPLES:
        yield functools.partial(_sample, rows)
    for tokens in PRODUCTS:
        for rows, columns in ((2 * INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE)):
            yield functools.partial(_product, tokens, rows, columns)
    for tokens in QUANT_PRODUCTS:
        for name in CODES:
            yield functools.partial(_quant_product, tokens, name)
    for tokens in FLOAT8_PRODUCTS:
        yield functools.partial(_float8_product, tokens)
    for tokens in LORAS:
        query = HEADS * HEAD_DIM
        ends = (query, query + KV_HEADS * HEAD_DIM, query + 2 * KV_HEADS * HEAD_DIM)
        yield functools.partial(_lora, tokens, ends, HIDDEN)
        yield functools.partial(_lora, tokens, (HIDDEN,), INTERMEDIATE)
    yield from gpu_experts.makers()


def _pool(batch: int, context: int) -> tuple[Tensor, Tensor]:
    """Return block tables in random order, and a layer's pool."""
    num_blocks = batch * context // BLOCK
    table = torch.randperm(num_blocks, device=gpu_timing.DEVICE).int().view(batch, -1)
    return table, random(num_blocks, 2, KV_HEADS, BLOCK, HEAD_DIM)


def _decode(batch: int, context: int, kv_type: str) -> Measurement:
    dtype = KV_TYPES[kv_type]
    num_bytes = 2 * dtype.itemsize * batch * context * KV_HEADS * HEAD_DIM
    lengths = torch.full((batch,), context, dtype=torch.int32, device=gpu_timing.DEVICE)
    pools = (_pool(batch, context) for _ in range(copies_past_l2(num_bytes)))
    sets = [(table, kv.to(dtype)) for table, kv in pools]
    q = random(batch, HEADS, HEAD_DIM)
    out = torch.empty_like(q)
    sizes = (batch, context // BLOCK, BLOCK, HEADS, HEAD_DIM)
    workspace = torch.empty(
        _kernels.attention_workspace_bytes(*sizes), dtype=torch.uint8, device=gpu_timing.DEVICE
    )
    plan = torch.empty(batch + 1, dtype=torch.int32, device=gpu_timing.DEVICE)
    _kernels.attention_plan(lengths, sets[0][0], BLOCK, 0, plan)

    def call(table: Tensor, kv: Tensor) -> None:
        _kernels.attention_decode(
            q, kv, lengths, table, 0, HEAD_DIM**-0.5, 0.0, None, None, 1.0, 1.0, plan, workspace, out
        )

    calls: list[Call] = [functools.partial(call, *one) for one in sets]
    peers = {"FlashInfer": _flashinfer(q, sets, context)}
    if dtype == q.dtype:
        peers |= _sdpa(q[:, :, None], _plain_sets(len(sets), batch, context), is_causal=False)
    return "attention_decode", f"B{batch} x {context} {kv_type}", num_bytes, "read", calls, peers


def _plain_sets(count: int, batch: int, context: int) -> list[tuple[Tensor, Tensor]]:
    """Return sets of contiguous keys and values."""
    k, v = (random(count, batch, KV_HEADS, context, HEAD_DIM) for _ in range(2))
    return list(zip(k, v, strict=True))


def _flashinfer(q: Tensor, sets: list[tuple[Tensor, Tensor]], context: int) -> Call:
    """Return FlashInfer's decode on the same pools with one table; the first call imports and plans it."""
    table, kv = sets[0]

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

    return in_turn([functools.partial(lambda pool: wrapper().run(q, pool), pool) for _, pool in sets])


def _flashinfer_prefill(q: Tensor, sets: list[tuple[Tensor, Tensor]]) -> Call:
    """Return FlashInfer's attention of one prompt on the same pools; `_flashinfer` is that of decodes."""
    table, kv = sets[0]

    @functools.cache
    def wrapper() -> Any:
        import flashinfer

        made = flashinfer.BatchPrefillWithPagedKVCacheWrapper(
            torch.empty(128 << 20, dtype=torch.uint8, device=q.device), "HND"
        )
        of_query = torch.tensor([0, len(q)], dtype=torch.int32)  # on the host, where the plan is made
        of_pages = torch.tensor([0, table.numel()], dtype=torch.int32)
        last = torch.tensor([(len(q) - 1) % BLOCK + 1], dtype=torch.int32)
        made.plan(
            of_query, of_pages, table.flatten(), last, HEADS, KV_HEADS, HEAD_DIM, BLOCK, causal=True,
            q_data_type=q.dtype, kv_data_type=kv.dtype,
        )  # fmt: skip
        return made

    return in_turn([functools.partial(lambda pool: wrapper().run(q, pool), pool) for _, pool in sets])


def _sdpa(q: Tensor, sets: list[tuple[Tensor, Tensor]], *, is_causal: bool) -> dict[str, Call]:
    """Return torch's own attention with each backend."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    attend: Any = torch.nn.functional.scaled_dot_product_attention

    def call(backend: SDPBackend, k: Tensor, v: Tensor) -> Any:
        with sdpa_kernel(backend):
            return attend(q, k, v, is_causal=is_causal, enable_gqa=True)

    backends = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION)
    return {
        f"SDPA {backend.name}": in_turn([functools.partial(call, backend, *one) for one in sets])
        for backend in backends
    }


def _prefill(tokens: int, prefix: int = 0) -> Measurement:
    context = prefix + tokens
    sets = [_pool(1, context) for _ in range(copies_past_l2(4 * context * KV_HEADS * HEAD_DIM))]
    q = random(tokens, HEADS, HEAD_DIM)
    out, paged = torch.empty_like(q), _paged(tokens, context)
    calls: list[Call] = [functools.partial(paged, q, table, kv, out) for table, kv in sets]
    peers: dict[str, Call] = {}
    if prefix == 0:
        turned = q.transpose(0, 1)[None].contiguous()
        peers = _sdpa(turned, _plain_sets(len(sets), 1, tokens), is_causal=True)
        peers["FlashInfer"] = _flashinfer_prefill(q, sets)
    return "attention_prefill", _prompt(tokens, prefix), _flops(tokens, prefix), "bf16", calls, peers


def _paged(tokens: int, context: int) -> Callable[[Tensor, Tensor, Tensor, Tensor], None]:
    """Return the native kernel's attention of one prompt's last tokens."""
    starts = torch.tensor([0, tokens], dtype=torch.int32, device=gpu_timing.DEVICE)
    lengths = torch.tensor([context], dtype=torch.int32, device=gpu_timing.DEVICE)

    def attend(q: Tensor, table: Tensor, kv: Tensor, out: Tensor) -> None:
        _kernels.attention_prefill(
            q, kv, starts, lengths, table, tokens, 0, HEAD_DIM**-0.5, 0.0, None, None, 1.0, 1.0, out
        )

    return attend


def _prompt(tokens: int, prefix: int) -> str:
    return f"{tokens} after {prefix}" if prefix else f"{tokens} causal"


def _flops(tokens: int, prefix: int) -> int:
    """Return the operations of both products, of the triangle and the keys before it."""
    return 2 * tokens * (tokens + 2 * prefix) * HEADS * HEAD_DIM


def _prefill_gathered(tokens: int, prefix: int = 0) -> Measurement:
    """Measure what `--prompt-attention auto` does with a long prompt, copies included."""
    context = prefix + tokens
    sets = [_pool(1, context) for _ in range(copies_past_l2(4 * context * KV_HEADS * HEAD_DIM))]
    q = random(tokens, HEADS, HEAD_DIM)
    out, library = torch.empty_like(q), _library()
    if library is None:  # its name in the result shows what was measured
        paged = _paged(tokens, context)
        calls: list[Call] = [functools.partial(paged, q, table, kv, out) for table, kv in sets]
    else:
        rows = cuda_sdpa.staging_rows(tokens)
        space = Workspace(
            random(2, KV_HEADS, cuda_sdpa.padded(context), HEAD_DIM), random(rows, HEADS, HEAD_DIM)
        )
        lengths = ((tokens, context),)
        calls = [
            functools.partial(
                GatheredAttention(
                    Gathering(library, 1, 1), CudaKvLayer(kv), HEAD_DIM**-0.5, space, _never
                ).attend,
                q, table, table[0], table[0], 0, lengths, out,
            )
            for table, kv in sets
        ]  # fmt: skip
    shape = f"{_prompt(tokens, prefix)}, {library or 'native'}"
    return "attention_prefill", shape, _flops(tokens, prefix), "bf16", calls, {}


@functools.cache
def _library() -> Library | None:
    return cuda_sdpa.choose_library(HEADS, KV_HEADS, HEAD_DIM, torch.bfloat16, gpu_timing.DEVICE)


def _never(*given: object) -> None:
    raise AssertionError("every prompt is gathered")


def _norm(rows: int) -> Measurement:
    num_bytes, weight = rows * HIDDEN * 6, random(HIDDEN, dtype=torch.float32)
    sets = [
        (random(rows, HIDDEN, dtype=torch.float32), random(rows, HIDDEN))
        for _ in range(copies_past_l2(num_bytes))
    ]
    calls: list[Call] = [
        functools.partial(_kernels.norm, x, weight, None, 1e-5, None, out) for x, out in sets
    ]

    peer = _compiled(
        lambda x: torch.nn.functional.rms_norm(x, (HIDDEN,), weight).bfloat16(), [x for x, _ in sets]
    )
    return "norm", f"{rows} rows", num_bytes, "copy", calls, {"torch.compile": peer}


def _compiled(function: Callable[[Tensor], Tensor], inputs: list[Tensor]) -> Call:
    """Return a call of a function compiled by torch.compile (Triton), which compiles at the first call."""

    @functools.cache
    def compiled() -> Any:
        return torch.compile(function)

    return in_turn([functools.partial(lambda x: compiled()(x), x) for x in inputs])


def _gate(rows: int) -> Measurement:
    num_bytes = rows * INTERMEDIATE * 6
    sets = [
        (random(rows, 2 * INTERMEDIATE), random(rows, INTERMEDIATE)) for _ in range(copies_past_l2(num_bytes))
    ]
    calls: list[Call] = [functools.partial(_kernels.gate, x, "silu", out) for x, out in sets]

    def gate(x: Tensor) -> Tensor:
        return torch.nn.functional.silu(x[:, :INTERMEDIATE]) * x[:, INTERMEDIATE:]

    peer = _compiled(gate, [x for x, _ in sets])
    return "gate", f"{rows} rows", num_bytes, "copy", calls, {"torch.compile": peer}


def _rope(rows: int) -> Measurement:
    width = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    num_bytes = rows * width * 4
    angles = torch.rand(rows, HEAD_DIM // 2, device=gpu_timing.DEVICE)
    cos, sin = angles.cos(), angles.sin()
    _, kv = _pool(1, -(-rows // BLOCK) * BLOCK)
    positions = torch.arange(rows, dtype=torch.int32, device=gpu_timing.DEVICE)
    slots, q = torch.randperm(rows, device=gpu_timing.DEVICE), random(rows, HEADS, HEAD_DIM)
    sets = [random(rows, width) for _ in range(copies_past_l2(num_bytes))]

    def call(qkv: Tensor) -> None:
        _kernels.rope_kv_write(qkv, positions, slots, cos, sin, *[None] * 4, False, 0.0, 1.0, 1.0, q, kv)

    calls: list[Call] = [functools.partial(call, one) for one in sets]
    return "rope_kv_write", f"{rows} rows", num_bytes, "copy", calls, {}


def _sample(rows: int) -> Measurement:
    sampler = make_sampler(rows, VOCAB, TOP_P)
    num_bytes = 4 * rows * VOCAB
    sets = [random(rows, VOCAB, dtype=torch.float32) * 3 for _ in range(copies_past_l2(num_bytes))]
    calls: list[Call] = [functools.partial(sampler, logits) for logits in sets]
    return "sample", f"{rows} rows, top-k and top-p", num_bytes, "read", calls, {}


def _product(tokens: int, rows: int, columns: int) -> Measurement:
    num_bytes = 2 * (rows * columns + tokens * (rows + columns))
    sets = [random(rows, columns) for _ in range(copies_past_l2(num_bytes))]
    a, out = random(tokens, columns), random(tokens, rows)
    calls: list[Call] = [functools.partial(_kernels.linear, a, w, None, False, out) for w in sets]
    peers: dict[str, Call] = {
        "torch.mm": in_turn([functools.partial(torch.mm, a, w.t(), out=out) for w in sets])
    }
    return "linear", f"{tokens} x {rows} x {columns} bf16", num_bytes, "read", calls, peers


def _quant_product(tokens: int, name: str) -> Measurement:
    rows, columns = 2 * INTERMEDIATE, HIDDEN
    sets = [random_codes(name, rows, columns)]
    sets += [random_codes(name, rows, columns) for _ in range(copies_past_l2(sets[0].nbytes) - 1)]
    a, out = random(tokens, columns), random(tokens, rows)
    calls: list[Call] = [
        functools.partial(
            _kernels.quant_linear, a, w.codes, w.scales, w.offsets, None, w.bits, w.zero, False, out
        )
        for w in sets
    ]
    plain = [random(rows, columns) for _ in range(copies_past_l2(2 * rows * columns))]
    peers: dict[str, Call] = {
        "torch.mm bf16": in_turn([functools.partial(torch.mm, a, w.t(), out=out) for w in plain])
    }
    num_bytes = sets[0].nbytes + 2 * tokens * (rows + columns)
    return "quant_linear", f"{tokens} x {rows} x {columns} {name}", num_bytes, "read", calls, peers


def _float8_product(tokens: int) -> Measurement:
    """Measure a product in FP8 and its rounding of activations, next to bfloat16, also after decoding."""
    rows, columns = 2 * INTERMEDIATE, HIDDEN
    sets = [float8(rows, columns).matrix for _ in range(copies_past_l2(rows * columns))]
    a, out = random(tokens, columns), random(tokens, rows)
    codes = torch.empty(tokens, columns, dtype=torch.float8_e4m3fn, device=a.device)
    scales = torch.empty(tokens, device=a.device)
    plain = [random(rows, columns) for _ in range(copies_past_l2(2 * rows * columns))]

    def call(weight: Float8Matrix) -> None:
        _kernels.quantise(a, False, codes, scales)
        _kernels.multiply_codes(codes, scales, weight.codes, weight.scales, out)

    def decode(weight: CudaQuantMatrix) -> None:
        weight.decode(plain[0])
        torch.mm(a, plain[0].t(), out=out)

    matrices = [each for each in sets if isinstance(each, CudaQuantMatrix)]
    calls: list[Call] = [
        functools.partial(call, found) for each in matrices if (found := float8_matrix(each))
    ]
    peers: dict[str, Call] = {
        "torch.mm bf16": in_turn([functools.partial(torch.mm, a, w.t(), out=out) for w in plain]),
        "dequantise and torch.mm": in_turn([functools.partial(decode, each) for each in matrices]),
    }
    num_bytes = rows * columns + 2 * tokens * (rows + columns)
    return "float8_product", f"{tokens} x {rows} x {columns}", num_bytes, "read", calls, peers


def _lora(tokens: int, ends: tuple[int, ...], columns: int) -> Measurement:
    """Measure what adapters add to a product, next to two products of torch for each adapter and piece."""
    rows, num_inner, num_used = ends[-1], len(ends) * RANK, min(tokens, ADAPTERS)
    num_down, num_up = num_inner * columns, rows * RANK
    num_bytes = 2 * num_used * (num_down + num_up) + tokens * (2 * columns + 8 * num_inner + 4 * rows)
    sets = [random(ADAPTERS, num_down + num_up) for _ in range(copies_past_l2(num_bytes))]
    adapters = torch.arange(tokens, device=gpu_timing.DEVICE, dtype=torch.int32) * num_used // tokens
    places = torch.tensor([[[RANK, 0]]] * ADAPTERS, dtype=torch.int32, device=gpu_timing.DEVICE)
    x, out = random(tokens, columns), random(tokens, rows)
    inner = random(tokens, len(ends) * MAX_RANK, dtype=torch.float32)
    first_end, second_end, *_ = (*ends, rows)

    def call(pool: Tensor) -> None:
        given = (adapters, places, pool, 0, MAX_RANK)
        _kernels.lora_down(x, *given, inner)
        _kernels.lora_up(inner, *given, columns, first_end, second_end, 1.0, out)

    def by_torch(pool: Tensor) -> None:
        for slot, part in enumerate(torch.arange(tokens).chunk(num_used)):
            mine = slice(int(part[0]), int(part[-1]) + 1)
            down, up = pool[slot, :num_down].view(-1, columns), pool[slot, num_down:].view(rows, RANK)
            values = x[mine] @ down.t()
            for piece, (start, stop) in enumerate(zip((0, *ends[:-1]), ends, strict=True)):
                out[mine, start:stop] += values[:, piece * RANK :][:, :RANK] @ up[start:stop].t()

    calls: list[Call] = [functools.partial(call, pool) for pool in sets]
    peers: dict[str, Call] = {
        "torch by adapter": in_turn([functools.partial(by_torch, pool) for pool in sets])
    }
    return "lora", f"{tokens} x {rows} x {columns}, {num_used} adapters", num_bytes, "read", calls, peers
