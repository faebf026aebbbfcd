"""Allocates the adapters' slots on a GPU; each shard's GPU has its own."""

from __future__ import annotations

import logging

import torch

from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats.sources import adapter_sources, max_loaded_adapters
from tgi_asgi.models.adapters import targets_of
from tgi_asgi.models.family import Model
from tgi_asgi.ops.cuda_adapters import CudaAdapterLayout
from tgi_asgi.runner.cuda_device import Device
from tgi_asgi.settings import Settings

logger = logging.getLogger(__name__)


def make_adapter_layout(
    model: Model, settings: Settings, device: Device, dtype: torch.dtype
) -> CudaAdapterLayout:
    """Allocate the slots of adapters on the device, as many as a step may have.

    Raises:
        ModelLoadError: if adapters cannot change anything in this model, or their slots do not fit.
    """
    num_slots = min(settings.max_loras, max_loaded_adapters(settings))
    if settings.admin_api_key is None:  # no others can be loaded later
        num_slots = min(num_slots, max(len(adapter_sources(settings)), 1))
    targets, rank = targets_of(model), settings.max_lora_rank
    try:
        layout = CudaAdapterLayout(targets, rank, num_slots=num_slots, dtype=dtype, device=device.device)
    except torch.OutOfMemoryError as error:
        raise ModelLoadError(
            f"the GPU has no memory for {num_slots} adapters of rank {rank}: lower --max-loras or "
            f"--max-lora-rank ({error})"
        ) from error
    logger.info(
        "%d adapters on the GPU, with space for --max-lora-rank %d on all products, take %.2f GiB",
        num_slots, rank, layout.pool.nbytes / (1 << 30),
    )  # fmt: skip
    return layout
