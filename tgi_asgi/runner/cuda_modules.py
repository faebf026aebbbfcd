"""Places a model on a GPU that the code of `transformers` computes: its cache and its runner.

Nothing is recorded: a step is one call of the module, whose code launches its kernels one by one, and tokens
are sampled on the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from tgi_asgi import ops
from tgi_asgi.errors import ModelLoadError
from tgi_asgi.models.generic.steps import decoding_step_of, step_of
from tgi_asgi.models.pooling import Dense
from tgi_asgi.ops.cuda_kv import dtype_name
from tgi_asgi.runner.cuda_device import Device
from tgi_asgi.runner.drafts import speculation_of
from tgi_asgi.runner.encoder import EncoderRunner
from tgi_asgi.runner.kv import (
    CacheSizes,
    KvSize,
    choose_size,
    choose_sizes,
    gpu_cure,
    gpu_groups_of,
    limits_of,
    step_tokens,
)
from tgi_asgi.runner.memory import VISION_SHARE, fitting_batch, state_bytes
from tgi_asgi.runner.runner import HostRunner
from tgi_asgi.runner.step_guard import StepGuard
from tgi_asgi.settings import Settings

if TYPE_CHECKING:
    from tgi_asgi.models.generic.encoder import EncoderModel
    from tgi_asgi.models.generic.model import GenericModel

# Of the memory that is free after the weights, what steps do not use but libraries may, and the share of the
# rest that the cache gets: torch's memory is in pieces of other sizes later than in the steps tried here.
_RESERVE, _SHARE = 1 << 30, 0.92
_OWN_CACHE_SHARE = 0.5  # of it for sequences whose cache is the model's own: steps copy it


def place_module(
    model: GenericModel | EncoderModel, settings: Settings, device: Device, dtype: torch.dtype,
    max_context: int, dense: Sequence[Dense],
) -> tuple[HostRunner | EncoderRunner, KvSize]:  # fmt: skip
    """Create the runner of a module whose weights are on the device; return also its cache's size.

    Args:
        dtype: Type of keys and values.
        max_context: Maximum number of tokens in a sequence.
        dense: Dense layers applied to pooled vectors.

    Raises:
        ModelLoadError: if the device has too little memory.
    """
    config, kv_name = model.config, dtype_name(dtype)
    groups, cure = gpu_groups_of(config, dtype.itemsize), gpu_cure(settings)
    if model.kind == "encoder":
        cache = choose_size(
            config, settings, groups, kv_name, max_context, device.free_bytes(), share=1.0, cure=cure
        )
        encoder = EncoderRunner(
            model,
            cache,
            replace(limits_of(settings, max_context), max_tokens=settings.max_batch_prefill_tokens),
            dense=dense,
            device=StepGuard(device),
        )
        return encoder, replace(cache, bytes_per_token=0)
    rows = model.module.get_input_embeddings().weight.shape[0]
    if config.vocab_size > rows:  # a token without a row would end all work on the device
        raise ModelLoadError(f"the model has {rows} embeddings for {config.vocab_size} tokens")
    free = _free_beside_steps(model, settings, device, kv_name, max_context)
    batch = fitting_batch(config, settings.max_batch_size, free)
    settings = replace(settings, max_batch_size=batch)
    free -= batch * state_bytes(config)
    choose = partial(
        choose_size, config, settings, groups, kv_name, max_context, share=_cache_share(model), cure=cure
    )
    cache, num_kept = choose_sizes(config, settings, free, choose, keeps_states=model.keeps_states)
    runner = HostRunner(
        model,
        CacheSizes(cache, num_kept, settings.image_cache),
        limits_of(settings, max_context),
        dense=dense,
        speculation=speculation_of(model, settings),
        device=StepGuard(device),
    )
    return runner, cache


def _cache_share(model: GenericModel) -> float:
    if model.config.sequential_reason:
        return _OWN_CACHE_SHARE
    return _SHARE if model.config.vision is None else VISION_SHARE


def _free_beside_steps(
    model: GenericModel, settings: Settings, device: Device, kv_name: ops.KvDtype, max_context: int
) -> int:
    """Return the device's free memory without what the largest steps and the images take.

    Raises:
        ModelLoadError: if that leaves nothing.
    """
    peak = 0
    if not model.config.sequential_reason:
        call = step_of(model, step_tokens(settings), num_rows=settings.max_batch_size, dtype=kv_name)
        peak = device.peak_bytes(call)
        del call
    if not model.config.has_states:
        call = decoding_step_of(model, settings.max_batch_size, max_context, kv_name)
        peak = max(peak, device.peak_bytes(call))
        del call
    free = device.free_bytes()
    images = 0
    if model.config.vision is not None:
        images = settings.image_cache
        if model.config.vision.has_cross_attention:  # requests keep keys and values of their images
            images += settings.max_image_memory
    left = free - peak - images - min(_RESERVE, free // 8)
    if left <= 0:
        raise ModelLoadError(
            f"the largest step takes {peak / (1 << 30):.1f} GiB, {free / (1 << 30):.1f} GiB are free on the "
            "GPU: lower --max-batch-prefill-tokens or --max-batch-size, or use a smaller model"
        )
    return left
