"""What weights, rotary tables, adapters and recurrent states take, and what share of memory they may take.

It is decided before any weight is read. Weights and adapters are those of a CPU; tables, states and contexts
are alike on GPUs. The cache, which gets the rest, is in `kv.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Container, Iterable

from tgi_asgi import ops
from tgi_asgi.errors import ModelLoadError
from tgi_asgi.models.config import ModelConfig, ServedConfig
from tgi_asgi.models.loading import ORDERED

logger = logging.getLogger(__name__)

_GIB = 1 << 30
# Shares of the free memory that rotary tables may take: if the model's own context sets their length, and if
# the administrator does.
_ROPE_SHARE = 1 / 32
_MAX_ROPE_SHARE = 1 / 2
_MAX_ADAPTER_SHARE = 1 / 2  # of the memory free after the weights
_ADAPTER_BYTES = 2  # bfloat16
_EXACT_ADAPTER_BYTES = 3 * _ADAPTER_BYTES  # with `--dtype float32`: three products in bfloat16
_MAX_STATE_SHARE = 1 / 2  # of the memory free after weights and adapters
_KEPT_SHARE = 1 / 10  # of the cache's memory, for kept states
# Of the memory for a GPU's cache, what a cache beside a tower takes, which encodes images of any size.
VISION_SHARE = 0.8
_MIN_KEPT, _MAX_KEPT = 8, 1 << 16  # kept states, unless the administrator sets their number


def packed_bytes(tensors: Iterable[tuple[str, int]], packing: ops.Packing, vocabulary: Container[int]) -> int:
    """Estimate the bytes that weights occupy once they are packed.

    Args:
        tensors: Format and number of elements of each tensor.
        vocabulary: Numbers of elements of embeddings and heads; tensors of these sizes are recognised as
            such and stay at eight bits.
    """
    return int(
        sum(elements * _bytes_each(name, packing, elements in vocabulary) for name, elements in tensors)
    )


def _bytes_each(name: str, packing: ops.Packing, is_vocabulary: bool) -> float:
    info = ops.FORMATS.get(name)
    if name in ORDERED:
        return ORDERED[name]
    if info is None:  # `KEPT`, or part of a quantised matrix: words of codes, zero points
        return 4.0
    if packing.quantise is None and packing.rounds_floats and name in ops.ROUNDED:
        return 2.0
    if info.has_kernel and (info.is_quantised or packing.quantise is None):
        return info.panel_bytes
    if packing.quantise is None:  # FP8
        return 4.0 if packing.is_exact else 2.0
    return ops.FORMATS["Q8_0" if is_vocabulary else packing.quantise].panel_bytes


def cut_tensors(tensors: Iterable[tuple[str, int]]) -> list[tuple[str, int]]:
    """Return the formats and numbers of elements that shards hold: they decode what `ORDERED` names."""
    return [("F16" if name in ORDERED else name, elements) for name, elements in tensors]


def check_weights_fit(
    tensors: list[tuple[str, int]], packing: ops.Packing, vocabulary: Container[int], free_bytes: int, *,
    more_advice: str = "",
) -> int:  # fmt: skip
    """Return the bytes that the weights will occupy; the arguments are those of `packed_bytes`.

    Args:
        more_advice: Ends the message.

    Raises:
        ModelLoadError: if that exceeds the free memory; the message says what would fit.
    """
    needed = packed_bytes(tensors, packing, vocabulary)
    if needed <= free_bytes:
        return needed
    smaller = [
        f"--quantize {name.lower()} ({size / _GIB:.1f} GiB)"
        for name in ("Q8_0", "Q4_0")
        if (size := packed_bytes(tensors, ops.Packing(packing.is_exact, name), vocabulary)) <= free_bytes
    ]
    advice = (
        f"{' or '.join(smaller)} would fit"
        if smaller
        else "use a smaller model, or a smaller quantisation of it"
    )
    raise ModelLoadError(
        f"the model's weights take {needed / _GIB:.1f} GiB, but {free_bytes / _GIB:.1f} GiB of memory are "
        f"free: {advice}{more_advice}"
    )


def reserved_adapter_bytes(
    config: ServedConfig, num_adapters: int, max_rank: int, free_bytes: int, *, is_exact: bool = False,
    num_shards: int = 1, repeats: float = 1.0,
) -> int:  # fmt: skip
    """Return the bytes to keep free for adapters: `num_adapters` at the largest rank, see `adapter_bytes`.

    At most half of the free memory: few adapters have that rank on all products, and the cache needs memory
    too.
    """
    each = adapter_bytes(config, max_rank, is_exact=is_exact, num_shards=num_shards, repeats=repeats)
    return min(num_adapters * each, int(free_bytes * _MAX_ADAPTER_SHARE))


def adapter_bytes(
    config: ServedConfig, max_rank: int, *, is_exact: bool, num_shards: int, repeats: float
) -> int:
    """Return the bytes of an adapter of this rank on all products, in all shards together.

    Only native families have known shapes before the model is loaded; for others it is 0. It is too high for
    layers whose experts replace the MLP, and for latent attention.

    Args:
        num_shards: Number of shards, 1 if the model is not split. Each has all of the side of an adapter's
            matrices that is as long as the residual, and a part of the other side.
        repeats: Number of shards that hold each KV head, on average.
    """
    if not isinstance(config, ModelConfig):
        return 0
    element_bytes = _EXACT_ADAPTER_BYTES if is_exact else _ADAPTER_BYTES
    hidden, each = num_shards * config.hidden_size, 0
    for layer in map(config.of_layer, range(config.num_layers)):
        heads, keys = layer.num_heads * layer.head_dim, layer.num_kv_heads * layer.head_dim
        attention = 2 * (hidden + heads) + 2 * (hidden + round(repeats * keys))
        each += element_bytes * max_rank * (attention + 3 * (hidden + layer.intermediate_size))
    return each


def state_bytes(config: ServedConfig, num_drafts: int = 0) -> int:
    """Return the bytes of a running sequence's states, with up to `num_drafts` drafts per row."""
    return sum(ops.state_bytes(each, num_drafts) for each in config.states) + config.other_state_bytes


