"""Graphs of operators, recorded and computed in float64 at the same time, as references for random programs.

A `Twin` holds a value of both. The float64 side sees all tokens of all sequences at once; the program may
compute them in any steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from tests.ops.helpers import angles, rope_table, rounded
from tests.reference.attention import attention
from tests.reference.experts import Mlp, experts, route
from tests.reference.layers import activate, linear, norm, rotate
from tests.support.batches import flat_rows, random_blocks
from tests.support.eager_ops import array_of, norm_weight
from tests.support.kv import poisoned_pool
from tests.support.random_weights import decoded_values, in_other_order, random_weight
from tgi_asgi import ops
from tgi_asgi.ops.packing import PackedLinear
from tgi_asgi.types import SamplingParams

EPS = 1e-5
BLOCK_SIZE = 16
ORDERED = "@"  # in a format, before the seed of an order of its columns
NUM_EXPERTS = 5


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a graph; few or none are multiples of 32."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int
    vocab: int = 67

    @property
    def width(self) -> int:
        """Width of queries and of the results of attention."""
        return self.heads * self.head_dim


@dataclass(frozen=True, eq=False, slots=True)
class Twin:
    """A recorded value and its float64 counterpart."""

    value: ops.Value
    exact: Tensor  # float64, [n_tokens, columns]; for queries [n_tokens, heads, head_dim]
    keys: Tensor | None = None  # only for queries: the keys that they attend to
    values: Tensor | None = None


@dataclass
class Graph:
    """The operators of `ops`, on twins.

    Attributes:
        lengths: Number of tokens of each sequence.
        formats: Formats of the weights, used in rotation; `Q8_0@3` has an order of columns, of seed 3.
        packing: Packing of the weights; if exact, activations are float32, otherwise those of codes are
            rounded to int8.
    """

    shape: Shape
    lengths: Sequence[int]
    formats: Sequence[str]
    packing: ops.Packing
    num_layers: int
    is_proportional: bool = False  # rotated pairs that are not interleaved
    ids: list[int] = field(init=False)
    exact_logits: Tensor = field(init=False)

    def __post_init__(self) -> None:
        shape = self.shape
        self.ids = torch.randint(shape.vocab, (sum(self.lengths),)).tolist()
        self.blocks = random_blocks(self.lengths, self._num_blocks, BLOCK_SIZE)
        self.pool = poisoned_pool(
            num_layers=self.num_layers, num_blocks=self._num_blocks, num_kv_heads=shape.kv_heads,
            head_dim=shape.head_dim, dtype="float32",
        )  # fmt: skip
        self.rope = rope_table(shape.rotary_dim, max(self.lengths))
        self.recorder = ops.Recorder()
        self._num_weights = self._num_norms = 0

    @property
    def _num_blocks(self) -> int:
        return sum(-(-length // BLOCK_SIZE) for length in self.lengths) + 1

    @property
    def _in_order(self) -> list[str]:
        """The formats without an order of columns, for weights that cannot have one."""
        return [format for format in self.formats if ORDERED not in format]

    def _source(self, rows: int, columns: int, formats: Sequence[str] | None = None) -> ops.WeightSource:
        """Make the next weight in the next format, or in F32 if its blocks do not fit the columns."""
        self._num_weights += 1
        formats = self.formats if formats is None else formats
        format, _, order = formats[self._num_weights % len(formats)].partition(ORDERED)
        if columns % ops.FORMATS[format].block_columns:
            format, order = "F32", ""
        source = random_weight(format, rows, columns, seed=self._num_weights)
        return in_other_order(source, seed=int(order)) if order else source

    def embed(self, factor: float, *, has_positions: bool = False) -> Twin:
        source = self._source(self.shape.vocab, self.shape.hidden, self._in_order)
        added = torch.randn(max(self.lengths), self.shape.hidden) if has_positions else None
        x = ops.embed(self.recorder.batch, ops.linear_weight(source, self.packing), factor, array_of(added))
        exact = decoded_values(source).double()[self.ids] * factor
        return Twin(x, exact if added is None else exact + added[self.positions])

    def norm_weight(self, columns: int) -> ops.NormWeight:
        """Make the next norm's weight, alternately of RMSNorm and of LayerNorm."""
        self._num_norms += 1
        bias = torch.rand(columns) if self._num_norms % 2 == 0 else None
        return norm_weight(torch.rand(columns) + 0.5, EPS, bias)

    def norm(self, x: Twin) -> Twin:
        weight = self.norm_weight(x.exact.shape[1])
        return Twin(ops.norm(x.value, weight), norm(x.exact, weight))

    def norm_in_place(self, x: Twin, num_groups: int = 1) -> Twin:
        width = x.exact.shape[1] // num_groups
        weight = self.norm_weight(width)
        exact = norm(x.exact.view(-1, num_groups, width), weight).view_as(x.exact)
        return Twin(ops.norm_in_place(x.value, weight), exact)

    def embed_add(self, rows: Twin, factor: float) -> Twin:
        source = self._source(self.shape.vocab, rows.value.columns, self._in_order)
        table = ops.linear_weight(source, self.packing, is_vocabulary=True)
        added = ops.embed_add(self.recorder.batch, table, rows.value, factor)
        return Twin(added, rows.exact + factor * decoded_values(source).double()[self.ids])

    def act_mul(self, gate: Twin, rows: Twin, activation: str, columns: int, first: int) -> Twin:
        weight, matrix = self._linear(gate, columns)
        product = linear(self._seen(gate, weight), matrix)
        out = ops.act_mul(ops.linear(gate.value, weight), rows.value, activation, first)
        return Twin(out, activate(product, activation) * rows.exact[:, first : first + columns])

    def activation(self, x: Twin) -> Twin:
        return Twin(ops.activation(x.value), x.exact)

    def linear(self, a: Twin) -> Twin:
        weight, matrix = self._linear(a, self.shape.hidden)
        return Twin(ops.linear(a.value, weight), linear(self._seen(a, weight), matrix))

    def linear_add(self, a: Twin, x: Twin, factor: float) -> Twin:
        weight, matrix = self._linear(a, self.shape.hidden)
        product = linear(self._seen(a, weight), matrix)
        return Twin(ops.linear_add(a.value, weight, x.value, factor), x.exact + factor * product)

    def norm_add(self, rows: Twin, x: Twin, factor: float, scale: float = 1.0) -> Twin:
        weight = self.norm_weight(self.shape.hidden)
        added = ops.norm_add(rows.value, weight, x.value, factor, scale)
        return Twin(added, scale * (x.exact + factor * norm(rows.exact, weight)))

    def up(self, a: Twin, activation: str) -> Twin:
        alphas = (0.8, 0.3) if activation == "xielu" else None
        weight, matrix = self._linear(a, self.shape.intermediate)
        out = ops.up(a.value, weight, activation, alphas)
        return Twin(out, activate(linear(self._seen(a, weight), matrix), activation, alphas))

    def gate_up(self, a: Twin, activation: str) -> Twin:
        sources = [self._source(self.shape.intermediate, a.value.columns) for _ in range(2)]
        weight = ops.gate_up_weight(sources[0], sources[1], self.packing)
        gate, up = (
            linear(_rounded(a, part), decoded_values(source))
            for part, source in zip((weight.made.parts[0], weight.made.parts[-1]), sources, strict=True)
        )
        return Twin(ops.gate_up(a.value, weight, activation), activate(gate, activation) * up)

    def experts(self, a: Twin, top_k: int) -> Twin:
        routing, weight, found = self._experts(a, top_k)
        return Twin(ops.experts(a.value, routing, weight), found)

    def experts_add(self, a: Twin, x: Twin, top_k: int, factor: float) -> Twin:
        routing, weight, found = self._experts(a, top_k)
        added = ops.experts_add(a.value, routing, weight, x.value, factor=factor)
        return Twin(added, x.exact + factor * found)

    def _experts(self, a: Twin, top_k: int) -> tuple[ops.Value, ops.ExpertsWeight, Tensor]:
        """Make experts chosen by a fixed correction and weighted by a router; return their exact sum last.

        If the router also chose them, float64 could choose differently between two near ties.
        """
        shape, columns = self.shape, a.value.columns
        made, mlps = [], []
        for _ in range(NUM_EXPERTS):
            sizes = [(shape.intermediate, columns)] * 2 + [(shape.hidden, shape.intermediate)]
            sources = [self._source(*size, self._in_order[:1]) for size in sizes]
            gate_up = ops.gate_up_weight(sources[0], sources[1], self.packing)
            made.append((gate_up, ops.linear_weight(sources[2], self.packing)))
            gate, up, down = map(decoded_values, sources)
            mlps.append(Mlp(gate, up, down))
        weight = ops.experts_weight(made, self.packing)
        router = random_weight("F32", NUM_EXPERTS, columns, seed=self._num_weights)
        logits = ops.linear(a.value, ops.linear_weight(router, self.packing))
        correction = 100.0 * torch.randperm(NUM_EXPERTS)
        scales = torch.rand(NUM_EXPERTS) + 0.5
        spec = ops.RouteSpec(
            NUM_EXPERTS, top_k, "sigmoid", correction.numpy(), is_renormalised=True,
            expert_scales=scales.numpy(),
        )  # fmt: skip
        of_input, inner = weight.made.precision, weight.made.inner_precision
        weights = route(linear(a.exact.float(), decoded_values(router)), spec)
        seen = rounded(a.exact.float(), of_input)
        found = experts(seen, weights, mlps, round_inner=lambda rows: rounded(rows.float(), inner))
        return ops.route(logits, spec), weight, found

    def gated_add(self, rows: Twin, a: Twin, x: Twin, factor: float) -> Twin:
        weight, matrix = self._linear(a, 1)
        gate = linear(self._seen(a, weight), matrix)
        added = ops.gated_add(rows.value, ops.linear(a.value, weight), x.value, factor)
        return Twin(added, x.exact + factor * gate.sigmoid() * rows.exact)

    def qkv(
        self, a: Twin, layer: int, norms: str | None, *, has_rope: bool, is_interleaved: bool = False,
        keys_of: Twin | None = None,
    ) -> Twin:  # fmt: skip
        """Add a qkv.

        Args:
            norms: None, "heads", "values" (of heads, and of values without a weight), "whole" (width),
                "layer" (LayerNorms of heads) or "last".
            keys_of: The query whose keys and values this one reads, instead of its own.
        """
        shape, columns = self.shape, a.value.columns
        counts = (shape.heads, shape.kv_heads, shape.kv_heads)[: 1 if keys_of is not None else 3]
        sources = [self._source(count * shape.head_dim, columns) for count in counts]
        is_each = norms in ("whole", "layer")
        sizes = [count * shape.head_dim if is_each else shape.head_dim for count in (counts * 2)[:2]]
        weights = [
            norm_weight(torch.rand(size) + 0.5, EPS, torch.rand(size) if norms == "layer" else None)
            for size in sizes
        ]
        head_norms = None
        if norms is not None:
            is_whole, is_last = norms == "whole", norms == "last"
            head_norms = ops.HeadNorms(weights[0], weights[1], is_whole, is_last, norms == "values")
        clip = 1.5 if norms is None else None
        of_weight = ops.QkvHeads(
            shape.heads, shape.kv_heads, shape.head_dim, shape.rotary_dim, is_interleaved,
            is_proportional=self.is_proportional and not is_interleaved, has_keys=keys_of is None,
        )  # fmt: skip
        weight = ops.qkv_weight(sources, self.packing, of_weight, norms=head_norms)
        parts = weight.made.parts * (len(counts) if len(weight.made.parts) == 1 else 1)
        heads = []
        for index, (source, part) in enumerate(zip(sources, parts, strict=True)):
            rows = linear(_rounded(a, part), decoded_values(source))
            rows = rows if clip is None else rows.clamp(-clip, clip)
            each = rows.view(len(rows), -1, shape.head_dim)
            if norms not in (None, "last") and index < 2:
                each = norm(rows if norms == "whole" else each, weights[index]).view_as(each)
            if has_rope and index < 2:
                cos, sin = angles(self.rope, self.positions)
                each = self._rotate(each, cos, sin, is_interleaved=is_interleaved)
            if norms == "last" and index < 2:
                each = norm(each, weights[index])
            if norms == "values" and index == 2:
                each = norm(each, norm_weight(torch.ones(shape.head_dim), EPS))
            heads.append(each)
        if keys_of is not None:
            assert keys_of.keys is not None
            assert keys_of.values is not None
            heads += [keys_of.keys, keys_of.values]
        q = ops.qkv(a.value, weight, self.pool.layers[layer], self.rope if has_rope else None, clip)
        return Twin(q, *heads)

    def _rotate(self, heads: Tensor, cos: Tensor, sin: Tensor, *, is_interleaved: bool) -> Tensor:
        if is_interleaved or not self.is_proportional:
            return rotate(heads, cos, sin, is_interleaved=is_interleaved)
        half, pairs = self.shape.head_dim // 2, self.shape.rotary_dim // 2
        turned = torch.cat([heads[..., :pairs], heads[..., half : half + pairs]], -1)
        first, second = rotate(turned, cos, sin).split(pairs, -1)
        return torch.cat([first, heads[..., pairs:half], second, heads[..., half + pairs :]], -1)

    def attention(self, q: Twin, layer: int, window: int | None) -> Twin:
        scale = self.shape.head_dim**-0.5
        out = ops.attention(q.value, self.pool.layers[layer], ops.AttentionSpec(scale, window))
        assert q.keys is not None
        assert q.values is not None
        parts = (part.split(list(self.lengths)) for part in (q.exact, q.keys, q.values))
        found = [attention(each, key, value, scale, window) for each, key, value in zip(*parts, strict=True)]
        return Twin(out, torch.cat(found))

    def head(self, x: Twin, scale: float, cap: float) -> None:
        source = self._source(self.shape.vocab, self.shape.hidden, self._in_order)
        last = self.norm_weight(self.shape.hidden)
        weight = ops.linear_weight(source, self.packing)
        ops.head(x.value, last, weight, scale=scale, cap=cap)
        logits = linear(rounded(norm(x.exact, last).float(), weight.made.precision), decoded_values(source))
        self.exact_logits = logits * scale
        if cap:
            self.exact_logits = cap * (self.exact_logits / cap).tanh()

    @property
    def positions(self) -> Tensor:
        """Positions of all tokens."""
        return torch.cat([torch.arange(length) for length in self.lengths])

    def _linear(self, a: Twin, rows: int) -> tuple[ops.LinearWeight, Tensor]:
        source = self._source(rows, a.value.columns)
        return ops.linear_weight(source, self.packing), decoded_values(source)

    def _seen(self, a: Twin, weight: ops.LinearWeight) -> Tensor:
        return _rounded(a, weight.made)

    # The program and its steps.

    def program(self) -> ops.CpuProgram:
        total = sum(self.lengths)
        limits = ops.StepLimits(
            max_tokens=total, max_sequences=len(self.lengths), max_rows=total, max_context=max(self.lengths)
        )
        return ops.CpuProgram(self.recorder, limits)

    def step(self, spans: Sequence[tuple[int, int]]) -> tuple[ops.FlatRows, list[int]]:
        """Return the step that computes these positions of each sequence, and the indices of its tokens."""
        starts = torch.tensor([0, *self.lengths]).cumsum(0).tolist()
        tokens = [start + at for start, span in zip(starts, spans, strict=False) for at in range(*span)]
        used = [index for index, (start, stop) in enumerate(spans) if start < stop]
        batch = flat_rows(
            [spans[index] for index in used], [self.blocks[index] for index in used], BLOCK_SIZE,
            ids=[self.ids[token] for token in tokens],
        )  # fmt: skip
        return batch, tokens


def _rounded(a: Twin, part: PackedLinear) -> Tensor:
    """Return an activation as a product reads it: rounded in blocks of columns in the product's order."""
    if part.order is None:
        return rounded(a.exact.float(), part.precision)
    order = torch.from_numpy(part.order.indices.astype(np.int64))
    found = torch.empty_like(a.exact)
    found[:, order] = rounded(a.exact[:, order].float(), part.precision)
    return found


def greedy_state(num_slots: int, vocab: int) -> ops.SampleState:
    """Return a state whose slots all sample the best token and list every log-probability."""
    state = ops.SampleState(num_slots, vocab)
    params = SamplingParams(temperature=0.0, logprobs=vocab)
    for slot in range(num_slots):
        state.start(slot, params, choice=0, prompt_ids=[0])
    return state
