"""Places a model on this machine's CPU: its arithmetic, its runner and the size of its cache."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from tgi_asgi import ops
from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats.sources import ModelFiles, max_loaded_adapters
from tgi_asgi.models.adapters import AdapterLoader
from tgi_asgi.models.loading.open import OpenModel, ServedModel
from tgi_asgi.models.loading.watched import Watch
from tgi_asgi.models.pooling import Dense, PoolingFiles
from tgi_asgi.models.shard import ModelCut
from tgi_asgi.runner import prompt_precision
from tgi_asgi.runner.drafts import max_drafts_per_row, speculation_of
from tgi_asgi.runner.kv import (
    CacheSizes,
    KvSize,
    check_address_space,
    choose_cpu_dtype,
    choose_size,
    choose_sizes,
    groups_of,
    limits_of,
)
from tgi_asgi.runner.load_by_team import load_by_team
from tgi_asgi.runner.memory import (
    adapter_bytes,
    check_weights_fit,
    cut_tensors,
    fitting_batch,
    log_adapter_memory,
    reserved_adapter_bytes,
    state_bytes,
)
from tgi_asgi.runner.placement import Placed
from tgi_asgi.runner.programs import make_adapter_layout
from tgi_asgi.runner.runner import HostRunner
from tgi_asgi.runner.shard_adapters import OtherAdapters, SplitAdapterLoader
from tgi_asgi.runner.shards import Shards, cuts_of, jobs_of, repeats_of
from tgi_asgi.settings import Settings

logger = logging.getLogger(__name__)

_NO_IMAGES = ", or --mmproj none to serve it for text only"
_DTYPES = {"auto": "bfloat16", "bfloat16": "bfloat16", "float32": "float32"}


class OnCpu:
    """A `Placement` of a model on this machine's CPU, made before its weights are read.

    Args:
        max_context: Maximum number of tokens in a sequence that the model supports.
        free: Bytes of memory that are free now.

    Raises:
        ModelLoadError: if the settings ask for what a CPU does not support, or for more memory than is free.
    """

    device = "cpu"

    def __init__(
        self, opened: OpenModel, files: ModelFiles, settings: Settings, max_context: int, free: int
    ) -> None:
        self._cuts = cuts = cuts_of(opened, settings, num_gpus=None)
        _check_settings(settings)
        self.dtype = _choose_dtype(settings.dtype)
        self.arithmetic = ops.Packing(
            self.dtype == "float32",
            _quantised(settings.quantize),
            rounds_floats=settings.dtype == "bfloat16",
            has_float_prompts=prompt_precision.is_bfloat16(opened, settings.prompt_precision),
        )
        budget = _divide(opened, settings, self.arithmetic, max_context, cuts, free)
        self._budget, self._opened = budget, opened
        self.settings = replace(settings, max_batch_size=budget.batch, max_kept_states=budget.num_kept_states)
        self.max_context = budget.cache.longest_fitting(max_context)
        self.kernels = ops.kernel_set()
        self.shards: Shards | None = None
        if cuts:
            opened.use_cut(cuts[0])
            adapters = OtherAdapters(len(cuts) - 1) if settings.serves_adapters else None
            try:
                jobs = jobs_of(
                    opened.config, files, self.settings, cuts, self.arithmetic, budget.cache,
                    self.max_context, adapters,
                )  # fmt: skip
                self.shards = Shards(jobs, adapters)
            except ModelLoadError:
                if adapters is not None:
                    adapters.close()
                raise

    def load(self, watch: Watch) -> ServedModel:
        """Load the model, as described in `Placement`."""
        model = load_by_team(self._opened, self.arithmetic, self.max_context, watch)
        if self.shards is not None:
            self.shards.others.wait_ready()
        if self.settings.prompt_precision == "bfloat16":
            prompt_precision.log_effect(self.arithmetic)
        if self.settings.dtype == "auto":
            _log_float_products(self.arithmetic)
        return model

    def place(self, model: ServedModel, pooling: PoolingFiles) -> Placed:
        """Create the model's cache and runner, as described in `Placement`."""
        try:
            return self._place(model, pooling.dense)
        except MemoryError as error:  # the cache's own is reported by `make_pool`
            rows, tokens = self.settings.max_batch_size, self.settings.max_batch_prefill_tokens
            raise ModelLoadError(
                f"the system refuses the memory for steps of {rows} sequences and {tokens} prompt tokens: "
                "set --max-batch-size or --max-batch-prefill-tokens to less"
            ) from error

    def _place(self, model: ServedModel, dense: Sequence[Dense]) -> Placed:
        settings, budget, packing = self.settings, self._budget, self.arithmetic
        prompts = "bfloat16" if packing.has_float_prompts and packing.by_kind else None
        bits = f"{packing} {self.kernels.arithmetic}{f' prompts {prompts}' if prompts else ''}"
        limits = limits_of(settings, self.max_context)
        adapters: AdapterLoader[ops.AdapterLayout] | SplitAdapterLoader | None = None
        if settings.serves_adapters:
            adapters = own = AdapterLoader(make_adapter_layout(model, settings, packing))
            if self.shards is not None and self.shards.adapters is not None:
                adapters = SplitAdapterLoader(own, self.shards.adapters)
            each = self._adapter_bytes(own)
            log_adapter_memory(max_loaded_adapters(settings), each, budget.adapter_bytes)
        if model.kind == "encoder":
            from tgi_asgi.runner.encoder import EncoderRunner  # imports torch

            limits = replace(limits, max_tokens=settings.max_batch_prefill_tokens)
            encoder = EncoderRunner(model, budget.cache, limits, dense=dense)
            return Placed(encoder, budget.cache, bits, prompts)
        cache, num_kept = budget.cache, budget.num_kept_states
        if num_kept and model.kind == "generic" and not model.keeps_states:
            cache, num_kept = budget.without_kept_states()
        runner = HostRunner(
            model,
            CacheSizes(cache, num_kept, settings.image_cache),
            limits,
            dense=dense,
            has_prompt_arithmetic=prompts is not None,
            speculation=speculation_of(model, settings),
            adapters=None if adapters is None else adapters.layout,
            shards=self.shards,
        )
        return Placed(runner, cache, bits, prompts, adapters)

    def _adapter_bytes(self, own: AdapterLoader[ops.AdapterLayout]) -> int:
        """Return the bytes of the largest adapter, in all shards together; `own` loads shard 0's parts."""
        if not self._cuts:
            return own.max_bytes
        return adapter_bytes(
            self._opened.config, self.settings.max_lora_rank, is_exact=self.arithmetic.is_exact,
            num_shards=len(self._cuts), repeats=repeats_of(self._opened.config, self._cuts),
        )  # fmt: skip

    def is_batch_invariant(self, model: ServedModel) -> bool:
        """Return whether a sequence's bits depend on it alone, as described in `Placement`."""
        return model.kind == "native" or model.is_batch_invariant

    def abandon(self) -> None:
        """End the other shards, as described in `Placement`."""
        if self.shards is not None:
            self.shards.abandon()


