"""Native CPU arithmetic: compute threads, kernel sets, weights, the KV cache, sampling, recorded steps.

Functions take and return numpy arrays. An array of the wrong dtype raises a TypeError; any other operand that
does not fit raises a ValueError that names it. Callers use `tgi_asgi.ops`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

_Ints = npt.NDArray[np.int32]
_Floats = npt.NDArray[np.float32]
FloatArray = npt.NDArray[np.float32]  # any strides, but contiguous along the last axis
_Bytes = npt.NDArray[np.uint8]
# Result of `sample` and `Program.run_and_sample`, one entry per row: token ids, whether logits were finite,
# log-probabilities, the most probable ids, their log-probabilities, and how many of these there are.
_Samples = tuple[_Ints, npt.NDArray[np.bool_], _Floats, _Ints, _Floats, _Ints, npt.NDArray[np.bool_]]
_Sampled = tuple[int, float | None, list[tuple[int, float]] | None, bool]
_Outcome = tuple[list[_Sampled | None], dict[int, list[_Sampled]], tuple[int, int]]

# Threads and kernels.

def num_threads() -> int:
    """Return the number of compute threads, including the calling thread."""

def set_num_threads(num_threads: int) -> None:
    """Set the number of compute threads; 0 means the default (for tests and benchmarks)."""

def num_cores() -> int:
    """Return the number of cores in the process's affinity mask, counting SMT siblings once."""

def default_num_threads() -> int:
    """Return the number of cores that the process may use, by affinity and cgroup quota."""

def usable_cores() -> list[int]:
    """Return the indices of the cores that the process may use, by affinity (SMT siblings not counted)."""

def configure_team(
    num_threads: int = 0, nice: int = 0, pin: bool = False, spin_us: int = 75, yields_cores: bool = False
) -> None:
    """Restart the thread team with these options.

    Args:
        yields_cores: Leave threads out of runs while other programs use the cores.
    """

def num_running_threads() -> int:
    """Return how many threads the last run had."""

def team_progress() -> int:
    """Return a number that changes many times in a step, unless it hangs."""

def join_team() -> None:
    """Make the calling thread member 0, with the team's nice value and that member's core."""

def team_spin(spin_us: int) -> None:
    """Set how long idle members spin from now on; 0 restores the configured value."""

def team_yield_after(spin_us: int) -> None:
    """Have members spin for this long at a barrier before they yield their cores (for tests and benchmarks).

    The default is 1000.

    Raises:
        ValueError: if it is negative or more than a second.
    """

def wake_team() -> None:
    """Unpark the team ahead of a step."""

def arithmetic_peak(precision: str) -> float:
    """Measure the team's inner-product throughput in operations per second (for tests and benchmarks).

    A multiply-add counts as two.
    """

def kernel_set() -> str:
    """Return the name of the kernel set in use: that of an instruction set."""

def kernel_arithmetic() -> str:
    """Return how the kernel set in use rounds bfloat16 products."""

def kernel_sets() -> list[str]:
    """Return the names of the kernel sets that this machine can run, best last (for tests and benchmarks)."""

def refused_kernel_set() -> str | None:
    """Return why a kernel set that the processor supports is not used, or None."""

def use_kernel_set(name: str) -> None:
    """Use this kernel set from now on (for tests and benchmarks)."""

# Weights.

class WeightFormat:
    """A row of csrc/formats.def."""

    name: str
    ggml_type: int | None  # its number in GGUF files
    block_columns: int  # of a block in a file
    block_bytes: int
    is_quantised: bool  # stored as codes and scales
    has_kernel: bool  # the CPU has a kernel for it
    panel_bytes: float  # per weight, as the CPU's kernels hold it; 0 without a kernel
    repacked_bits: int  # bits of a code in the CUDA layout
    repacked_zero: int
    has_half_scales: bool
    is_float8: bool
    is_float4: bool  # codes are E2M1, scales E8M0

def formats() -> list[WeightFormat]:
    """Return the table of weight formats."""

def decode_rows(data: npt.NDArray[np.uint8], format: str, columns: int) -> npt.NDArray[np.float32]:
    """Return a file's rows as float32 [rows, columns], bit-identical to ggml."""

def decode_bfloat16(data: npt.NDArray[np.uint8], format: str, columns: int) -> npt.NDArray[np.uint16]:
    """Return the bits of a file's rows rounded to bfloat16, [rows, columns]."""

def decode_halves(
    data: npt.NDArray[np.uint8], format: str, columns: int, places: npt.NDArray[np.int64]
) -> npt.NDArray[np.uint16] | None:
    """Return the bits of a file's rows rounded to float16, [rows, columns], column i at places[i].

    None if one is not finite. `places` must be a permutation.
    """

