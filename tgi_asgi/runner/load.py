"""Load a model: from its files on disk to a runner that waits for steps. Called once, in a thread.

Prints nothing: `progress` hears what is being done and how many bytes of it are done.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import cast

import torch

import tgi_asgi
from tgi_asgi import ops
from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats.sources import ModelFiles, most_adapters
from tgi_asgi.models.adapters import AdapterLoader
from tgi_asgi.models.config import ModelConfig, ServedConfig
from tgi_asgi.models.family import Model
from tgi_asgi.models.generic.encoder import EncoderConfig, EncoderModel
from tgi_asgi.models.generic.model import GenericModel
from tgi_asgi.models.loading import NamedWeights, Weights
from tgi_asgi.models.loading.open import OpenModel
from tgi_asgi.models.pooling import Dense
from tgi_asgi.models.shard import ModelCut
from tgi_asgi.runner import cuda_load, prompt_precision
from tgi_asgi.runner.cuda import CudaRunner
from tgi_asgi.runner.cuda_device import Device
from tgi_asgi.runner.cuda_shards import CudaShards
from tgi_asgi.runner.drafts import most_drafts
from tgi_asgi.runner.encoder import EncoderRunner
from tgi_asgi.runner.kv import KvSize, choose_size, free_memory
from tgi_asgi.runner.load_pooling import LoadedText, with_pooling
from tgi_asgi.runner.memory import (
    check_rope_fits,
    check_weights_fit,
    choose_context,
    choose_kept_states,
    fitting_batch,
    kept_state_bytes,
    room_for_adapters,
    state_bytes,
    tell_adapters,
)
from tgi_asgi.runner.runner import CpuRunner
from tgi_asgi.runner.shards import Shards, cuts_of, jobs_of, repeats_of
from tgi_asgi.settings import Settings, Speculation
from tgi_asgi.text.chat.template import ChatTemplate
from tgi_asgi.text.tokenizer import Tokenizer
from tgi_asgi.types import ImageProcessor, ModelInfo, Progress

logger = logging.getLogger(__name__)


_DTYPES = {"auto": torch.bfloat16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_SAMPLE_BYTES = 256  # of each tensor's head and tail go into the fingerprint


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """All that serving a model takes."""

    runner: CpuRunner | CudaRunner | EncoderRunner
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    info: ModelInfo
    image_processor: ImageProcessor | None = None  # of a model that takes images
    adapters: AdapterLoader | None = None  # where adapters are served
    shards: Shards | CudaShards | None = None  # where the model is split

    @property
    def num_blocks(self) -> int:
        return self.runner.num_blocks


def load(settings: Settings, files: ModelFiles, progress: Progress) -> LoadedModel:
    """Load the model of `files`; its weights are held once, in the kernels' layout, and unmapped after.

    Raises:
        ModelLoadError: the files are damaged or not supported, or settings and memory do not suffice.
    """
    with ExitStack() as failing:  # what is to be undone if this fails
        loaded = _load(settings, files, progress, failing)
        failing.pop_all()
        return loaded


def _load(settings: Settings, files: ModelFiles, progress: Progress, failing: ExitStack) -> LoadedModel:
    device = cuda_load.find_device()
    num_threads = ops.configure_threads(
        settings.num_threads, nice=settings.thread_nice, num_shards=settings.num_shard
    )
    if device is None and (refused := ops.kernel_set().refused) is not None:
        logger.warning("%s; %s kernels serve", refused, ops.kernel_set().name)
    with (
        OpenModel(
            files,
            chat_template_path=settings.tokenizer_config_path,
            model_impl=settings.model_impl,
            trusts_code=settings.trust_remote_code,
            rope=settings.given_rope,
        ) as opened,
        ThreadPoolExecutor(1, thread_name_prefix="tgi-load") as executor,
    ):
        text = executor.submit(opened.read_text)  # beside the weights: both take about as long
        config = opened.config
        if opened.is_generic and device is not None:
            reason = f" ({opened.why_generic})" if opened.why_generic else ""
            raise ModelLoadError(
                f"{config.architecture} is computed by transformers' code{reason}, which is served on a CPU "
                'only: set CUDA_VISIBLE_DEVICES="" to serve it there'
            )
        if device is not None and settings.serves_adapters:
            raise ModelLoadError(
                "adapters (--enable-lora, --lora-adapters, --lora-modules) are served on a CPU only as yet: "
                'set CUDA_VISIBLE_DEVICES="" to serve them there'
            )
        if device is not None and not config.generates:
            raise ModelLoadError(f"{config.architecture} embeds or scores, which is done on CPUs only as yet")
        cuts = cuts_of(opened, settings, None if device is None else device.count())
        if device is None and settings.dependent_launches:
            raise ModelLoadError("--dependent-launches is for GPUs: a CPU launches nothing")
        if device is None and settings.prompt_attention != "paged":
            raise ModelLoadError(
                f"--prompt-attention {settings.prompt_attention} is for GPUs: on a CPU prompts attend by "
                "our own kernels only"
            )
        if settings.prompt_precision != "auto":
            prompt_precision.check_served(opened, is_on_gpu=device is not None)
        image_processor = opened.read_image_processor()
        longest = choose_context(config, settings.max_total_tokens, free_memory())
        weights = _TrackedWeights(opened.weights, progress)
        name = settings.dtype
        runner: CpuRunner | CudaRunner | EncoderRunner
        kept = 0  # bytes, for adapters
        shards: Shards | CudaShards | None = None
        if device is None:
            dtype = _choose_dtype(name)
            packing = ops.Packing(
                dtype is torch.float32,
                _quantised(settings.quantize),
                has_float_prompts=settings.prompt_precision == "bfloat16",
            )
            arithmetic: ops.Arithmetic = packing
            kv_size, kept, settings = _choose_cpu_cache(opened, settings, packing, dtype, longest, cuts)
            longest = kv_size.longest(longest, settings)
            if cuts:
                opened.use_cut(cuts[0])
                config = opened.config
                shards = Shards(jobs_of(config, files, settings, cuts, packing, kv_size, longest))
                failing.callback(shards.abandon)
        else:
            assert isinstance(config, ModelConfig)  # others have been refused
            dtype = cuda_load.choose_dtype(name, config)
            arithmetic = ops.Repacking(dtype, device.device)
            if cuts:
                shards = cuda_load.make_shards(files, settings, cuts, device, dtype, longest)
                failing.callback(shards.abandon)
                opened.use_cut(cuts[0])
                config = opened.config
        check_rope_fits(config, longest, free_memory())
        with cuda_load.must_fit():
            model = load_weights(opened, arithmetic, longest, weights, is_by_team=device is None)
        if shards is not None:
            shards.wait_ready()
        progress("loading weights", weights.num_bytes, weights.num_bytes)
        if opened.is_generic:
            if opened.why_generic:
                logger.warning("no family of ours computes this model: %s", opened.why_generic)
            _announce(model)
        tokenizer, chat_template = text.result()
        pooling = opened.read_pooling()
        kv_scales = None if device is None else cuda_load.kv_scales_of(opened, settings)
    has_float_prompts = False
    adapters = None
    if settings.serves_adapters:
        adapters = AdapterLoader(model, settings.max_lora_rank)
        tell_adapters(most_adapters(settings), adapters.most_bytes, kept)
    if device is None:
        assert not isinstance(shards, CudaShards)
        has_float_prompts = packing.has_float_prompts and prompt_precision.announce(packing)
        runner = _make_cpu_runner(
            model, kv_size, settings, longest, pooling.dense, adapters,
            has_prompt_arithmetic=has_float_prompts, shards=shards,
        )  # fmt: skip
    else:
        assert not isinstance(model, GenericModel | EncoderModel)
        if settings.speculation is not None:
            logger.warning("nothing is speculated on a GPU as yet: --speculate is ignored")
        assert not isinstance(shards, Shards)
        runner, kv_size = cuda_load.make_runner(model, settings, device, dtype, longest, kv_scales, shards)
    max_total_tokens = kv_size.longest(longest, settings)
    kernels = ops.kernel_set() if device is None else None
    info = ModelInfo(
        model_id=settings.served_model_name or files.model_id,
        revision=files.revision,
        architecture=config.architecture,
        dtype=str(dtype).removeprefix("torch."),
        device="cpu" if device is None else "cuda",
        vocab_size=config.vocab_size,
        max_input_tokens=_max_input_tokens(settings, max_total_tokens),
        max_total_tokens=max_total_tokens,
        eos_token_ids=tokenizer.eos_ids,
        kv_tokens=kv_size.held_tokens(max_total_tokens, settings),
        kv_bytes=kv_size.num_bytes,
        max_batch_size=runner.max_batch_size,
        num_kept_states=runner.num_kept_states or 0,
        kept_state_bytes=(runner.num_kept_states or 0) * kept_state_bytes(config),
        num_threads=num_threads,
        num_shards=settings.num_shard,
        kernel_set=kernels.name if kernels is not None else None,
        prompt_precision="bfloat16" if has_float_prompts else None,
        created=int(time.time()),
        fingerprint=weights.fingerprint(
            arithmetic,
            kv_size,
            kernels,
            _others(settings, config, longest) + (f" kv {kv_scales}" if kv_scales else ""),
            has_float_prompts=has_float_prompts,
        ),
        implementation="transformers" if opened.is_generic else "native",
        is_batch_invariant=_is_batch_invariant(model, settings, device),
    )
    info = with_pooling(info, config, pooling, settings, LoadedText(tokenizer, chat_template))
    _return_freed_memory()
    return LoadedModel(runner, tokenizer, chat_template, info, image_processor, adapters, shards)


def load_weights(
    opened: OpenModel, arithmetic: ops.Arithmetic, longest: int, weights: Weights, *, is_by_team: bool
) -> Model | GenericModel | EncoderModel:
    """Load the model; for a CPU in a thread with member 0's core, whose memory its weights are to lie in.

    A thread of its own, as it keeps core and nice value for good: the caller's is its executor's.
    """
    if not is_by_team:
        return opened.load(arithmetic, longest, weights)

    def as_member() -> Model | GenericModel | EncoderModel:
        ops.join_threads()
        return opened.load(arithmetic, longest, weights)

    with ThreadPoolExecutor(1, thread_name_prefix="tgi-pack") as executor:
        return executor.submit(as_member).result()


def _announce(model: Model | GenericModel | EncoderModel) -> None:
    """Say in one line how the code of `transformers` computes the model."""
    import transformers

    architecture, version = model.config.architecture, transformers.__version__
    if isinstance(model, EncoderModel) and model.config.floor_reason:
        logger.warning(
            "%s runs one text at a time, by the code of transformers %s, slowly: %s",
            architecture, version, model.config.floor_reason,
        )  # fmt: skip
    elif not isinstance(model, GenericModel | EncoderModel):
        logger.info("%s of transformers %s has the common shape: our own code runs it", architecture, version)
    elif model.config.floor_reason:
        logger.warning(
            "%s runs one sequence at a time, by the code of transformers %s alone, slowly: %s",
            architecture, version, model.config.floor_reason,
        )  # fmt: skip
    else:
        logger.info(
            "%s runs by the code of transformers %s, on our kernels%s",
            architecture, version, "" if model.is_batch_invariant else "; batch_invariant: false",
        )  # fmt: skip


def _is_batch_invariant(
    model: Model | GenericModel | EncoderModel, settings: Settings, device: Device | None
) -> bool:
    if isinstance(model, GenericModel | EncoderModel):
        return model.is_batch_invariant
    return device is None or settings.batch_invariant


def _choose_cpu_cache(
    opened: OpenModel,
    settings: Settings,
    packing: ops.Packing,
    dtype: torch.dtype,
    longest: int,
    cuts: Sequence[ModelCut],
) -> tuple[KvSize, int, Settings]:
    """Choose the cache's size before anything is read: of what is free once weights and tables are there.

    Returns also the bytes that are kept free for adapters, and settings whose `max_batch_size` is of as many
    sequences as have room for their states, and whose `max_kept_states` says how many more there are.
    """
    if settings.kv_cache_dtype.startswith("fp8"):
        logger.warning("--kv-cache-dtype %s is ignored on a CPU: take int8", settings.kv_cache_dtype)
    free = max(free_memory() - opened.table_bytes(longest), 0)
    vocabulary = opened.config.vocab_size * opened.config.hidden_size
    free -= check_weights_fit(opened.held(), packing, vocabulary, free)
    kept = 0
    if settings.serves_adapters:
        kept = room_for_adapters(opened.config, most_adapters(settings), settings.max_lora_rank, free)
        free -= kept
    num_drafts = most_drafts(settings.speculation)
    most = fitting_batch(opened.config, settings.max_batch_size, free, num_drafts)
    settings = replace(settings, max_batch_size=most)
    free -= most * state_bytes(opened.config, num_drafts)
    size = choose_size(opened.config, settings, dtype, longest, free, repeats=repeats_of(cuts))
    cache_bytes = size.num_bytes if settings.prefix_cache else 0
    num_kept = choose_kept_states(opened.config, settings.max_kept_states, cache_bytes, free)
    if settings.max_kept_states and not num_kept:
        logger.warning(
            "--max-kept-states is ignored: nothing can be kept of %s's states", opened.config.architecture
        )
    if num_kept:
        free -= num_kept * kept_state_bytes(opened.config)
        size = choose_size(opened.config, settings, dtype, longest, free, repeats=repeats_of(cuts))
    settings = replace(settings, max_kept_states=num_kept)
    size = replace(size, bytes_per_token=0) if isinstance(opened.config, EncoderConfig) else size
    return size, kept, settings


def _make_cpu_runner(
    model: Model | GenericModel | EncoderModel,
    kv_size: KvSize,
    settings: Settings,
    longest: int,
    dense: Sequence[Dense],
    adapters: AdapterLoader | None,
    *,
    has_prompt_arithmetic: bool,
    shards: Shards | None,
) -> CpuRunner | EncoderRunner:
    if isinstance(model, EncoderModel):
        return EncoderRunner(
            model,
            num_blocks=kv_size.num_blocks,
            block_size=kv_size.block_size,
            max_batch_size=settings.max_batch_size,
            max_step_tokens=settings.max_batch_prefill_tokens,
            max_context=longest,
            dense=dense,
        )
    return CpuRunner(
        model,
        kv_size,
        max_batch_size=settings.max_batch_size,
        max_step_tokens=settings.max_batch_prefill_tokens + settings.max_batch_size,
        max_context=longest,
        image_cache=settings.image_cache,
        dense=dense,
        has_prompt_arithmetic=has_prompt_arithmetic,
        speculation=speculation_of(model, settings),
        num_kept_states=settings.max_kept_states or 0,
        adapters=None if adapters is None else adapters.layout,
        shards=shards,
    )


def speculation_of(model: Model | GenericModel, settings: Settings) -> Speculation | None:
    """Return how tokens are guessed; none, said once, where it could change the text or not be undone."""
    speculation = settings.speculation
    if speculation is None or not model.config.generates:
        return None
    generic = model if isinstance(model, GenericModel) else None
    reason = (
        "what it keeps of a sequence cannot be taken back token by token"
        if generic is not None and generic.config.has_states
        else "its logits depend on what else is computed"
        if generic is not None and not generic.is_batch_invariant
        else "it takes images"
        if generic is not None and generic.config.seeing is not None
        else None
    )
    if reason is None:
        return speculation
    logger.warning("nothing is speculated for %s: %s", model.config.architecture, reason)
    return None


def _others(settings: Settings, config: ServedConfig, longest: int) -> str:
    """Name what decides bits beside the model's files: rotary tables, and the order of sums."""
    given = settings.given_rope
    by_context = f" for {longest}" if config.longest_context > config.context_length else ""
    by_shards = f" by {settings.num_shard}" if settings.num_shard > 1 else ""
    by_torch = " prompts by sdpa" if settings.prompt_attention == "sdpa" else ""
    return f"{'' if given is None else f' {given}'}{by_context}{by_shards}{by_torch}"


