"""A GPU that a module of `transformers` computes on, as the runner of its steps sees it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from tgi_asgi.runner.cuda_device import MIN_CHUNK, Device, translated
from tgi_asgi.runner.plan import DeviceLost


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
