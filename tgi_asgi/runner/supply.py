"""Has the system supply the first of the KV cache's memory before requests need it."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Sequence

from tgi_asgi import ops

SUPPLIED_BYTES = 192 << 20  # 8,000 tokens of the default model, which the first requests would touch anyway


class KvSupply(threading.Thread):
    """A thread that ends once the first `SUPPLIED_BYTES` of the pool are there, or when it is closed.

    Memory comes when it is first written: 0.1 ms for each 2 MiB in the step that comes to it, and 5 ms in a
    virtual machine whose host has not supplied it yet, which stalls every stream.
    """

    def __init__(self, layers: Sequence[ops.KvLayer]) -> None:
        super().__init__(name="tgi-kv-supply", daemon=True)
        self._layers = layers
        self._is_closed = threading.Event()
        self.start()

    def run(self) -> None:
        """Supply, at the lowest priority: requests go first."""
        if sys.platform == "linux":
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        ops.supply_kv(self._layers, SUPPLIED_BYTES, lambda: not self._is_closed.is_set())

    def close(self) -> None:
        """End, soon. Idempotent."""
        self._is_closed.set()
        self.join()
