"""Loads a model, or a shard's part of it, into the memory of the cores that compute it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from tgi_asgi import ops
from tgi_asgi.models.loading.open import OpenModel, ServedModel
from tgi_asgi.models.loading.watched import Watch


def load_by_team(
    opened: OpenModel, packing: ops.Packing, max_context: int, watch: Watch | None = None
) -> ServedModel:
    """Load a model in a thread on member 0's core, so that its weights are allocated in that core's memory.

    The thread is a separate one because it keeps the core and nice value permanently; the caller's belongs to
    its executor.
    """

    def as_member() -> ServedModel:
        ops.join_threads()
        return opened.load(packing, max_context, watch)

    with ThreadPoolExecutor(1, thread_name_prefix="tgi-pack") as executor:
        return executor.submit(as_member).result()
