"""A recorded model as a program for a CUDA device, the counterpart of `cpu_program.py`.

A call becomes a launch of a native kernel or a torch product, on buffers with fixed addresses, so that the
list can be captured as a CUDA graph. The module imports without CUDA; the kernels exist only if
tgi_asgi._cuda was built.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tgi_asgi.ops import calls
from tgi_asgi.ops.adapters import AdaptableWeight
from tgi_asgi.ops.arrays import Floats
from tgi_asgi.ops.buffers import Buffers, Liveness
from tgi_asgi.ops.cuda_adapters import CudaAdapterLayout
from tgi_asgi.ops.cuda_attention import Gathering
from tgi_asgi.ops.cuda_batch import INPUTS, SIZES, CudaBatch
from tgi_asgi.ops.cuda_experts import CudaExperts, Routing
from tgi_asgi.ops.cuda_float8 import TOKEN_MULTIPLE, Float8Product, can_multiply, float8_matrix
from tgi_asgi.ops.cuda_image_rows import OwnAngles, place_rows
from tgi_asgi.ops.cuda_kv import CudaKvLayer
from tgi_asgi.ops.cuda_linear import CudaLinear, PlainLinear, QuantLinear
from tgi_asgi.ops.cuda_list import (
    Condition,
    Input,
    LaunchList,
    Rows,
    Size,
    decodes_of,
    prompts_of,
    tokens_of,
)
from tgi_asgi.ops.cuda_modes import CudaModes
from tgi_asgi.ops.cuda_prompts import PromptLibraries
from tgi_asgi.ops.cuda_quant import CudaQuantMatrix, DeviceMatrix, joined_halves
from tgi_asgi.ops.cuda_scratch import Scratch
from tgi_asgi.ops.cuda_shards import CudaShard, WholeLogits
from tgi_asgi.ops.cuda_weights import DeviceWeights
from tgi_asgi.ops.layout import round_up
from tgi_asgi.ops.norm_weight import HeadNorms, NormWeight
from tgi_asgi.ops.qkv_heads import QkvHeads
from tgi_asgi.ops.recorder import Call, Kind, Recorder, Value
from tgi_asgi.ops.rope import RopeTable
from tgi_asgi.ops.step_limits import StepLimits
from tgi_asgi.ops.weights import ExpertsWeight, LinearWeight

_kernels: Any = torch.ops.tgi_cuda


class CudaProgram:
    """Runs steps of a recorded model on a device.

        program = CudaProgram(recorder, limits, CudaModes(), max_blocks=512, device=device)
        program.forward(batch)
        program.head(rows)
        program.logits[: len(rows)]

    Args:
        max_blocks: Number of columns of the block tables.
        shard: The shard that it computes, if the model is split.
        adapters: Adapters that tokens of a step may have.
        turns_by: The rotary table, if any, of which a step may bring rows of its own.

    Attributes:
        device: Where it runs.
        own_angles: Takes these rows.
    """

    def __init__(
        self,
        recorder: Recorder,
        limits: StepLimits,
        modes: CudaModes,
        *,
        max_blocks: int,
        device: torch.device,
        shard: CudaShard | None = None,
        adapters: CudaAdapterLayout | None = None,
        turns_by: RopeTable | None = None,
    ) -> None:
        self.device = device
        self._shard, self._adapters = shard, adapters
        self._max_tokens = round_up(limits.max_tokens, TOKEN_MULTIPLE)  # rows of buffers
        self._limits, self._max_blocks = limits, max_blocks
        self.own_angles = None if turns_by is None else OwnAngles(turns_by, limits.max_tokens, device)
        self._modes, self._dtype = modes, modes.dtype
        self._float8_products: list[Float8Product] = []
        self._launches = LaunchList(SIZES, INPUTS)
        self._head = LaunchList((Size.ROWS,), (Input.ROWS,))
        self._logits = torch.empty(0)
        self._last_norm: tuple[Tensor, tuple[Tensor, Tensor | None, float]] | None = None
        max_codes = 0 if modes.is_batch_invariant else _max_codes(recorder.calls)
        self._scratch = Scratch(modes.dtype, device, max_codes)
        self._libraries = PromptLibraries(modes.prompt_attention, self._launches, self._scratch, max_blocks)
        self._values = Buffers()
        self._weights = DeviceWeights(modes.dtype, device)
        self._experts = CudaExperts(
            self._launches, self._scratch, self._weights, limits.max_tokens,
            is_streamed=modes.is_batch_invariant,
        )  # fmt: skip
        self._plans: dict[int, Tensor] = {}  # for decode attention, by window
        liveness = Liveness(recorder.calls, lambda call: [])
        for index, call in enumerate(recorder.calls):
            _EMITTERS[type(call)](self, call)
            self._values.free(liveness.ending_at(index))
        self._weights.clear()
        self._launches.finish()
        self._head.finish()

    @property
    def logits(self) -> Tensor:
        """The buffer [max_rows, vocab] float32 that `head` writes."""
        return self._logits

    @property
    def num_float8_products(self) -> int:
        """Number of products that are in FP8 in steps of many tokens."""
        return sum(product.is_used for product in self._float8_products)

    @property
    def gathering(self) -> Gathering | None:
        """Which prompts torch's attention computes; None: none."""
        return self._libraries.gathering

    def num_launches(self, batch: CudaBatch, num_rows: int) -> int:
        """Return how many operators compute a batch and the logits of `num_rows` rows."""
        return self._launches.count(batch.sizes) + self._head.count((num_rows,))

    def forward(self, batch: CudaBatch) -> None:
        """Compute the residual of all tokens and write their keys and values, without the GIL."""
        self._launches.run(batch.sizes, batch.tensors)

    def head(self, rows: Tensor) -> None:
        """Compute the logits of rows [n_rows] int32 of the last batch into the first rows of `logits`."""
        self._head.run((rows.shape[0],), (rows,))

    def hidden(self, tokens: Sequence[int]) -> Tensor:
        """Return the states [n_tokens, hidden] float32 after the last norm, of tokens of the last batch.

        A token's bits do not depend on the other tokens: the norm's kernel computes each in a block of its
        own.
        """
        assert self._last_norm is not None, "the model has a head"
        x, (weight, bias, eps) = self._last_norm
        # Not made there: torch would wait for the step that computes `x`.
        rows = torch.tensor(tokens, dtype=torch.int32).to(self.device, non_blocking=True)
        out = torch.empty(len(tokens), x.shape[1], dtype=torch.float32, device=self.device)
        _kernels.norm(x, weight, bias, eps, rows, out)
        return out

    # Lowering of each operator.

    def _embed(self, call: calls.Embed) -> None:
        table = self._weights.dense(call.table.made)
        out = tokens_of(self._make(call.out, torch.float32))
        embed = "tgi_cuda::embed" if self._shard is None else self._shard.embed
        self._launches.add(embed, Input.IDS, table, out)
        if call.factor != 1.0:
            self._launches.add("aten::mul_.Scalar", out, call.factor)
        if call.positions is not None:
            shape = (self._max_tokens, call.out.columns)
            added = tokens_of(self._scratch.buffer("positions", shape, torch.float32))
            learnt = self._weights.floats(call.positions)
            self._launches.add("aten::index_select.out", learnt, 0, Input.POSITIONS, added)
            self._launches.add("aten::add_.Tensor", out, added)

    def _image_rows(self, call: calls.ImageRows) -> None:
        place = functools.partial(place_rows, level=call.level)
        self._launches.add(
            place, tokens_of(self._in(call.x)), Input.IMAGE_TOKENS, Input.IMAGE_ROWS,
            when=Condition(Size.IMAGE_ROWS, 1),
        )  # fmt: skip

    def _activation(self, call: calls.Activation) -> None:
        x, out = self._in(call.x), self._make(call.out, self._dtype)
        self._launches.add("aten::copy_", tokens_of(out), tokens_of(x))

    def _norm(self, call: calls.Norm) -> None:
        x, out = self._in(call.x), self._make(call.out, self._dtype)
        self._launches.add("tgi_cuda::norm", tokens_of(x), *self._norm_of(call.weight), None, tokens_of(out))

    def _norm_add(self, call: calls.NormAdd) -> None:
        if call.scale != 1 or call.x.kind is Kind.ROWS:
            self._refuse(call)
        rows, x, norm = self._in(call.rows), self._in(call.x), self._norm_of(call.weight)
        self._launches.add("tgi_cuda::norm_add", tokens_of(rows), *norm, call.factor, tokens_of(x))

    def _norm_in_place(self, call: calls.NormInPlace) -> None:
        if call.x.kind is Kind.ROWS:
            self._refuse(call)
        x = tokens_of(self._in(call.x))
        self._launches.add("tgi_cuda::norm", x, *self._norm_of(call.weight), None, x)

    def _norm_of(self, weight: NormWeight) -> tuple[Tensor, Tensor | None, float]:
        """Return a norm's weight and bias on the device, and its eps."""
        return self._weights.move(weight.weight, torch.float32), self._weights.floats(weight.bias), weight.eps

    def _qkv(self, call: calls.Qkv) -> None:
        layer, weight = _layer_of(call.cache), call.weight
        heads, norms = weight.heads, weight.norms
        has_value_norm = norms is not None and norms.has_values
        if heads.is_proportional or not heads.has_keys or has_value_norm:
            self._refuse(call)
        made: DeviceMatrix = weight.made
        product = self._product(call.a, made, sum(weight.heads.rows), "qkv")
        self._adapt(weight, call.a, product)
        if call.clip is not None:
            self._launches.add("aten::clamp_", tokens_of(product), -call.clip, call.clip)
        if norms is not None and norms.is_whole:
            self._whole_norms(product, weight.heads, norms)
        cos, sin = self._table(call.rope)
        q = self._heads(self._make(call.out, self._dtype), weight.heads.head_dim)
        parts: list[Tensor | None] = [None] * 4
        eps, is_last = 0.0, False
        if norms is not None and not norms.is_whole:
            query, key = norms.query, norms.key
            parts = [
                None if part is None else self._head_norm(part, weight.heads)
                for part in (query.weight, key.weight, query.bias, key.bias)
            ]
            eps, is_last = query.eps, norms.is_last
        self._launches.add(
            "tgi_cuda::rope_kv_write", tokens_of(product), Input.POSITIONS, Input.SLOTS, cos, sin, *parts,
            is_last, eps, layer.key_scale, layer.value_scale, tokens_of(q), layer.pool,
        )  # fmt: skip

    def _whole_norms(self, product: Tensor, heads: QkvHeads, norms: HeadNorms) -> None:
        """Normalise all heads of queries together, and all heads of keys, in place."""
        first = 0
        for norm in (norms.query, norms.key):
            scale = self._head_norm(norm.weight, heads)
            part = tokens_of(product[:, first : first + scale.numel()])
            wide = tokens_of(self._scratch.buffer("heads", (self._max_tokens, scale.numel()), torch.float32))
            self._launches.add("aten::copy_", wide, part)
            self._launches.add("tgi_cuda::norm", wide, scale, None, norms.query.eps, None, wide)
            self._launches.add("aten::copy_", part, wide)
            first += scale.numel()

    def _head_norm(self, norm: Floats, heads: QkvHeads) -> Tensor:
        """Return weights or biases of head norms on the device, in the device's row order."""
        if heads.is_interleaved:
            norm = norm[joined_halves(heads, norm.size // heads.head_dim)]
        return self._weights.move(norm, torch.float32)

    def _table(self, rope: RopeTable | None) -> tuple[Tensor, Tensor]:
        """Return cosines and sines on the device; empty tables [1, 0] without rotation."""
        if self.own_angles is not None and rope is self.own_angles.rope:
            return self.own_angles.cos, self.own_angles.sin
        if rope is not None:
            return self._weights.move(rope.cos, torch.float32), self._weights.move(rope.sin, torch.float32)
        none = self._scratch.buffer("no angles", (1, 0), torch.float32)
        return none, none

    def _attention(self, call: calls.Attention) -> None:
        """Launch one kernel for sequences of one token, and another kernel or library for the rest."""
        layer, spec = _layer_of(call.cache), call.spec
        if spec.chunk is not None:
            raise ValueError("no CUDA kernel supports attention with `chunk`")
        if call.gate is not None:
            raise ValueError("no CUDA kernel supports attention with `gate`")
        block_size, head_dim = int(layer.pool.shape[3]), call.head_dim
        query = self._heads(self._in(call.q), head_dim)
        out = self._heads(self._make(call.out, self._dtype), head_dim)
        num_bytes = _kernels.attention_workspace_bytes(
            self._limits.max_sequences, self._max_blocks, block_size, query.shape[1], head_dim
        )
        workspace = self._scratch.buffer("workspace", (num_bytes,), torch.uint8)
        seen = spec.window or 0  # the kernels use 0 for no window
        plan = self._plan(block_size, seen)
        kind = (
            seen, spec.scale, spec.soft_cap or 0.0, self._weights.floats(spec.sinks),
            self._weights.floats(spec.slopes), layer.key_scale, layer.value_scale,
        )  # fmt: skip
        self._launches.add(
            "tgi_cuda::attention_decode", decodes_of(query), layer.pool, decodes_of(Input.CONTEXT_LEN),
            decodes_of(Input.BLOCK_TABLE), *kind, plan, workspace, decodes_of(out),
            when=Condition(Size.DECODES, 1),
        )  # fmt: skip
        is_by_library = self._libraries.add(layer, spec, query, kind, out)
        self._launches.add(
            "tgi_cuda::attention_prefill", tokens_of(query), layer.pool, prompts_of(Input.QUERY_START),
            prompts_of(Input.CONTEXT_LEN), prompts_of(Input.BLOCK_TABLE), Size.MAX_QUERY_LEN, *kind,
            tokens_of(out),
            when=Condition(Size.UNKNOWN_PROMPTS if is_by_library else Size.PROMPTS, 1),
        )  # fmt: skip

    def _plan(self, block_size: int, window: int) -> Tensor:
        """Return the plan [max_sequences + 1] of layers with this window; the first of them computes it."""
        if window not in self._plans:
            plan = torch.zeros(self._limits.max_sequences + 1, dtype=torch.int32, device=self.device)
            self._plans[window] = plan
            self._launches.add(
                "tgi_cuda::attention_plan", decodes_of(Input.CONTEXT_LEN), decodes_of(Input.BLOCK_TABLE),
                block_size, window, plan, when=Condition(Size.DECODES, 1),
            )  # fmt: skip
        return self._plans[window]

    def _linear(self, call: calls.Linear) -> None:
        source, linear = self._in(call.a), self._product_of(call.weight.made)
        out = self._make(call.out, torch.float32)
        linear.multiply(self._launches, source, out, Size.TOKENS)
        self._adapt(call.weight, call.a, out)
        self._add_up(call.weight, out)

    def _linear_add(self, call: calls.LinearAdd) -> None:
        """Add the product to the residual in float32."""
        source, x, linear = self._in(call.a), self._in(call.x), self._product_of(call.weight.made)
        product = self._scratch.buffer("linear_add", (self._max_tokens, call.weight.rows))
        is_part = self._is_part(call.weight)
        if call.factor == 1.0 and not is_part:
            linear.add(self._launches, source, x, product, Size.TOKENS)
        else:
            linear.multiply(self._launches, source, product, Size.TOKENS)
            if is_part:  # what adapters add is a part, too
                self._adapt(call.weight, call.a, product)
            self._add_up(call.weight, product)
            self._launches.add("tgi_cuda::residual_add", tokens_of(product), call.factor, tokens_of(x))
        if not is_part:
            self._adapt(call.weight, call.a, x, call.factor)

    def _is_part(self, weight: LinearWeight | ExpertsWeight) -> bool:
        """Return whether other devices hold more of the weight's columns, or of each expert's."""
        return weight.is_partial and self._shard is not None

    def _add_up(self, weight: LinearWeight | ExpertsWeight, product: Tensor) -> None:
        """Sum a partial product over all devices."""
        shard = self._shard
        if shard is None or not weight.is_partial:
            return
        parts = None
        if self._modes.is_batch_invariant:
            count = shard.group.count * product.numel()
            parts = self._scratch.buffer("parts", (count,), product.dtype)
        self._launches.add(functools.partial(shard.add, parts=parts), tokens_of(product))

    def _up(self, call: calls.Up) -> None:
        product = self._product(call.a, call.weight.made, call.weight.rows, "up product")
        self._adapt(call.weight, call.a, product)
        out = tokens_of(self._make(call.out, self._dtype))
        self._launches.add("tgi_cuda::activate", tokens_of(product), call.activation, *call.alphas, out)

    def _gate_up(self, call: calls.GateUp) -> None:
        rows = 2 * call.weight.intermediate_size
        product = self._product(call.a, call.weight.made, rows, "gate_up product")
        self._adapt(call.weight, call.a, product)
        out = tokens_of(self._make(call.out, self._dtype))
        self._launches.add("tgi_cuda::gate", tokens_of(product), call.activation, out)

    def _route(self, call: calls.Route) -> None:
        spec = call.spec
        if spec.expert_scales is not None:
            raise ValueError("no CUDA kernel supports routing with `expert_scales`")
        routing = self._values.assign(
            call.out, "routing", (spec.num_experts, spec.top_k),
            lambda: Routing.make(self._max_tokens, spec.top_k, spec.num_experts, self.device),
        )  # fmt: skip
        self._experts.route(self._in(call.logits), spec, routing)

    def _experts_add(self, call: calls.ExpertsAdd) -> None:
        routing, x = self._values.of(call.routing, "routing"), self._in(call.x)
        if not self._is_part(call.weight):
            self._experts.add(call, self._in(call.a), routing, x, call.factor)
            return
        shape = (self._max_tokens, call.weight.columns)
        total = self._scratch.buffer("experts' sum", shape, torch.float32)
        product = self._scratch.buffer("linear_add", shape)
        self._launches.add("aten::zero_", tokens_of(total))
        self._experts.add(call, self._in(call.a), routing, total, 1.0)
        self._launches.add("aten::copy_", tokens_of(product), tokens_of(total))
        self._add_up(call.weight, product)
        self._launches.add("tgi_cuda::residual_add", tokens_of(product), call.factor, tokens_of(x))

    def _gated_add(self, call: calls.GatedAdd) -> None:
        rows, gate, x = (tokens_of(self._in(value)) for value in (call.rows, call.gate, call.x))
        self._launches.add("tgi_cuda::gated_add", rows, gate, call.factor, x)

    def _refuse(self, call: Call) -> None:
        raise TypeError(f"{type(call).__name__} is computed on CPUs only, not on CUDA")

    def _make_head(self, call: calls.Head) -> None:
        x, norm = self._last_norm = self._in(call.x), self._norm_of(call.norm)
        linear = self._product_of(call.weight.made)
        max_rows = self._limits.max_rows
        normed = self._scratch.buffer("head", (max_rows, call.weight.columns))
        shape = (max_rows, call.weight.rows)
        self._logits = logits = torch.zeros(shape, dtype=torch.float32, device=self.device)
        out = Rows(logits, Size.ROWS)
        self._head.add("tgi_cuda::norm", x, *norm, Input.ROWS, Rows(normed, Size.ROWS))
        linear.multiply(self._head, normed, logits, Size.ROWS)
        if call.scale != 1.0:
            self._head.add("aten::mul_.Scalar", out, call.scale)
        if call.cap != 0.0:
            self._head.add("aten::div_.Scalar", out, call.cap)
            self._head.add("aten::tanh_", out)
            self._head.add("aten::mul_.Scalar", out, call.cap)
        if self._shard is not None:
            whole = WholeLogits(self._shard, max_rows, self.device)
            self._head.add(whole.join, out)
            self._logits = whole.logits

    def _product(self, a: Value, made: DeviceMatrix, rows: int, name: str) -> Tensor:
        """Launch `a @ W.T (+ bias)`; return its output buffer."""
        out = self._scratch.buffer(name, (self._max_tokens, rows))
        self._product_of(made).multiply(self._launches, self._in(a), out, Size.TOKENS)
        return out

    def _adapt(self, weight: AdaptableWeight, a: Value, out: Tensor, factor: float = 1.0) -> None:
        """Launch what adapters add to a product of their tokens, if there may be any."""
        if self._adapters is not None:
            self._adapters.launch(self._launches, self._scratch, weight, self._in(a), out, factor)

    def _product_of(self, made: DeviceMatrix) -> CudaLinear:
        """Return the product with this weight, which is moved to the device."""
        if not isinstance(made, DeviceMatrix):
            raise TypeError("a CUDA step is recorded with a device's weights: make them with a `Repacking`")
        bias = self._weights.floats(made.bias)
        matrix = self._weights.matrix(made)
        if isinstance(matrix, CudaQuantMatrix):
            return QuantLinear(
                matrix, bias, self._scratch, is_batch_invariant=self._modes.is_batch_invariant,
                float8=self._float8_product(matrix) if self._modes.has_float8_products else None,
            )  # fmt: skip
        return PlainLinear(matrix, bias, self._scratch, is_batch_invariant=self._modes.is_batch_invariant)

    def _float8_product(self, matrix: CudaQuantMatrix) -> Float8Product | None:
        """Return the product in FP8 for many tokens; None: the scales are not those of such a product."""
        found = float8_matrix(matrix)
        if found is None or not can_multiply(self.device, self._dtype, has_groups=found.has_groups):
            return None
        self._float8_products.append(Float8Product(found, self._scratch))
        return self._float8_products[-1]

    def _make(self, value: Value, dtype: torch.dtype) -> Tensor:
        """Assign a value its buffer [max_tokens, columns]."""
        shape = (self._max_tokens, value.columns)
        made: Tensor = self._values.assign(
            value, "rows", (shape, dtype), lambda: torch.zeros(shape, dtype=dtype, device=self.device)
        )
        return made

    def _in(self, value: Value) -> Tensor:
        """Return the buffer of a value."""
        found: Tensor = self._values.of(value, "rows")
        return found

    def _heads(self, rows: Tensor, head_dim: int) -> Tensor:
        """Return rows as [max_tokens, heads, head_dim]."""
        return rows.view(self._max_tokens, -1, head_dim)


_CPU_ONLY = (
    calls.GatedNorm, calls.ShortConv, calls.SelectiveScan, calls.ChannelScan, calls.DeltaRule,
    calls.LatentQkv, calls.HeadsLinear, calls.EmbedAdd, calls.ActMul, calls.Experts,
)  # fmt: skip
_EMITTERS: dict[type[Call], Callable[[CudaProgram, Any], None]] = {
    calls.Embed: CudaProgram._embed,
    calls.ImageRows: CudaProgram._image_rows,
    calls.Activation: CudaProgram._activation,
    calls.Norm: CudaProgram._norm,
    calls.NormAdd: CudaProgram._norm_add,
    calls.NormInPlace: CudaProgram._norm_in_place,
    calls.Qkv: CudaProgram._qkv,
    calls.Attention: CudaProgram._attention,
    calls.Linear: CudaProgram._linear,
    calls.LinearAdd: CudaProgram._linear_add,
    calls.Up: CudaProgram._up,
    calls.GateUp: CudaProgram._gate_up,
    calls.Route: CudaProgram._route,
    calls.ExpertsAdd: CudaProgram._experts_add,
    calls.GatedAdd: CudaProgram._gated_add,
    calls.Head: CudaProgram._make_head,
    **dict.fromkeys(_CPU_ONLY, CudaProgram._refuse),
}


def _max_codes(recorded: Sequence[Call]) -> int:
    """Return the number of weights in the largest quantised matrix that a product uses."""
    made = (getattr(getattr(call, "weight", None), "made", None) for call in recorded)
    matrices = (found.matrix for found in made if isinstance(found, DeviceMatrix))
    shapes = [matrix.shape for matrix in matrices if isinstance(matrix, CudaQuantMatrix)]
    return max((rows * columns for rows, columns in shapes), default=0)


def _layer_of(cache: object) -> CudaKvLayer:
    if not isinstance(cache, CudaKvLayer):
        raise TypeError("a CUDA step is recorded with `CudaKvLayer`s")
    return cache
