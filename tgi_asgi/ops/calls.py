"""The calls in a recording: one plain struct per operator, with its weights and its input and output values.

`recorder.py` collects them; `cpu_calls.py` and `cuda.py` turn them into kernel calls, in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass

from tgi_asgi.ops.arrays import Floats
from tgi_asgi.ops.attention_spec import AttentionSpec
from tgi_asgi.ops.kv import KvCache, KvLayer
from tgi_asgi.ops.norm_weight import NormWeight
from tgi_asgi.ops.recorder import Call, Value
from tgi_asgi.ops.recurrent_weights import (
    ChannelScanWeight,
    DeltaRuleWeight,
    SelectiveScanWeight,
    ShortConvWeight,
)
from tgi_asgi.ops.rope import RopeTable
from tgi_asgi.ops.routing import ClampedGate, RouteSpec
from tgi_asgi.ops.states import StateLayer
from tgi_asgi.ops.weights import ExpertsWeight, GateUpWeight, HeadsWeight, LinearWeight, QkvWeight


@dataclass(frozen=True, eq=False, slots=True)
class Embed(Call):
    """out = factor * table[ids] (+ positions[position])"""

    table: LinearWeight
    factor: float
    positions: Floats | None


@dataclass(frozen=True, eq=False, slots=True)
class EmbedAdd(Call):
    """out = rows + factor * table[ids]"""

    table: LinearWeight
    rows: Value
    factor: float


@dataclass(frozen=True, eq=False, slots=True)
class ImageRows(Call):
    """out = x with images' rows of a level in place of their tokens' (level 0), or added to them"""

    x: Value
    level: int


@dataclass(frozen=True, eq=False, slots=True)
class Activation(Call):
    """out = the first columns of x, or all"""

    x: Value


@dataclass(frozen=True, eq=False, slots=True)
class Norm(Call):
    """out = norm(x)"""

    x: Value
    weight: NormWeight


@dataclass(frozen=True, eq=False, slots=True)
class NormAdd(Call):
    """out = scale * (x + factor * norm(rows))"""

    rows: Value
    weight: NormWeight
    x: Value
    factor: float
    scale: float


@dataclass(frozen=True, eq=False, slots=True)
class NormInPlace(Call):
    """out = norm(x), or the norms of groups of its columns, or of some columns only, which replaces x"""

    x: Value
    weight: NormWeight
    first_column: int | None  # of the only columns; None: all


@dataclass(frozen=True, eq=False, slots=True)
class Qkv(Call):
    """out = the rotated queries; keys and values go to the cache if the weight has them."""

    a: Value
    weight: QkvWeight
    cache: KvCache
    rope: RopeTable | None
    clip: float | None  # q, k and v are first clamped to [-clip, clip]
    query_scales: Floats | None  # [positions] float32, factors applied to the queries last


@dataclass(frozen=True, eq=False, slots=True)
class LatentQkv(Call):
    """out = each head's columns of `absorbed` and rotated columns of `rotary`; latents go to the cache."""

    absorbed: Value
    rotary: Value
    rotary_column: int  # first column of the queries in `rotary`
    latents: Value
    norm: NormWeight
    rope: RopeTable
    cache: KvLayer


@dataclass(frozen=True, eq=False, slots=True)
class HeadsLinear(Call):
    """out = for each head, its columns of a @ its W.T"""

    a: Value
    weight: HeadsWeight


@dataclass(frozen=True, eq=False, slots=True)
class Attention(Call):
    """out = softmax(scores) @ values (* sigmoid(gate)), with scores as the spec defines them"""

    q: Value
    cache: KvCache
    head_dim: int
    value_dim: int
    spec: AttentionSpec
    gate: Value | None


@dataclass(frozen=True, eq=False, slots=True)
class Linear(Call):
    """out = a @ W.T (+ bias)"""

    a: Value
    weight: LinearWeight


@dataclass(frozen=True, eq=False, slots=True)
class LinearAdd(Call):
    """out = x + factor * (a @ W.T (+ bias))"""

    a: Value
    weight: LinearWeight
    x: Value
    factor: float


@dataclass(frozen=True, eq=False, slots=True)
class Up(Call):
    """out = f(a @ W.T (+ bias))"""

    a: Value
    weight: LinearWeight
    activation: str
    alphas: tuple[float, float]  # xIELU's


@dataclass(frozen=True, eq=False, slots=True)
class GateUp(Call):
    """out = f(a @ gate.T) * (a @ up.T)"""

    a: Value
    weight: GateUpWeight
    activation: str


@dataclass(frozen=True, eq=False, slots=True)
class ActMul(Call):
    """out = f(gate) * rows[:, first_column:]"""

    gate: Value
    rows: Value
    activation: str
    first_column: int


@dataclass(frozen=True, eq=False, slots=True)
class Route(Call):
    """out = the experts that the logits select, and their weights"""

    logits: Value
    spec: RouteSpec


@dataclass(frozen=True, eq=False, slots=True)
class Experts(Call):
    """out = sum of weight * down(f(gate(a)) * up(a)) over a token's experts"""

    a: Value
    routing: Value
    weight: ExpertsWeight
    activation: str
    clamped: ClampedGate | None


@dataclass(frozen=True, eq=False, slots=True)
class ExpertsAdd(Call):
    """out = x + factor * sum of weight * down(f(gate(a)) * up(a)) over a token's experts"""

    a: Value
    routing: Value
    weight: ExpertsWeight
    x: Value
    activation: str
    clamped: ClampedGate | None
    factor: float


@dataclass(frozen=True, eq=False, slots=True)
class GatedAdd(Call):
    """out = x + factor * sigmoid(gate) * rows"""

    rows: Value
    gate: Value
    x: Value
    factor: float


@dataclass(frozen=True, eq=False, slots=True)
class ShortConv(Call):
    """out = C * f(conv(B * x)) of rows that are B, C and x, or f(conv(x))"""

    rows: Value
    weight: ShortConvWeight
    cache: StateLayer
    is_gated: bool
    has_silu: bool
    first_column: int


@dataclass(frozen=True, eq=False, slots=True)
class SelectiveScan(Call):
    """out = state . C + d * x, where state = e^(dt * a) * state + dt * x * B"""

    rows: Value
    steps: Value
    weight: SelectiveScanWeight
    cache: StateLayer
    steps_column: int


@dataclass(frozen=True, eq=False, slots=True)
class ChannelScan(Call):
    """out = (state . C + d * x) * silu(gate), where state = e^(dt * a) * state + dt * x * B"""

    x: Value
    steps: Value
    parts: Value
    gate: Value
    weight: ChannelScanWeight
    cache: StateLayer
    parts_column: int
    gate_column: int


@dataclass(frozen=True, eq=False, slots=True)
class DeltaRule(Call):
    """out = state . q, where state = decay * state, then state += rate * (v - state . k) k"""

    rows: Value
    steps: Value
    weight: DeltaRuleWeight
    cache: StateLayer


@dataclass(frozen=True, eq=False, slots=True)
class GatedNorm(Call):
    """out = norm(rows * silu(s * gate)), or norm(rows) * silu(s * gate), by groups of columns"""

    rows: Value
    gate: Value
    weight: Floats | None
    group_width: int
    eps: float
    is_gate_first: bool
    gate_scale: float


@dataclass(frozen=True, eq=False, slots=True)
class Head(Call):
    """out = scale * (norm(x)[rows] @ W.T (+ bias)), capped"""

    x: Value
    norm: NormWeight
    weight: LinearWeight
    scale: float
    cap: float
