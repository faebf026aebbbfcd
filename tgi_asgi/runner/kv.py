"""Sizes the KV cache: enough tokens for all sequences at full length, within a share of the free memory."""

from __future__ import annotations

import logging
import mmap
from collections.abc import Callable
from dataclasses import dataclass

from tgi_asgi import ops
from tgi_asgi.errors import ModelLoadError
from tgi_asgi.models.config import ServedConfig
from tgi_asgi.models.loading.open import OpenModel
from tgi_asgi.runner.groups import BlockNeeds, CacheGroups
from tgi_asgi.runner.memory import choose_kept_states, kept_state_bytes
from tgi_asgi.settings import Settings

logger = logging.getLogger(__name__)

_MAX_TOKENS = (1 << 31) - 128  # of all groups: kernels number them in 31 bits, less up to two blocks of 64
# Of a CPU's cache: what is committed when the model is loaded, and filled before cached contents are evicted.
# The first write to anything else waits for the system. (8,000 tokens of the default model.)
EAGER_BYTES = 192 << 20
_MIN_BYTES = 64  # minimum per token, when a model keeps no keys and values
_SHARE = 0.5  # of the free memory; the rest is for the page cache and the operating system


@dataclass(frozen=True, slots=True)
class KvSize:
    """Size of the block pool."""

    num_blocks: int
    needs: BlockNeeds  # of the sequences that share it
    bytes_per_token: int  # of one group's layers
    dtype: ops.KvDtype

    @property
    def block_size(self) -> int:
        """Number of tokens in a block."""
        return self.needs.block_size

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Windows of the groups."""
        return self.needs.windows

    @property
    def num_tokens(self) -> int:
        """Number of tokens that the pool holds in all layers."""
        return self.num_blocks // len(self.windows) * self.block_size

    @property
    def num_bytes(self) -> int:
        """Address space of the pool; the system commits memory when blocks are first written."""
        return self.num_blocks * self.block_size * self.bytes_per_token

    @property
    def num_eager_blocks(self) -> int:
        """Number of blocks, at least one, that `EAGER_BYTES` holds."""
        return min(max(EAGER_BYTES // (self.block_size * self.bytes_per_token), 1), self.num_blocks)

    def longest_fitting(self, max_tokens: int) -> int:
        """Return the most tokens, up to `max_tokens`, that a sequence can have."""
        return self.needs.longest_fitting(self.num_blocks, max_tokens)

    def held_tokens(self, longest: int) -> int:
        """Return the tokens in the pool of sequences of `longest`, counting those that windows drop."""
        num_sequences = self.num_blocks // self.needs.total_for(longest)
        return max(num_sequences * longest, self.num_tokens)


@dataclass(frozen=True, slots=True)
class CacheSizes:
    """Sizes of what a runner keeps from one step to the next.

    Attributes:
        kv: Size of the block pool.
        num_kept_states: Number of recurrent states to keep, besides those of running sequences.
        image_bytes: Bytes of encoded images.
    """

    kv: KvSize
    num_kept_states: int = 0
    image_bytes: int = 0


def groups_of(config: ServedConfig, kv_dtype: ops.KvDtype) -> CacheGroups:
    """Return which of a model's layers share block tables on a CPU."""
    sizes = [ops.kv_bytes_per_token(cache, kv_dtype) for cache in config.caches]
    return CacheGroups.of([cache.window for cache in config.caches], sizes)


def one_group(config: ServedConfig, size: KvSize) -> CacheGroups:
    """Return the groups of a GPU's cache of this size: all layers in one."""
    return CacheGroups((None,), (0,) * len(config.caches), size.bytes_per_token)


def gpu_groups_of(config: ServedConfig, item_bytes: int) -> CacheGroups:
    """Return a GPU's groups: plain values of `item_bytes`, all layers in one."""
    sizes = [(each.head_dim + each.value_dim) * each.num_kv_heads for each in config.caches]
    return CacheGroups.of([None] * len(sizes), [size * item_bytes for size in sizes])


def choose_sizes(
    config: ServedConfig, settings: Settings, free_bytes: int, choose: Callable[[int], KvSize], *,
    keeps_states: bool = True,
) -> tuple[KvSize, int]:  # fmt: skip
    """Choose the pool's size, and how many recurrent states to keep beside it.

    Args:
        choose: Chooses the pool's size, given the free bytes.
        keeps_states: Whether states can be kept, as far as is known.

    Raises:
        ModelLoadError: if they do not fit.
    """
    cache = choose(free_bytes)
    cache_bytes = cache.num_bytes if settings.prefix_cache else 0
    num_kept = 0
    if keeps_states:
        num_kept = choose_kept_states(config, settings.max_kept_states, cache_bytes, free_bytes)
    if num_kept:
        return choose(free_bytes - num_kept * kept_state_bytes(config)), num_kept
    if settings.max_kept_states:
        why = "the states of %s cannot be kept" if config.has_states else "%s has no states"
        logger.warning(f"--max-kept-states is ignored: {why}", config.architecture)
    return cache, 0