def fitting_batch(config: ServedConfig, max_batch_size: int, free_bytes: int, num_drafts: int = 0) -> int:
    """Return how many sequences, up to `max_batch_size`, may run at once given the memory for their states.

    States may use at most half of the free memory, since the cache needs memory too.

    Args:
        num_drafts: Maximum number of drafts per row; each needs a state.

    Raises:
        ModelLoadError: if there is not enough memory for one sequence.
    """
    each, room = state_bytes(config, num_drafts), int(free_bytes * _MAX_STATE_SHARE)
    if max_batch_size * each <= room:
        return max_batch_size
    if each > room:
        raise ModelLoadError(
            f"the states of a sequence take {each / _GIB:.2f} GiB, {free_bytes / _GIB:.2f} GiB are free: "
            "free memory, or use a smaller model, or a smaller quantisation of it"
        )
    logger.warning(
        "%d sequences run at once, not the %d of --max-batch-size: the states of each take %.3f GiB%s, and "
        "%.1f GiB are free",
        room // each, max_batch_size, each / _GIB, f" with {num_drafts} drafts" if num_drafts else "",
        free_bytes / _GIB,
    )  # fmt: skip
    return room // each


def kept_state_bytes(config: ServedConfig) -> int:
    """Return the bytes of one kept state; 0 if the model's states cannot be kept."""
    return sum(map(ops.kept_state_bytes, config.states)) + config.other_kept_bytes


def choose_kept_states(config: ServedConfig, wanted: int | None, cache_bytes: int, free_bytes: int) -> int:
    """Return how many states to keep: `wanted`, or as many as fit a tenth of the cache's memory.

    Kept states may use at most half of the free memory.

    Raises:
        ModelLoadError: if `wanted` exceeds that.
    """
    each = kept_state_bytes(config)
    if not each:
        return 0
    fitting = int(free_bytes * _MAX_STATE_SHARE) // each
    if wanted is None:
        return min(max(int(cache_bytes * _KEPT_SHARE) // each, _MIN_KEPT), _MAX_KEPT, fitting)
    if wanted > fitting:
        raise ModelLoadError(
            f"--max-kept-states {wanted} would take {wanted * each / _GIB:.2f} GiB, {free_bytes / _GIB:.2f} "
            f"GiB are free: set it to at most {fitting}"
        )
    return wanted


def log_adapter_memory(num_adapters: int, each_bytes: int, kept_bytes: int) -> None:
    """Log what adapters may occupy; warn if less than that was kept free for them."""
    most = num_adapters * each_bytes
    log = logger.info if most <= kept_bytes else logger.warning
    log(
        "%d adapters of --max-lora-rank on all products would take %.2f GiB; %.2f GiB are kept free%s",
        num_adapters, most / _GIB, kept_bytes / _GIB,
        "" if most <= kept_bytes else ": lower --max-cpu-loras or --max-lora-rank, or keep memory free",
    )  # fmt: skip


def choose_context(config: ServedConfig, max_total_tokens: int | None, free_bytes: int) -> int:
    """Return the maximum number of tokens of a sequence: that of --max-total-tokens, or the model's.

    A configuration may claim millions of tokens, and the rotary tables are allocated for all of them at
    start. The model's own claim is therefore cut to what a small share of the free memory holds.
    """
    if max_total_tokens is not None:
        if max_total_tokens > config.longest_context:
            logger.warning(
                "--max-total-tokens %d is cut to the model's context of %d tokens; --rope-scaling extends it",
                max_total_tokens, config.longest_context,
            )  # fmt: skip
        return min(config.longest_context, max_total_tokens)
    each = _rope_bytes_per_position(config)
    needed, fitting = config.context_length * each, int(free_bytes * _ROPE_SHARE)
    if needed <= fitting:
        return config.context_length
    max_context = max(fitting // each, 1)
    logger.warning(
        "the model's context of %d tokens is cut to %d: its rotary tables would take %.1f GiB, %.1f GiB are "
        "free; --max-total-tokens allows more",
        config.context_length, max_context, needed / _GIB, free_bytes / _GIB,
    )  # fmt: skip
    return max_context


def check_rope_fits(config: ServedConfig, max_context: int, free_bytes: int) -> None:
    """Refuse a context whose rotary tables would occupy more than half of the free memory.

    Raises:
        ModelLoadError: if they would; the message says which context fits.
    """
    each, fitting = _rope_bytes_per_position(config), int(free_bytes * _MAX_ROPE_SHARE)
    if max_context * each > fitting:
        raise ModelLoadError(
            f"a context of {max_context} tokens needs {max_context * each / _GIB:.1f} GiB for its rotary "
            f"tables, {free_bytes / _GIB:.1f} GiB are free: set --max-total-tokens to at most "
            f"{max(fitting // each, 1)}"
        )


def _rope_bytes_per_position(config: ServedConfig) -> int:
    """Return the bytes of a position in all rotary tables: as built, plus a copy padded for the kernels."""
    return sum(map(ops.RopeTable.bytes_per_position, config.rotary_dims))
