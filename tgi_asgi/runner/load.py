"""Loads a model from its files into a runner that is ready for steps. Called once, in a thread.

Prints nothing: `progress` receives the current activity and its bytes done.
"""

from __future__ import annotations

import importlib.util
import logging
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import tgi_asgi
from tgi_asgi import ops
from tgi_asgi.formats.sources import ModelFiles
from tgi_asgi.model_info import EncoderDecoder, ModelInfo
from tgi_asgi.models.adapters import AdapterLoader
from tgi_asgi.models.config import ServedConfig
from tgi_asgi.models.generation_config import sampling_defaults, suppressed_ids, unread_settings
from tgi_asgi.models.loading.open import OpenModel, ServedModel
from tgi_asgi.runner.cpu_load import OnCpu
from tgi_asgi.runner.free_memory import free_memory
from tgi_asgi.runner.load_pooling import score_tokens, with_pooling
from tgi_asgi.runner.memory import check_rope_fits, choose_context, kept_state_bytes
from tgi_asgi.runner.placement import Placed, Placement, Runner
from tgi_asgi.runner.projector import with_usable_projector
from tgi_asgi.runner.shard_adapters import SplitAdapterLoader
from tgi_asgi.runner.shards import Shards
from tgi_asgi.runner.weight_progress import WeightProgress
from tgi_asgi.settings import Settings
from tgi_asgi.system import num_processors, return_freed_memory
from tgi_asgi.text.chat.template import ChatTemplate
from tgi_asgi.text.tokenizer import Tokenizer
from tgi_asgi.types import ImageProcessor, Progress, no_progress

if TYPE_CHECKING:
    from tgi_asgi.runner.cuda_device import Device
    from tgi_asgi.runner.cuda_shards import CudaShards

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """Everything needed to serve a model."""

    runner: Runner
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    info: ModelInfo
    image_processor: ImageProcessor | None = None  # for models that accept images
    adapters: AdapterLoader[Any] | SplitAdapterLoader | None = None  # if adapters are served
    shards: Shards | CudaShards | None = None  # if the model is split


def load(settings: Settings, files: ModelFiles, progress: Progress = no_progress) -> LoadedModel:
    """Load the model of `files`.

    Weights are held once, in the kernels' layout; the files are unmapped afterwards.

    Raises:
        ModelLoadError: if the files are damaged or not supported, or settings and memory do not suffice.
    """
    with ExitStack() as failing:  # callbacks that undo a failed load
        loaded = _load(settings, files, progress, failing)
        failing.pop_all()
    return_freed_memory()
    return loaded


def _load(settings: Settings, files: ModelFiles, progress: Progress, failing: ExitStack) -> LoadedModel:
    device = find_device()
    files = with_usable_projector(files, settings, is_on_gpu=device is not None)
    num_threads = ops.configure_threads(
        _usable_threads(settings.num_threads), nice=settings.thread_nice, num_shards=settings.num_shard
    )
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
        pooling = opened.companions.pooling()

        def read_text() -> tuple[Tokenizer, ChatTemplate | None, tuple[int, ...]]:
            tokenizer, template = opened.read_text()
            return tokenizer, template, score_tokens(opened.config, pooling, settings, tokenizer)

        reading = executor.submit(read_text)  # in parallel with the weights: both take about as long
        free = free_memory()
        max_context = choose_context(opened.config, settings.max_total_tokens, free)
        place = _place(opened, files, settings, device, max_context, free)
        failing.callback(place.abandon)
        check_rope_fits(opened.config, place.max_context, free)
        image_processor = opened.read_image_processor()

        def report(stage: str, done: int, total: int | None) -> None:
            if reading.done():  # if it has failed, the rest would be read in vain
                reading.result()
            progress(stage, done, total)

        reads = WeightProgress(opened.weights.num_bytes, report)
        model = place.load(reads)
        reads.end()
        if opened.is_generic or (model.kind == "native" and model.images is not None):
            _announce(model, opened.why_generic)
        tokenizer, chat_template, scored = reading.result()
        generation = opened.companions.generation_config()
    placed = place.place(model, pooling)
    info = _describe(place, placed, opened, model, files, reads, tokenizer, num_threads)
    info = with_pooling(info, opened, pooling, place.settings, scored, chat_template)
    info = _with_sampling(info, generation, place.settings)
    return LoadedModel(
        placed.runner, tokenizer, chat_template, info, image_processor, placed.adapters, place.shards
    )


def find_device() -> Device | None:
    """Return the GPU for steps, if there is one; imports torch only if there are kernels for it."""
    if importlib.util.find_spec("tgi_asgi._cuda") is None:
        return None
    from tgi_asgi.runner import cuda_load

    return cuda_load.find_device()


def _place(
    opened: OpenModel, files: ModelFiles, settings: Settings, device: Device | None, max_context: int,
    free: int,
) -> Placement:  # fmt: skip
    if device is None:
        return OnCpu(opened, files, settings, max_context, free)
    from tgi_asgi.runner.cuda_load import OnCuda

    return OnCuda(opened, files, settings, device, max_context)