def _return_freed_memory() -> None:
    """Give the system what loading has freed: glibc would keep it for an allocation that does not come."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # other C libraries have none
        trim(0)


def _choose_dtype(name: str) -> torch.dtype:
    dtype = _DTYPES.get(name)
    if dtype is None:
        raise ModelLoadError(f"--dtype {name} is not computed on a CPU: take bfloat16 or float32")
    return dtype


def _quantised(method: str | None) -> str | None:
    """Return the weight format that `--quantize` asks for."""
    if method is None or method.upper() in ("Q8_0", "Q4_0"):
        return method and method.upper()
    logger.warning("--quantize %s is ignored: q8_0 and q4_0 are known", method)
    return None


def _max_input_tokens(settings: Settings, max_total_tokens: int) -> int:
    longest = max(max_total_tokens - 1, 1)
    return min(settings.max_input_tokens or longest, longest)


class _TrackedWeights:
    """Weights that report how much of them has been read, and remember which they were."""

    def __init__(self, weights: Weights, progress: Progress) -> None:
        self.num_bytes, self.is_gguf = weights.num_bytes, weights.is_gguf
        self._weights = weights
        self._progress = progress
        self._done = 0
        self._hash = hashlib.blake2b(digest_size=8)

    def __contains__(self, name: object) -> bool:
        return name in self._weights

    def get(self, name: str, shape: tuple[int, ...]) -> ops.WeightSource:
        """Return a tensor, as `Weights.get` says."""
        self._progress("loading weights", self._done, self.num_bytes)
        source = self._weights.get(name, shape)
        self._done = min(self._done + source.data.nbytes, self.num_bytes)  # decoded, it may be more
        self._hash.update(f"{name} {source.format} {source.shape}\n".encode())
        self._hash.update(source.data[:_SAMPLE_BYTES].data)
        self._hash.update(source.data[-_SAMPLE_BYTES:].data)
        return source

    def names(self) -> list[str]:
        """Return the names of all weights, as `NamedWeights.names` says."""
        return cast(NamedWeights, self._weights).names()

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a weight's shape, as `NamedWeights.shape` says."""
        return cast(NamedWeights, self._weights).shape(name)

    def parts(self, name: str) -> list[str]:
        """Return a weight's tensors, as `NamedWeights.parts` says."""
        return cast(NamedWeights, self._weights).parts(name)

    def unread(self) -> list[str]:
        """Return what nobody has asked for, as `Weights.unread` says."""
        return self._weights.unread()

    def stored(self) -> dict[str, tuple[str, int]]:
        """Return formats and sizes, as `Weights.stored` says."""
        return self._weights.stored()

    def close(self) -> None:
        """Unmap the files."""
        self._weights.close()

    def fingerprint(
        self,
        arithmetic: ops.Arithmetic,
        kv_size: KvSize,
        kernels: ops.KernelSet | None,
        others: str,
        *,
        has_float_prompts: bool,
    ) -> str:
        """Name what decides the output's bits: weights, arithmetic, code version, and `others`."""
        rounding = "" if kernels is None else kernels.arithmetic
        options = (
            f"{arithmetic} {rounding} {kv_size.dtype} {kv_size.block_size} {tgi_asgi.__version__}{others}"
        )
        self._hash.update(f"{options}{' prompts bfloat16' if has_float_prompts else ''}".encode())
        return f"fp_{self._hash.hexdigest()}"