def choose_size(
    config: ServedConfig,
    settings: Settings,
    groups: CacheGroups,
    kv_dtype: ops.KvDtype,
    max_context: int,
    free_bytes: int,
    *,
    share: float = _SHARE,
    repeats: float = 1.0,
    cure: str = "free memory",
) -> KvSize:
    """Choose the pool's size for sequences of up to `max_context`.

    If the administrator set `max_batch_total_tokens`, the pool holds at least that many tokens in all layers,
    regardless of what sliding windows free. Otherwise it holds all slots at full length, or as much as
    `share` of the free memory holds.

    Args:
        groups: Which layers share block tables: `groups_of` on a CPU, `gpu_groups_of` on a GPU.
        kv_dtype: Type of the keys and values.
        share: Share of the free memory that the pool may use.
        repeats: How many shards hold each KV head, on average.
        cure: What the administrator can do about too little memory.

    Raises:
        ModelLoadError: if not even one block fits, or the administrator's limits contradict each other.
    """
    per_token = max(int(groups.bytes_per_token * repeats) + config.other_bytes_per_token, _MIN_BYTES)
    size, num_groups = settings.block_size, len(groups.windows)
    all_bytes = per_token * num_groups
    needs = BlockNeeds(groups.windows, size, step_tokens(settings))
    if settings.max_batch_total_tokens is not None:
        # Rounded up: --max-total-tokens may be the same number.
        num_blocks = -(-settings.max_batch_total_tokens // size) * num_groups
    else:
        wanted = settings.max_batch_size * needs.total_for(max_context)
        num_blocks = min(wanted, int(free_bytes * share) // (per_token * size))
    if num_blocks < num_groups:
        raise ModelLoadError(
            f"there is no memory for a KV cache: a block of {size} tokens needs {all_bytes * size} bytes, "
            f"{free_bytes} are free; {cure}, or set --max-batch-total-tokens"
        )
    num_blocks = min(num_blocks, _MAX_TOKENS // size)
    chosen = KvSize(num_blocks, needs, per_token, kv_dtype)
    if settings.max_total_tokens is not None:
        _check_holds(chosen, max_context, settings, free_bytes)
    return chosen


def gpu_cure(settings: Settings) -> str:
    """Return what the administrator can do about too little memory of a GPU, for `choose_size`."""
    return "raise --cuda-memory-fraction" if settings.cuda_memory_fraction < 1 else "free memory"


def _check_holds(size: KvSize, max_context: int, settings: Settings, free_bytes: int) -> None:
    """Raise `ModelLoadError` if a sequence as long as the administrator asks for does not fit the cache."""
    longest = size.longest_fitting(max_context)
    if longest >= max_context:
        return
    token_bytes = size.bytes_per_token * len(size.windows)
    raise ModelLoadError(
        f"the KV cache holds {longest} tokens of a sequence, fewer than --max-total-tokens "
        f"{settings.max_total_tokens}: set that to at most {longest}, or "
        + (
            "raise --max-batch-total-tokens"
            if settings.max_batch_total_tokens is not None
            else f"free memory: a token needs {token_bytes} bytes, {free_bytes} are free"
        )
    )


def check_address_space(size: KvSize) -> None:
    """Refuse a pool that the system has no address space for, before weights are read.

    Raises:
        ModelLoadError: if it does not grant that much now.
    """
    try:
        mmap.mmap(-1, max(size.num_bytes, 1), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()
    except (OSError, OverflowError):
        raise refusal(size) from None


def refusal(size: KvSize) -> ModelLoadError:
    """Return the error for a pool that the system has no address space for."""
    return ModelLoadError(
        f"the system refuses {size.num_bytes / (1 << 30):.1f} GiB for a KV cache of {size.num_tokens} "
        "tokens: set --max-batch-total-tokens to less"
    )


def step_tokens(settings: Settings) -> int:
    """Return the maximum number of tokens in a step, on a CPU or a GPU."""
    return settings.max_batch_prefill_tokens + settings.max_batch_size


def limits_of(settings: Settings, max_context: int) -> ops.StepLimits:
    """Return the sizes that no step exceeds, with a row of logits per sequence."""
    batch = settings.max_batch_size
    return ops.StepLimits(
        max_tokens=step_tokens(settings), max_sequences=batch, max_rows=batch, max_context=max_context
    )


def choose_cpu_dtype(config: ServedConfig, settings: Settings, *, is_exact: bool) -> ops.KvDtype:
    """Return a CPU's type of keys and values: that of the arithmetic, unless the administrator chose int8.

    Args:
        is_exact: Whether the arithmetic is in float32.

    Raises:
        ModelLoadError: if the cache cannot have the type given by --kv-cache-dtype.
    """
    if settings.kv_cache_dtype != "int8":
        return "float32" if is_exact else "bfloat16"
    if is_exact:
        raise ModelLoadError("--kv-cache-dtype int8 contradicts --dtype float32, which is exact")
    try:
        for cache in config.caches:
            ops.kv_bytes_per_token(cache, "int8")
    except ValueError as error:
        raise ModelLoadError(f"--kv-cache-dtype int8: {error}") from None
    return "int8"


def kv_scales_of(opened: OpenModel, settings: Settings) -> list[tuple[float, float]] | None:
    """Return each layer's scales of keys and of values from the files, for an FP8 cache; else None."""
    return opened.kv_scales() if settings.kv_cache_dtype == "fp8_e4m3fn" else None
