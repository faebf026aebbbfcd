"""The public operators and the constructors of their operands: the only arithmetic that `models/` uses.

Operators are called with `Value`s while a model is recorded (`Recorder`). Each operator has one file here, a
float64 reference in tests/reference and a test. Weights and caches are opaque outside this package: their
layout is private to the kernels.

Vectors and tables are numpy arrays. Only what computes in torch imports it, which takes seconds and 200 MB:
the modules `cuda_*`, and `direct`, `paged` and `tensors`, which run models by the code of `transformers`.
"""

from tgi_asgi._C import (
    DeviceQueue,
    DeviceRows,
    Drafter,
    FlatRows,
    PlanError,
    RowLimits,
    StepQueue,
    flatten_rows,
)
from tgi_asgi._C import Program as NativeProgram
from tgi_asgi.ops.act_mul import act_mul
from tgi_asgi.ops.activation import activation
from tgi_asgi.ops.activation_names import ACTIVATIONS, GATED_ACTIVATIONS
from tgi_asgi.ops.adapters import AdapterLayout, Delta, Target
from tgi_asgi.ops.attention import attention
from tgi_asgi.ops.attention_spec import AttentionSpec
from tgi_asgi.ops.channel_scan import channel_scan
from tgi_asgi.ops.cpu_program import CpuProgram
from tgi_asgi.ops.delta_rule import delta_rule
from tgi_asgi.ops.embed import embed, embed_add
from tgi_asgi.ops.experts import experts, experts_add, gated_add, route
from tgi_asgi.ops.formats import FORMATS
from tgi_asgi.ops.gate_up import gate_up
from tgi_asgi.ops.gated_norm import gated_norm
from tgi_asgi.ops.head import head
from tgi_asgi.ops.heads_linear import heads_linear
from tgi_asgi.ops.image_rows import ImageRows, image_rows
from tgi_asgi.ops.kernel_set import KernelSet, kernel_set
from tgi_asgi.ops.kv import Cache, KvDtype, KvPool, cached_head_dim, kv_bytes_per_token
from tgi_asgi.ops.latent_qkv import latent_qkv
from tgi_asgi.ops.layout import PANEL
from tgi_asgi.ops.linear import linear, linear_add
from tgi_asgi.ops.logprobs import TokenLogprobs, token_logprobs
from tgi_asgi.ops.norm import norm, norm_add, norm_in_place
from tgi_asgi.ops.norm_weight import HeadNorms, NormWeight
from tgi_asgi.ops.packing import ROUNDED, Packing
from tgi_asgi.ops.product import Product
from tgi_asgi.ops.prompt_time import bfloat16_time_ratio
from tgi_asgi.ops.qkv import qkv
from tgi_asgi.ops.qkv_heads import QkvHeads
from tgi_asgi.ops.recorder import RecordedBatch, Recorder, Value
from tgi_asgi.ops.recurrent_weights import (
    ChannelScanWeight,
    DeltaRuleWeight,
    SelectiveScanWeight,
    ShortConvWeight,
)
from tgi_asgi.ops.rope import RopeTable
from tgi_asgi.ops.routing import ClampedGate, RouteSpec
from tgi_asgi.ops.sample import SampleResult, sample
from tgi_asgi.ops.sample_state import SampleState
from tgi_asgi.ops.selective_scan import selective_scan
from tgi_asgi.ops.shards import Shard, ShardMemory
from tgi_asgi.ops.short_conv import short_conv
from tgi_asgi.ops.sources import (
    WeightSource,
    as_bfloat16,
    decode,
    decoded_source,
    every_nth_row,
    float8_source,
    from_floats,
    integer_source,
    stack_rows,
)
from tgi_asgi.ops.states import StateLayer, StatePool, StateShape, kept_state_bytes, state_bytes
from tgi_asgi.ops.step_limits import StepLimits
from tgi_asgi.ops.team import (
    configure_threads,
    join_threads,
    keep_threads_awake,
    num_running_threads,
    num_threads,
    team_progress,
    use_share_of_cores,
    wake_threads,
)
from tgi_asgi.ops.up import up
from tgi_asgi.ops.weights import (
    Arithmetic,
    ExpertsWeight,
    GateUpWeight,
    HeadsWeight,
    LinearWeight,
    QkvWeight,
    experts_weight,
    gate_up_weight,
    heads_weight,
    linear_weight,
    qkv_weight,
    router_weight,
    vector,
)

__all__ = [
    "ACTIVATIONS",
    "FORMATS",
    "GATED_ACTIVATIONS",
    "PANEL",
    "ROUNDED",
    "AdapterLayout",
    "Arithmetic",
    "AttentionSpec",
    "Cache",
    "ChannelScanWeight",
    "ClampedGate",
    "CpuProgram",
    "Delta",
    "DeltaRuleWeight",
    "DeviceQueue",
    "DeviceRows",
    "Drafter",
    "ExpertsWeight",
    "FlatRows",
    "GateUpWeight",
    "HeadNorms",
    "HeadsWeight",
    "ImageRows",
    "KernelSet",
    "KvDtype",
    "KvPool",
    "LinearWeight",
    "NativeProgram",
    "NormWeight",
    "Packing",
    "PlanError",
    "Product",
    "QkvHeads",
    "QkvWeight",
    "RecordedBatch",
    "Recorder",
    "RopeTable",
    "RouteSpec",
    "RowLimits",
    "SampleResult",
    "SampleState",
    "SelectiveScanWeight",
    "Shard",
    "ShardMemory",
    "ShortConvWeight",
    "StateLayer",
    "StatePool",
    "StateShape",
    "StepLimits",
    "StepQueue",
    "Target",
    "TokenLogprobs",
    "Value",
    "WeightSource",
    "act_mul",
    "activation",
    "as_bfloat16",
    "attention",
    "bfloat16_time_ratio",
    "cached_head_dim",
    "channel_scan",
    "configure_threads",
    "decode",
    "decoded_source",
    "delta_rule",
    "embed",
    "embed_add",
    "every_nth_row",
    "experts",
    "experts_add",
    "experts_weight",
    "flatten_rows",
    "float8_source",
    "from_floats",
    "gate_up",
    "gate_up_weight",
    "gated_add",
    "gated_norm",
    "head",
    "heads_linear",
    "heads_weight",
    "image_rows",
    "integer_source",
    "join_threads",
    "keep_threads_awake",
    "kept_state_bytes",
    "kernel_set",
    "kv_bytes_per_token",
    "latent_qkv",
    "linear",
    "linear_add",
    "linear_weight",
    "norm",
    "norm_add",
    "norm_in_place",
    "num_running_threads",
    "num_threads",
    "qkv",
    "qkv_weight",
    "route",
    "router_weight",
    "sample",
    "selective_scan",
    "short_conv",
    "stack_rows",
    "state_bytes",
    "team_progress",
    "token_logprobs",
    "up",
    "use_share_of_cores",
    "vector",
    "wake_threads",
]
