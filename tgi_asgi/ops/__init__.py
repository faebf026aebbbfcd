"""The public operators, and the constructors of what they work on. All that `models/` knows of arithmetic.

`models/` and `runner/` call these; each has one file here, a float64 reference in tests/reference and a test.
Activations, weights and KV layers are opaque above this line: their layout is the kernels' own affair.
"""

import torch  # noqa: F401  (first: _C links to its libraries)

from tgi_asgi import _C  # noqa: F401  (registers torch.ops.tgi)
from tgi_asgi.ops.attention import AttentionTables, attention
from tgi_asgi.ops.cuda_quant import Repacking
from tgi_asgi.ops.embed import embed
from tgi_asgi.ops.gate_up import gate_up
from tgi_asgi.ops.head import head
from tgi_asgi.ops.kv import KvLayer, allocate_kv, copy_blocks, kv_bytes_per_token, supply_kv
from tgi_asgi.ops.linear_add import linear_add
from tgi_asgi.ops.logprobs import TokenLogprobs, token_logprobs
from tgi_asgi.ops.norm import norm
from tgi_asgi.ops.packed import Packing
from tgi_asgi.ops.program import ProgramInputs, StepProgram
from tgi_asgi.ops.qkv import qkv
from tgi_asgi.ops.rope import RopeTable
from tgi_asgi.ops.sample import SampleResult, sample
from tgi_asgi.ops.sample_state import SampleState
from tgi_asgi.ops.steps import PlanError, RowLimits, StepQueue, flatten_rows
from tgi_asgi.ops.team import configure_threads, join_threads, num_threads, wake_threads
from tgi_asgi.ops.weights import (
    NATIVE_FORMATS,
    Arithmetic,
    GateUpWeight,
    HeadNorms,
    LinearWeight,
    QkvWeight,
    WeightSource,
    float8_source,
    gate_up_weight,
    integer_source,
    linear_weight,
    qkv_weight,
    vector,
)

__all__ = [
    "NATIVE_FORMATS",
    "Arithmetic",
    "AttentionTables",
    "GateUpWeight",
    "HeadNorms",
    "KvLayer",
    "LinearWeight",
    "Packing",
    "PlanError",
    "ProgramInputs",
    "QkvWeight",
    "Repacking",
    "RopeTable",
    "RowLimits",
    "SampleResult",
    "SampleState",
    "StepProgram",
    "StepQueue",
    "TokenLogprobs",
    "WeightSource",
    "allocate_kv",
    "attention",
    "configure_threads",
    "copy_blocks",
    "embed",
    "flatten_rows",
    "float8_source",
    "gate_up",
    "gate_up_weight",
    "head",
    "integer_source",
    "join_threads",
    "kv_bytes_per_token",
    "linear_add",
    "linear_weight",
    "norm",
    "num_threads",
    "qkv",
    "qkv_weight",
    "sample",
    "supply_kv",
    "token_logprobs",
    "vector",
    "wake_threads",
]