def _log_float_products(packing: ops.Packing) -> None:
    """Name `--dtype bfloat16` if it is faster here: for weights of which most are multiplied in float32."""
    kept = {name: packing.num_bytes[name] for name in ops.ROUNDED}
    if ops.kernel_set().has_bfloat16_products and 2 * sum(kept.values()) > packing.num_bytes.total():
        name = max(kept, key=kept.__getitem__)
        logger.info(
            "products with weights in float%s are computed in float32; --dtype bfloat16 rounds these weights "
            "and computes prompts faster", name.removeprefix("F"),
        )  # fmt: skip


def _check_settings(settings: Settings) -> None:
    """Refuse or report settings that are for GPUs, and report a kernel set that cannot be used."""
    refused = ops.kernel_set().refused
    if refused is not None:
        logger.warning("%s; %s kernels serve", refused, ops.kernel_set().name)
    if settings.dependent_launches:
        raise ModelLoadError("--dependent-launches is for GPUs: a CPU launches no kernels")
    if settings.prompt_attention not in ("auto", "paged"):
        raise ModelLoadError(
            f"--prompt-attention {settings.prompt_attention} is for GPUs: on a CPU native kernels compute "
            "the attention of prompts"
        )
    if settings.kv_cache_dtype.startswith("fp8"):
        logger.warning("--kv-cache-dtype %s is ignored on a CPU: use int8", settings.kv_cache_dtype)
    if settings.cuda_memory_fraction < 1:
        logger.warning("--cuda-memory-fraction is ignored on a CPU: use --max-batch-total-tokens")


