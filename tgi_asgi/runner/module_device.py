"""A GPU that a module of `transformers` computes on, as the runner of its steps sees it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from tgi_asgi.errors import ModelLoadError
from tgi_asgi.runner.cuda_device import MIN_CHUNK, Device, translated
from tgi_asgi.runner.plan import DeviceLost
from tgi_asgi.settings import Settings

logger = logging.getLogger(__name__)


class ModuleDevice:
    """Translates errors of steps to the engine's, and refuses steps once the device is lost.

    Attributes:
        min_chunk: As in `RunnerTraits`.
    """

    min_chunk = MIN_CHUNK

    def __init__(self, device: Device) -> None:
        self._device = device
        self._lost: DeviceLost | None = None

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """Compute a step in the body.

        Raises:
            MemoryError: if the device has too little memory for this step.
            DeviceLost: if nothing can succeed on the device any more.
        """
        if self._lost is not None:
            raise self._lost
        try:
            yield
        except Exception as error:
            made = translated(error, self._device)
            if isinstance(made, DeviceLost):
                self._lost = made
            if made is error:
                raise
            raise made from error


def check_settings(settings: Settings, architecture: str) -> None:
    """Refuse or report what a GPU does only for native models.

    Raises:
        ModelLoadError: if the settings ask for something that would change what clients get.
    """
    what = f"{architecture} is computed by transformers' code on this GPU"
    if settings.batch_invariant:
        raise ModelLoadError(f"--batch-invariant: {what}, with products that depend on the whole batch")
    if settings.serves_adapters:
        raise ModelLoadError(
            f"LoRA adapters: {what}, where requests cannot choose one: name a single adapter as --model-id, "
            "or use the CPU with CUDA_VISIBLE_DEVICES="
        )
    if settings.kv_cache_dtype != "auto":
        raise ModelLoadError(f"--kv-cache-dtype {settings.kv_cache_dtype}: {what}: use auto")
    ignored = {
        "--prompt-attention": settings.prompt_attention not in ("auto", "paged"),
        "--prompt-precision": settings.prompt_precision != "auto",
        "--dependent-launches": settings.dependent_launches,
        "--quantize": settings.quantize is not None,
    }
    for name in (name for name, is_given in ignored.items() if is_given):
        logger.warning("%s is ignored: %s", name, what)