def quantise(data: npt.NDArray[np.uint8], format: str, columns: int, to: str) -> npt.NDArray[np.uint8]:
    """Quantise a file's rows to the file format Q8_0 or Q4_0; return the bytes of their blocks."""

def bfloat16_bits(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Round float32 values to bfloat16; return the bits, of the same shape."""

def repack_rows(
    data: npt.NDArray[np.uint8], format: str, columns: int
) -> tuple[
    npt.NDArray[np.uint8], npt.NDArray[np.float32] | npt.NDArray[np.uint8], npt.NDArray[np.float32] | None
]:
    """Return codes, scales and offsets of a file's rows: weight = scale * (code - zero) + offset.

    If codes are E2M1, scales are bytes: 2^(byte - 127).
    """

def transposed_words(words: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """Return the transpose of a matrix of words."""

def awq_codes(words: npt.NDArray[np.int32]) -> npt.NDArray[np.uint8]:
    """Undo AutoAWQ's packing of words [columns, rows / 8]: nibbles [rows, columns / 2]."""

def unpacked_stream(words: npt.NDArray[np.int32], bits: int) -> npt.NDArray[np.uint8]:
    """Unpack a stream of codes in each row of words [n, m], lowest bits first: [n, m * 32 / bits]."""

def reordered_nibbles(codes: npt.NDArray[np.uint8], order: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
    """Return nibbles [rows, columns / 2], the first of two in the low half: column i is that at order[i]."""

def dequantise(
    codes: npt.NDArray[np.uint8], bits: int, scales: npt.NDArray[np.float32], zeros: npt.NDArray[np.uint8],
    groups: npt.NDArray[np.int64],
) -> npt.NDArray[np.float32]:  # fmt: skip
    """Return scales[:, groups] * (codes - zeros[:, groups]), for codes of 4 or 8 bits."""

def decode_nibbles(
    nibbles: npt.NDArray[np.uint8], count: int, is_high_first: bool, table: npt.NDArray[np.float32],
    scales: npt.NDArray[np.float32], run: int,
) -> npt.NDArray[np.float32]:  # fmt: skip
    """Return table[nibble] * scales[index // run] of a stream of nibbles."""

class Arena:
    """Memory of packed weights, in packing order."""

class Matrix:
    """A weight packed in panels; see csrc/cpu/step/packed.h."""

    @property
    def format(self) -> str:
        """Name of the format of its weights (for tests and benchmarks)."""

    @property
    def num_rows(self) -> int:
        """Number of rows without padding (for tests and benchmarks)."""

    @property
    def num_columns(self) -> int: ...
    @property
    def num_stored_rows(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    def unpack(self) -> _Floats:
        """Return all stored rows, padding included, as float32 (for tests and benchmarks)."""

def pack(
    *,
    sources: Sequence[_Bytes],
    format: str,
    columns: int,
    order: npt.NDArray[np.int64],
    arena: Arena,
    unit_strips: int = 1,
    query_strips: int = 0,
    all_strips: int = 0,
    first_strip: int = 0,
) -> Matrix:
    """Pack rows: row i of the result is row order[i] of the sources, or zeros if that is -1."""

# The cache.

class KvPool:
    """See `tgi_asgi.ops.KvPool`."""

    def __init__(
        self,
        *,
        # Of each layer: number of KV heads, kept dimensions of keys and of values, index of its group.
        layers: Sequence[tuple[int, int, int, int]],
        num_blocks: int,
        block_size: int,
        precision: str,
        has_latents: bool = False,
    ) -> None: ...
    @property
    def block_bytes(self) -> int:
        """Bytes of one block, in all layers of a group (for tests and benchmarks)."""

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None: ...
    def supply(self, num_bytes: int) -> None: ...
    def wait_for_supply(self) -> None:
        """Wait until all of the supply is committed (for tests and benchmarks)."""

    def close_supply(self) -> None: ...
    def memory(self) -> _Bytes:
        """Return the bytes of all blocks in memory order (for tests and benchmarks)."""

# Sampling.

class SampleArrays:
    """The arrays of `tgi_asgi.ops.SampleState`."""

    def __init__(self, records: _Bytes, counts: _Ints) -> None: ...
    def check_record(self, slot: int) -> None: ...
    def set_lists(self, biased_ids: _Ints, biased_values: _Floats, masked_ids: _Ints) -> None: ...

def sample(
    logits: _Floats,
    slots: Sequence[int],
    state: SampleArrays,
    mask: _Ints | None = None,
    drafts: Sequence[int] = (),
) -> _Samples:
    """See `tgi_asgi.ops.sample`."""

def token_logprobs(logits: _Floats, token_ids: _Ints, num_top: int) -> tuple[_Floats, _Ints, _Floats]:
    """See `tgi_asgi.ops.token_logprobs`."""

# A plan's rows.

class PlanError(ValueError):
    """Raised when a plan refers to something that does not exist: an engine bug, never a client's fault."""

class RowLimits:
    """Upper bounds of a plan's integers."""

    def __init__(
        self,
        *,
        vocab_size: int,
        num_blocks: int,
        block_size: int,
        max_context: int,
        max_rows: int,  # per step; also the bound of slots
        max_tokens: int,  # per step
        # Of each group of layers, how many positions a token sees, itself included; None: all.
        windows: Sequence[int | None],
        num_kept_states: int = 0,
    ) -> None: ...

class AdapterLayout:
    """The model's products that adapters may change, as (columns, rows, maximum number of inner values)."""

    def __init__(self, products: Sequence[tuple[int, int, int]]) -> None: ...

class Adapter:
    """An adapter's weights, see csrc/bindings/adapter.h.

    Each part is (product, down [num_inner, columns], scales [num_inner], panels [num_panels, 3], up [n, 16]).
    """

    def __init__(
        self,
        layout: AdapterLayout,
        parts: Sequence[
            tuple[int, npt.NDArray[np.uint16], _Floats, npt.NDArray[np.int64], npt.NDArray[np.uint16]]
        ],
        number: int = 0,
    ) -> None: ...
    @property
    def number(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...

class ImageRows:
    """What images bring to a step, see csrc/bindings/image_rows.h."""

    def __init__(
        self,
        *,
        tokens: Sequence[int] | npt.NDArray[np.integer[Any]],
        rows: _Floats,
        rotary: Sequence[int] | npt.NDArray[np.integer[Any]] = ...,
        cosines: _Floats | None = None,
        sines: _Floats | None = None,
        visible_until: Sequence[int] | npt.NDArray[np.integer[Any]] = ...,
    ) -> None: ...

class FlatRows:
    """A plan's rows as flat arrays, see csrc/bindings/rows.h; each property returns a copy."""

    def __init__(
        self,
        *,
        ids: Sequence[int] | npt.NDArray[np.integer[Any]],
        positions: Sequence[int] | npt.NDArray[np.integer[Any]],
        slots: Sequence[int] | npt.NDArray[np.integer[Any]],
        query_start: Sequence[int] | npt.NDArray[np.integer[Any]],
        context_len: Sequence[int] | npt.NDArray[np.integer[Any]],
        block_table: _Ints,
        row_slots: Sequence[int] | npt.NDArray[np.integer[Any]] = ...,
        num_generated: int = ...,
        adapters: Sequence[Adapter | None] = ...,
        num_drafts: Sequence[int] = ...,
        resumes: Sequence[int] = ...,
        keeps: Sequence[tuple[int, int, int]] = ...,
    ) -> None: ...
    def set_images(self, images: ImageRows, pad_id: int) -> None:
        """Add images' rows to the step; where ids are read, their tokens have `pad_id`."""

    @property
    def num_generated(self) -> int:
        """Number of leading tokens that were sampled (for tests and benchmarks)."""

    @property
    def ids(self) -> _Ints: ...
    @property
    def positions(self) -> _Ints: ...
    @property
    def slots(self) -> npt.NDArray[np.int64]:
        """Slots of the first group's tokens, then of the next group's."""

    @property
    def query_start(self) -> _Ints: ...
    @property
    def context_len(self) -> _Ints: ...
    @property
    def row_slots(self) -> _Ints: ...
    @property
    def row_of_plan(self) -> _Ints: ...
    @property
    def sample_after(self) -> _Ints: ...
    @property
    def sample_slots(self) -> _Ints: ...
    @property
    def sample_plan_rows(self) -> _Ints: ...
    @property
    def drafts(self) -> _Ints: ...
    @property
    def resumes(self) -> _Ints:
        """[rows] places of kept states, -1: its slot's own; or empty"""

    @property
    def keeps(self) -> list[tuple[int, int, int]]:
        """Row, position and place of each state to keep, row by row, in order of position."""

    @property
    def block_tables(self) -> _Ints:
        """[groups, rows, blocks]"""

def flatten_rows(
    rows: Sequence[Any],
    limits: RowLimits,
    last_ids: _Ints,
    positions: npt.NDArray[np.int64] | None = None,
    drafts: Sequence[Sequence[int]] = (),
) -> FlatRows:
    """Return a plan's rows as arrays, with each integer checked. See `tgi_asgi.runner.inputs`.

    Raises:
        PlanError: if a row refers to something that does not exist, or two rows have the same slot.
    """

class DeviceRows:
    """The rows of a CUDA runner's steps, each integer checked; keeps what slots have from step to step.

        rows.start(slot, len(prompt_ids))        # for each slot that starts
        rows.read(plan.rows)                     # then the sizes are chosen
        rows.write(memory, firsts, sizes, ...)

    Attributes describe the rows read last. Rows that decode attention computes come first.

    Args:
        row_type: Class of the rows; its attributes must be slots.
        is_batch_invariant: Whether decode attention must not compute tokens of prompts.
    """

    def __init__(self, row_type: type, limits: RowLimits, is_batch_invariant: bool) -> None: ...
    def start(self, slot: int, prompt_len: int) -> None:
        """Assign a slot to a sequence with a prompt of this length."""

    def forget(self) -> None:
        """After a step that was written and failed: write all of each block table the next time."""

    def read(self, rows: Sequence[Any]) -> None:
        """Read the rows of a step; those with a `stop` as if they began at their `start`, without drafts.

        Raises:
            PlanError: if a row refers to something that does not exist, two rows have the same slot, or a row
                that decodes comes after one that does not.
        """

    def write(
        self,
        memory: npt.NDArray[np.uint8],
        firsts: npt.NDArray[np.int64],
        sizes: Sequence[int],
        needing: Sequence[int] | None,
        masked: Sequence[int],
        adapters: Sequence[int],
    ) -> None:
        """Write the inputs of the rows read last; what is larger than they need becomes padding.

        Args:
            firsts: First bytes of the inputs (`StepShape.sections`), then of the entries of block tables.
            sizes: `StepShape.sizes`.
            needing: Rows that have a row of logits; None: every sequence has one.
            masked: Slots whose samples are masked, in the order of their masks.
            adapters: Place of each row's adapter, -1 for none; or empty.

        Raises:
            ValueError: if the rows are more than the sizes, or the memory is less.
        """

    def end(self, row: int) -> int:
        """Return the end of a row's tokens, without padding."""

    @property
    def num_tokens(self) -> int: ...
    @property
    def num_decodes(self) -> int: ...
    @property
    def num_entries(self) -> int:
        """Number of entries of block tables that the step brings."""

    @property
    def has_adapters(self) -> bool: ...
    @property
    def has_vectors(self) -> bool:
        """Whether a row has a `pooling`."""

    @property
    def is_scored(self) -> bool:
        """Whether a row requests log-probabilities of its prompt."""

    @property
    def has_stops(self) -> bool:
        """Whether a row has a `stop`."""

    @property
    def sampling(self) -> list[int]:
        """The rows that sample a token."""

    @property
    def sampling_slots(self) -> list[int]: ...
    @property
    def prompt_lens(self) -> list[tuple[int, int]]:
        """Of the rows that do not decode: tokens in the step, and in total."""

# Recorded steps.

class Rows:
    """float32 rows, one per token."""

    def array(self) -> _Floats:
        """Return the rows without a copy, padding columns included."""

class Activation:
    """The input of products."""

    def array(self) -> _Floats:
        """Return a copy of a float32 activation's rows (for tests and benchmarks)."""

class Query:
    """Queries in the layout that a cache needs."""

    def array(self) -> _Bytes:
        """Return the bytes of each token's queries (for tests and benchmarks)."""

class Product:
    """The operands of a product."""

    def __init__(
        self, *, weight: Matrix, source: Activation, bias: _Floats | None = None, adapter: int | None = None
    ) -> None: ...

class Norm:
    """A norm of rows or heads: RMSNorm, or LayerNorm if it has a bias."""

    def __init__(self, *, weight: _Floats, bias: _Floats | None, width: int, eps: float) -> None: ...

class HeadNorms:
    """The norms of queries and keys."""

    def __init__(
        self, *, query: Norm, key: Norm, is_whole: bool, is_last: bool, has_values: bool
    ) -> None: ...

class Heads:
    """How heads are normalised and rotated, and which cache layer they go to."""

    def __init__(
        self,
        *,
        pool: KvPool,
        layer: int,
        num_heads: int,
        true_dim: int,
        scale: float | None,
        cosines: _Floats | None = None,
        sines: _Floats | None = None,
        norms: HeadNorms | None = None,
        clip: float = 0.0,
        query_scales: _Floats | None = None,
    ) -> None: ...

class StatePool:
    """See `tgi_asgi.ops.StatePool`; layers: each one's channels and taps, and the floats after them."""

    def __init__(
        self,
        *,
        layers: Sequence[tuple[int, int, int]],
        num_slots: int,
        num_kept: int = 0,
        num_drafts: int = 0,
    ) -> None: ...
    @property
    def slot_bytes(self) -> int:
        """Bytes of one sequence's states (for tests and benchmarks)."""

class LatentHeads:
    """The norm, rotation and cache layer of latent attention (MLA)."""

    def __init__(
        self,
        *,
        pool: KvPool,
        layer: int,
        num_heads: int,
        scale: float,
        norm: _Floats,
        eps: float,
        cosines: _Floats,
        sines: _Floats,
        rotary_column: int,
    ) -> None: ...

class ShortConv:
    """A short convolution over columns of rows."""

    def __init__(
        self,
        *,
        weight: _Floats,
        bias: _Floats | None,
        first_column: int,
        in_gate: int | None,
        out_gate: int | None,
        has_silu: bool,
    ) -> None: ...

class SelectiveScan:
    """A selective scan (state-space model) over heads."""

    def __init__(
        self,
        *,
        num_heads: int,
        head_dim: int,
        num_groups: int,
        state_size: int,
        a: _Floats,
        d: _Floats,
        dt_bias: _Floats,
        dt_column: int,
        dt_scale: float,
        dt_low: float,
        dt_high: float,
    ) -> None: ...

class ChannelScan:
    """A selective scan (state-space model) over channels."""

    def __init__(
        self,
        *,
        num_channels: int,
        state_size: int,
        a: _Floats,
        d: _Floats,
        parts_column: int,
        gate_column: int,
    ) -> None: ...

class DeltaRule:
    """A gated delta rule over heads."""

    def __init__(
        self,
        *,
        num_heads: int,
        head_dim: int,
        num_key_heads: int,
        key_dim: int,
        is_tiled: bool,
        a: _Floats,
        dt_bias: _Floats,
    ) -> None: ...

class GatedNorm:
    """A norm of column groups combined with a gate."""

    def __init__(
        self,
        *,
        width: int,
        group_width: int,
        weight: _Floats | None,
        eps: float,
        is_gate_first: bool,
        is_sigmoid: bool,
        gate_scale: float,
        gate_width: int = 1,
    ) -> None: ...

class AttentionSpec:
    """How a layer attends, see `tgi_asgi.ops.AttentionSpec`."""

    def __init__(
        self,
        *,
        scale: float,
        window: int | None = None,
        chunk: int | None = None,
        soft_cap: float | None = None,
        sinks: _Floats | None = None,
        slopes: _Floats | None = None,
        sees_ahead: bool = True,
    ) -> None: ...

class RouteSpec:
    """See `tgi_asgi.ops.RouteSpec`."""

    def __init__(
        self,
        *,
        num_experts: int,
        top_k: int,
        kind: str,
        correction: _Floats | None = None,
        num_groups: int = 1,
        top_groups: int = 1,
        sums_top_two: bool = False,
        is_renormalised: bool = False,
        eps: float = 0.0,
        scale: float = 1.0,
        jitter: float = 0.0,
        expert_scales: _Floats | None = None,
    ) -> None: ...

class Routing:
    """The experts that each of a program's tokens is routed to."""

    def arrays(self) -> tuple[_Ints, _Floats]:
        """Return copies of the ids and weights, each [max_tokens, top_k] (for tests and benchmarks)."""

class ExpertStack:
    """One product of a layer's experts, with biases in packed row order."""

    def __init__(self, matrices: Sequence[Matrix], biases: Sequence[_Floats] | None = None) -> None: ...
    @property
    def nbytes(self) -> int: ...

class ExpertMlps:
    """A layer's experts; `gate_up` is one stack with alternating panels, or two, or one of ups alone."""

    def __init__(
        self,
        *,
        gate_up: Sequence[ExpertStack],
        down: ExpertStack,
        activation: str,
        limit: float = 0.0,
        slope: float = 1.0,
        offset: float = 0.0,
        is_gated: bool = True,
    ) -> None: ...

class ShardShape:
    """What all shards of a model have in common: their number and the bounds of their steps."""

    def __init__(
        self,
        *,
        count: int,
        num_members: int,
        num_columns: int,
        max_tokens: int,
        max_sequences: int,
        max_rows: int,
        vocab_size: int,
        num_groups: int,
        table_width: int,
    ) -> None: ...
    @property
    def num_bytes(self) -> int: ...

class ShardGroup:
    """One shard's view of the memory that all shards share, see csrc/cpu/shard_group.h."""

    def __init__(self, *, fd: int, rank: int, shape: ShardShape) -> None: ...
    @property
    def rank(self) -> int: ...
    def end(self) -> None:
        """Let the other shards end; called by shard 0 after its last step."""

    def abort(self) -> None:
        """Release all shards that wait for another; their results are void. May be called from any thread."""

    @property
    def is_aborted(self) -> bool: ...

class Program:
    """A list of kernel calls and their buffers; see csrc/bindings/recording.h and program.h."""

    def __init__(self, *, max_tokens: int, max_sequences: int, max_rows: int, max_context: int) -> None: ...
    def set_adapters(self, layout: AdapterLayout) -> None: ...
    def set_shards(self, shards: ShardGroup, first_vocab_id: int) -> None: ...
    def partial_sum(self) -> Rows: ...
    def rows(self, columns: int, *, for_logits: bool = False) -> Rows: ...
    def activation(
        self, columns: int, precision: str, *, for_logits: bool = False, min_tiles: int = 0
    ) -> Activation: ...
    def routing(self, num_experts: int, top_k: int) -> Routing: ...
    def query(self, pool: KvPool, layer: int, num_heads: int) -> Query: ...
    def embed(self, *, table: Matrix, factor: float, positions: _Floats | None, out: Rows) -> None: ...
    def embed_add(self, *, table: Matrix, factor: float, rows: Rows) -> None: ...
    def image_rows(self, *, x: Rows, level: int, adds: bool) -> None: ...
    def norm(self, *, x: Rows, norm: Norm, for_logits: bool, is_private: bool, out: Activation) -> None: ...
    def norm_add(self, *, rows: Rows, norm: Norm, factor: float, scale: float, x: Rows) -> None: ...
    def norm_in_place(self, *, norm: Norm, x: Rows, first_column: int | None = None) -> None: ...
    def pack(self, *, rows: Rows, out: Activation, columns: int | None = None) -> None: ...
    def reorder(self, *, source: Activation, order: _Ints, out: Activation) -> None: ...
    def linear(self, *, product: Product, out: Rows, first_column: int = 0) -> None: ...
    def linear_add(self, *, product: Product, factor: float, x: Rows) -> None: ...
    def sum_shards(self, *, partial_sum: Rows, factor: float, adds: bool, x: Rows) -> None: ...
    def qkv(self, *, products: Sequence[Product], heads: Heads, has_keys: bool, out: Query) -> None: ...
    def head_rows(self, *, rows: Rows, heads: Heads, has_keys: bool, out: Query) -> None: ...
    def heads_linear(self, *, product: Product, num_heads: int, out: Rows) -> None: ...
    def latent_qkv(
        self, *, absorbed: Rows, rotary: Rows, latents: Rows, heads: LatentHeads, out: Query
    ) -> None: ...
    def attention(
        self,
        *,
        q: Query,
        pool: KvPool,
        layer: int,
        true_dim: int,
        spec: AttentionSpec,
        out: Activation | None = None,
        rows: Rows | None = None,
    ) -> None: ...
    def up(
        self, *, product: Product, activation: str, alphas: tuple[float, float], out: Activation
    ) -> None: ...
    def gate_up(self, *, product: Product, activation: str, out: Activation) -> None: ...
    def act_mul(
        self, *, gate: Rows, up: Rows, first_column: int, activation: str, out: Activation
    ) -> None: ...
    def route(self, *, logits: Rows, spec: RouteSpec, out: Routing) -> None: ...
    def experts(
        self,
        *,
        source: Activation,
        routing: Routing,
        mlps: ExpertMlps,
        gathered: Activation,
        inner: Activation,
        factor: float,
        adds: bool,
        out: Rows,
    ) -> None: ...
    def gated_add(self, *, rows: Rows, gate: Rows, factor: float, x: Rows) -> None: ...
    def short_conv(
        self, *, rows: Rows, conv: ShortConv, states: StatePool, layer: int, out: Rows
    ) -> None: ...
    def selective_scan(
        self, *, source: Rows, steps: Rows, scan: SelectiveScan, states: StatePool, layer: int, out: Rows
    ) -> None: ...
    def channel_scan(
        self,
        *,
        source: Rows,
        steps: Rows,
        parts: Rows,
        gate: Rows,
        scan: ChannelScan,
        states: StatePool,
        layer: int,
        out: Rows,
    ) -> None: ...
    def delta_rule(
        self, *, source: Rows, steps: Rows, rule: DeltaRule, states: StatePool, layer: int, out: Rows
    ) -> None: ...
    def gated_norm(self, *, rows: Rows, gate: Rows, norm: GatedNorm, out: Rows) -> None: ...
    def logits(self, *, product: Product, vocab_size: int, scale: float, cap: float) -> None: ...
    def end_cache_writes(self, *, can_gather: bool, rows: Sequence[Rows], query: Query | None) -> None: ...
    def run(self, batch: FlatRows, rows: Sequence[int]) -> _Floats:
        """Compute a step; return the logits of `rows`, valid until the next call."""

    def run_and_sample(
        self,
        batch: FlatRows,
        rows: Sequence[int],
        slots: Sequence[int],
        state: SampleArrays,
        mask: _Ints | None = None,
        drafts: Sequence[int] = (),
    ) -> _Samples:
        """Compute a step and sample a token after each of `rows`."""

    def profile(self, batch: FlatRows, rows: Sequence[int]) -> list[float]:
        """Compute a step as `run_and_sample` does, but sample nothing; return each operator's seconds."""

    def run_head(self, rows: Sequence[int]) -> _Floats:
        """Return the logits of other rows of the last step that `run` computed."""

    @property
    def num_steps(self) -> int:
        """Number of steps computed, up to and including the last one's states."""

    def roll_back_to(self, num_steps: int) -> None:
        """Discard the recurrent states of a step that began after `num_steps` steps and then failed."""

    def discard_states(self, slot: int, num_tokens: int) -> None:
        """Discard the recurrent states of a slot after more than `num_tokens` tokens."""

    def set_rotary_shift(self, slot: int, shift: int) -> None:
        """Move the rotary positions of a slot's tokens, except in steps whose `ImageRows` have their own."""

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy blocks of the pool, as pairs (from, to), in all shards."""

    def follow(self) -> None:
        """Compute what shard 0 sends, until it ends or aborts the group."""

    def keep_adapter(self, adapter: Adapter) -> None:
        """Keep an adapter, which steps of shard 0 may name by its number from now on. Any thread."""

    def drop_adapter(self, number: int) -> None:
        """Release an adapter that no later step names, if there is one of this number. Any thread."""

    @property
    def num_operators(self) -> int:
        """Number of kernel calls in a step (for tests and benchmarks)."""

# Operators on tensors of other libraries.

class PagedAttention:
    """See `tgi_asgi.ops.PagedAttention`."""

    def __init__(self, *, max_context: int) -> None: ...
    def begin(self, batch: FlatRows, visible_until: _Ints | None = None) -> None: ...
    def run(
        self,
        pool: KvPool,
        layer: int,
        q: FloatArray,
        k: FloatArray | None,
        v: FloatArray | None,
        out: FloatArray,
        spec: AttentionSpec,
    ) -> None: ...
    def write(self, pool: KvPool, layer: int, k: FloatArray, v: FloatArray) -> None: ...

class StateRows:
    """See `tgi_asgi.ops.state_rows`."""

    def __init__(self, pool: StatePool) -> None: ...
    def begin(self, batch: FlatRows) -> None: ...
    def commit(self) -> None: ...
    def roll_back(self) -> None: ...
    def discard(self, slot: int, num_tokens: int) -> None: ...
    def delta_net(
        self,
        layer: int,
        conv: ShortConv,
        rule: DeltaRule,
        qkv: FloatArray,
        steps: FloatArray,
        out: FloatArray,
    ) -> None:
        """Convolve q, k and v and apply the delta rule; out [num_tokens, padded width of all heads]."""

def new_rows(num_rows: int, columns: int) -> FloatArray:
    """Return an array [num_rows, columns] whose values are arbitrary."""

def linear_rows(
    weight: Matrix,
    bias: _Floats | None,
    x: FloatArray,
    out: FloatArray,
    precision: str,
    adapters: FlatRows | None = None,
    product: int = 0,
) -> None:
    """Write x @ weight.T (+ bias), plus what the adapters of the step's rows add, to out [n, stored rows]."""

def gate_up_rows(
    weight: Matrix,
    bias: _Floats | None,
    x: FloatArray,
    out: FloatArray,
    precision: str,
    activation: str,
    adapters: FlatRows | None = None,
    product: int = 0,
) -> None:
    """Write f(gate) * up to out [n, half the stored rows], with the adapters of the step's rows."""

def experts_rows(
    mlps: ExpertMlps,
    ids: _Ints,
    weights: _Floats,
    x: FloatArray,
    out: FloatArray,
    precision: str,
    inner_precision: str,
) -> None:
    """Write the weighted sum of each row's experts to out [n, down's stored rows]."""

def rows_by_expert(stack: ExpertStack, sizes: _Ints, x: FloatArray, out: FloatArray, precision: str) -> None:
    """Write products of rows sorted by expert, `sizes` rows each, to out [n, stored rows]."""

def embed_rows(table: Matrix, ids: _Ints, factor: float, out: FloatArray) -> None:
    """Write factor * table[ids] to out [n, stored columns]."""

def norm_rows(x: FloatArray, weight: _Floats, bias: _Floats | None, eps: float, out: FloatArray) -> None:
    """Write the RMSNorm of x to out [n, columns], or with a bias its LayerNorm."""

def activate_rows(x: FloatArray, activation: str, out: FloatArray) -> None:
    """Write f(x) to out [n, columns]."""

class Drafter:
    """Proposes draft tokens for slots, see csrc/cpu/drafter.h.

    For use by one thread at a time; each of these methods holds the GIL.

    A match has at least `shortest` tokens; at most `longest` are compared.
    """

    def __init__(self, *, num_slots: int, shortest: int, longest: int) -> None: ...
    def start(self, slot: int, ids: _Ints) -> None:
        """Assign a slot to a sequence that has these tokens."""

    def append(self, slot: int, id: int) -> None:
        """Append a token that the slot's sequence has sampled."""

    def length(self, slot: int) -> int:
        """Return the number of tokens of the slot's sequence."""

    def choose(
        self,
        requests: Sequence[tuple[int, int, Sequence[int]]],
        *,
        base: float,
        token: float,
        num_tokens: int,
    ) -> list[list[int]]:
        """Return drafts for each request: (slot, maximum number of drafts, tokens that must come next, if
        known).

        A step costs `base`, and `token` per token, in any unit; it has `num_tokens` tokens without the
        drafts.
        """

class DeviceQueue:
    """Passes steps from the event loop to the thread that launches them, to the one that waits, and back.

    The event loop calls `push`, `push_prepared`, `done` and `close`; the launching thread `take`, `launched`,
    `close_launched` and `wait_until_idle`; the waiting thread `next` and `finish`.
    """

    def __init__(self) -> None: ...
    def fileno(self) -> int:
        """Return a file descriptor that is readable while finished steps wait to be returned by `done`."""

    def push(self, number: int) -> None:
        """Queue a step that `take` returns to its caller."""

    def push_prepared(
        self,
        number: int,
        calls: int,
        owner: object,
        rows: DeviceRows,
        num_decodes: int,
        results: npt.NDArray[np.uint8],
        firsts: Sequence[int],
        num_rows: int,
        max_top: int,
    ) -> None:
        """Queue a step that `take` launches and `next` completes.

        Args:
            calls: Address of its `DeviceCalls`, which `owner` keeps alive.
            rows: Has written the step.
            num_decodes: Decodes of the step, with padding.
            results, firsts: Memory of the results, and first byte of each (`result_firsts`).
            num_rows, max_top: Rows of results, and top entries of each.
        """

    def close(self) -> None:
        """Accept no more steps; `take` returns None after those already queued."""

    def done(self) -> list[tuple[int, _Outcome | Exception | None]]:
        """Return the numbers and outcomes of finished steps, as `StepQueue.done`."""

    def take(self) -> tuple[int, str | None] | None:
        """Launch prepared steps until one comes that is not, or that cannot be launched.

        Returns its number, and why it cannot be launched; None once the queue is closed and empty.
        """

    def launched(self, number: int) -> None:
        """Report that the step which `take` returned is launched, or has failed."""

    def close_launched(self) -> None:
        """Make `next` return None after the steps launched so far."""

    @property
    def is_idle(self) -> bool:
        """Whether all launched steps are finished."""

    def wait_until_idle(self) -> None:
        """Wait until all launched steps are finished."""

    def next(self) -> tuple[int, str | None] | None:
        """Wait for launched steps until one ends that was not prepared, or fails: return it as `take`."""

    def finish(self, number: int) -> None:
        """Report that the step which `next` returned is finished."""

class StepQueue:
    """Passes steps from the event loop to the compute thread, and results back.

    The event loop calls `push`, `push_rows`, `done` and `close`; one compute thread calls `compute_rows` and
    `set_sampling`; any thread may call `finish`.
    """

    def __init__(
        self, program: Program | None = None, limits: RowLimits | None = None, idle_s: float = 10.0
    ) -> None: ...
    def fileno(self) -> int:
        """Return a file descriptor that is readable while finished steps wait to be returned by `done`."""

    def push(self, number: int) -> None:
        """Queue a step that `compute_rows` returns to its caller."""

    def push_rows(
        self, number: int, rows: Sequence[Any], cost_base: float = 0.0, cost_token: float = 0.0
    ) -> None:
        """Queue a step that `compute_rows` computes; none of its slots may start, and no row may have a
        grammar.

        The costs of a step and of each of its tokens determine how many drafts are worthwhile.

        Raises:
            PlanError: if a row refers to something that does not exist, or two rows have the same slot.
        """

    def close(self) -> None:
        """Accept no more steps; `compute_rows` returns None after those already queued."""

    def done(self) -> list[tuple[int, _Outcome | Exception | None]]:
        """Return the numbers and outcomes of steps finished since the last call, in order.

        The outcome is None for a step that `compute_rows` returned, or the exception of a failed step.
        Otherwise it is: each row's first sample; the further samples by row; the number of rows with drafts,
        and of drafts. A sample is the token, its log-probability and the most probable tokens if requested,
        and whether its logits were finite.
        """

    def compute_rows(self) -> int | None:
        """Compute steps without the GIL until one comes that was not pushed as rows; return its number.

        Waits for more steps. Returns None once the queue is closed and empty.
        """

    def finish(self, number: int) -> None:
        """Report that the step which `compute_rows` returned is done."""

    def set_sampling(self, state: SampleArrays) -> None:
        """Set the sampling state of the following steps."""

    def set_drafter(self, drafter: Drafter) -> None:
        """Set the drafter, before the first step."""