@dataclass(frozen=True, slots=True)
class _MemoryBudget:
    """How the free memory is divided."""

    cache: KvSize
    batch: int  # sequences that run at once: those whose recurrent states fit
    num_kept_states: int  # states of sequences that have ended
    adapter_bytes: int
    # The cache and the number of kept states if it turns out that the model's cannot be kept.
    without_kept_states: Callable[[], tuple[KvSize, int]]


def _divide(
    opened: OpenModel,
    settings: Settings,
    packing: ops.Packing,
    max_context: int,
    cuts: Sequence[ModelCut],
    free: int,
) -> _MemoryBudget:
    """Divide the memory before anything is read: weights and tables first; the cache gets the rest.

    Raises:
        ModelLoadError: if the weights, or a cache that the settings ask for, do not fit.
    """
    config = opened.config
    free = max(free - opened.table_bytes(max_context), 0)
    tensors = opened.packed_tensors()
    if cuts:
        tensors = cut_tensors(tensors)
    advice = _NO_IMAGES if opened.uses_projector else ""
    free -= check_weights_fit(tensors, packing, config.vocabulary_sizes, free, more_advice=advice)
    if settings.dtype == "auto" and packing.quantise is None and _are_rounded(tensors):
        logger.info("the weights are in float32 or float16: --dtype bfloat16 rounds them, and is faster")
    reserved = 0
    if settings.serves_adapters:
        reserved = reserved_adapter_bytes(
            config, max_loaded_adapters(settings), settings.max_lora_rank, free, is_exact=packing.is_exact,
            num_shards=max(len(cuts), 1), repeats=repeats_of(config, cuts),
        )  # fmt: skip
        free -= reserved
    num_drafts = max_drafts_per_row(settings.speculation)
    batch = fitting_batch(config, settings.max_batch_size, free, num_drafts)
    settings = replace(settings, max_batch_size=batch)
    free -= batch * state_bytes(config, num_drafts)
    kv_dtype = choose_cpu_dtype(config, settings, is_exact=packing.is_exact)
    groups, repeats = groups_of(config, kv_dtype), repeats_of(config, cuts)
    choose = partial(choose_size, config, settings, groups, kv_dtype, max_context, repeats=repeats)
    sizes = partial(choose_sizes, config, settings, free, choose)
    cache, num_kept = sizes()
    if opened.kind == "encoder":
        cache = replace(cache, bytes_per_token=0)
    check_address_space(cache)
    return _MemoryBudget(cache, batch, num_kept, reserved, partial(sizes, keeps_states=False))


def _are_rounded(tensors: list[tuple[str, int]]) -> bool:
    """Return whether `ops.Packing.rounds_floats` would round most weights."""
    num_rounded = sum(elements for name, elements in tensors if name in ops.ROUNDED)
    return 2 * num_rounded > sum(elements for _, elements in tensors)


def _choose_dtype(name: str) -> str:
    dtype = _DTYPES.get(name)
    if dtype is None:
        raise ModelLoadError(f"--dtype {name} is not supported on a CPU: use bfloat16 or float32")
    return dtype


def _quantised(method: str | None) -> str | None:
    """Return the weight format that `--quantize` names."""
    if method is None or method.upper() in ("Q8_0", "Q4_0"):
        return method and method.upper()
    logger.warning("--quantize %s is ignored: only q8_0 and q4_0 are known", method)
    return None
