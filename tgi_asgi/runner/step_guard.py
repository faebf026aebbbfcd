"""The errors of a GPU's steps, as the engine understands them: one of them says that the device is lost."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from tgi_asgi.ops.cuda_errors import is_out_of_memory
from tgi_asgi.runner.cuda_device import MIN_CHUNK, Device
from tgi_asgi.runner.plan import DeviceLost


class StepGuard:
    """Translates errors of steps to the engine's, and refuses steps once the device is lost.

    Attributes:
        min_chunk: As in `RunnerTraits`.
    """

    min_chunk = MIN_CHUNK

    def __init__(self, device: Device) -> None:
        self._device = device
        self._lost: DeviceLost | None = None

    @property
    def has_lost(self) -> bool:
        """Whether the device is lost."""
        return self._lost is not None

    def check(self) -> None:
        """Refuse a step.

        Raises:
            DeviceLost: if nothing can succeed on the device any more.
        """
        if self._lost is not None:
            raise self._lost

    def translated(self, error: BaseException) -> Exception:
        """Return the engine's exception for what a step raised: it says whether the device is lost."""
        if not isinstance(error, Exception):
            return RuntimeError(repr(error))
        if is_out_of_memory(error):
            return MemoryError(str(error))
        if isinstance(error, DeviceLost) or self._device.is_lost(error):
            self._lost = DeviceLost(str(error))  # without the traceback, whose frames hold graphs
            return self._lost
        return error

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """Compute a step in the body.

        Raises:
            MemoryError: if the device has too little memory for this step.
            DeviceLost: if nothing can succeed on the device any more.
        """
        self.check()
        try:
            yield
        except Exception as error:
            made = self.translated(error)
            if made is error:
                raise
            raise made from error