def _describe(
    place: Placement, placed: Placed, opened: OpenModel, model: ServedModel, files: ModelFiles,
    reads: WeightProgress, tokenizer: Tokenizer, num_threads: int,
) -> ModelInfo:  # fmt: skip
    """Return the API's description of the model, without how it is sampled, embeds and scores."""
    settings, config = place.settings, opened.config
    runner, cache, kernels = placed.runner, placed.cache, place.kernels
    max_total_tokens = cache.longest_fitting(place.max_context)
    num_kept = runner.traits.num_kept_states or 0
    return ModelInfo(
        model_id=files.model_id,
        revision=files.revision,
        architecture=config.architecture,
        dtype=place.dtype,
        device=place.device,
        vocab_size=config.vocab_size,
        max_input_tokens=_max_input_tokens(settings, max_total_tokens, config.encoder_decoder),
        max_total_tokens=max_total_tokens,
        eos_token_ids=tokenizer.eos_ids,
        kv_tokens=cache.held_tokens(max_total_tokens),
        kv_bytes=cache.num_bytes,
        max_batch_size=runner.traits.max_batch_size,
        num_kept_states=num_kept,
        kept_state_bytes=num_kept * kept_state_bytes(config),
        num_threads=num_threads,
        num_shards=settings.num_shard,
        kernel_set=None if kernels is None else kernels.name,
        prompt_precision=placed.prompt_precision,
        created=int(time.time()),
        fingerprint=reads.fingerprint(_bits(place, placed, config)),
        implementation="transformers" if opened.is_generic else "native",
        encoder_decoder=config.encoder_decoder,
        is_batch_invariant=place.is_batch_invariant(model),
    )


def _with_sampling(info: ModelInfo, generation_config: Mapping[str, Any], settings: Settings) -> ModelInfo:
    """Add how the model is sampled, and log which values requests get that give none."""
    chosen = settings.choose_sampling(sampling_defaults(generation_config))
    if info.generates and (given := chosen.given()):
        shown = ", ".join(f"{name} {value:g}" for name, value in given.items())
        logger.info("requests without sampling values get %s (TGI's own routes: TGI's)", shown)
    if info.generates and (unread := unread_settings(generation_config)):
        logger.warning("not followed, although generation_config.json has them: %s", ", ".join(unread))
    suppressed = suppressed_ids(generation_config, info.vocab_size, info.eos_token_ids)
    return replace(info, sampling=chosen, suppressed_ids=suppressed)


def _bits(place: Placement, placed: Placed, config: ServedConfig) -> str:
    """Name what decides output bits besides the model's files.

    That is the arithmetic, the cache, the rotary tables, the order of sums and the code.
    """
    settings = place.settings
    is_stretched = config.longest_context > config.context_length
    parts = [
        placed.bits,
        f"{placed.cache.dtype} {placed.cache.block_size}",
        None if settings.given_rope is None else f"{settings.given_rope}",
        f"for {place.max_context}" if is_stretched else None,
        f"by {settings.num_shard}" if settings.num_shard > 1 else None,
        tgi_asgi.__version__,
    ]
    return " ".join(part for part in parts if part is not None)


def _announce(model: ServedModel, why_generic: str | None) -> None:
    """Log why and how `transformers` code computes the model, one line each."""
    import transformers

    if why_generic:
        logger.warning("native code does not compute this model: %s", why_generic)

    architecture, version = model.config.architecture, transformers.__version__
    if model.kind == "encoder" and model.config.sequential_reason:
        logger.warning(
            "%s runs one text at a time, slowly, on the code of transformers %s: %s",
            architecture, version, model.config.sequential_reason,
        )  # fmt: skip
    elif model.kind == "native" and model.images is not None:
        logger.info(
            "native code runs the text of %s, and the code of transformers %s encodes its images",
            architecture, version,
        )  # fmt: skip
    elif model.kind == "native":
        logger.info("%s of transformers %s has the common shape: native code runs it", architecture, version)
    elif model.config.encoder_decoder is not None and model.kind == "generic":
        logger.info(
            "%s runs by the code of transformers %s: prompts one at a time, and answers %s",
            architecture, version, "together" if model.is_batched else "one at a time, too",
        )  # fmt: skip
    elif model.config.sequential_reason:
        logger.warning(
            "%s runs one sequence at a time, slowly, on the code of transformers %s only: %s",
            architecture, version, model.config.sequential_reason,
        )  # fmt: skip
    else:
        logger.info(
            "%s runs by the code of transformers %s, on native kernels%s",
            architecture, version, "" if model.is_batch_invariant else "; batch_invariant: false",
        )  # fmt: skip


def _usable_threads(wanted: int | None) -> int | None:
    """Return `--num-threads`, cut to the processors: members that share one hold up the team."""
    usable = num_processors()
    if wanted is None or wanted <= usable:
        return wanted
    logger.warning("--num-threads %d is cut to %d: this process may use no more processors", wanted, usable)
    return usable


def _max_input_tokens(settings: Settings, max_total_tokens: int, pair: EncoderDecoder | None) -> int:
    longest, wanted = max(max_total_tokens - 1, 1), settings.max_input_tokens
    why = f"prompt and output have {max_total_tokens} tokens together"
    if pair is not None and pair.max_prompt is not None and pair.max_prompt < longest:
        longest, why = pair.max_prompt, "the encoder has no more positions"
    if wanted is None or wanted <= longest:
        return wanted or longest
    logger.warning("--max-input-tokens %d is cut to %d: %s", wanted, longest, why)
    return longest
