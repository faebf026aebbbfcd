"""The part of a model that a shard other than shard 0 computes on a CPU: what it is, and how it is loaded."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection

from tgi_asgi import ops
from tgi_asgi.formats.sources import ModelFiles
from tgi_asgi.models.adapters import AdapterLoader
from tgi_asgi.models.decoder import Decoder
from tgi_asgi.models.loading.open import OpenModel
from tgi_asgi.models.shard import ModelCut
from tgi_asgi.runner.drafts import max_drafts_per_row
from tgi_asgi.runner.kv import KvSize, groups_of
from tgi_asgi.runner.load_by_team import load_by_team
from tgi_asgi.runner.programs import make_adapter_layout, make_cpu_pool, make_program
from tgi_asgi.runner.shard_adapters import follow_adapters
from tgi_asgi.settings import Settings


@dataclass(frozen=True, slots=True)
class CpuShardJob:
    """What a shard needs to know to compute its part, as chosen by shard 0."""

    files: ModelFiles
    settings: Settings
    cut: ModelCut
    packing: ops.Packing
    kv_size: KvSize
    memory: ops.ShardMemory
    descriptor: int  # of that memory
    adapter_pipe: int | None = None  # a descriptor, as `follow_adapters` takes it; None: no adapters

    @property
    def rank(self) -> int:
        """The shard's number."""
        return self.cut.rank

    @property
    def descriptors(self) -> Sequence[int]:
        """The descriptors of the shared memory and of the pipe."""
        return (self.descriptor,) if self.adapter_pipe is None else (self.descriptor, self.adapter_pipe)

    def load(self, connection: Connection) -> Callable[[], None]:
        """Load the part, as described in `ShardJob.load`."""
        return load_program(self).follow


def load_program(job: CpuShardJob) -> ops.NativeProgram:
    """Load this shard's part of the model; return its program, which the calling thread follows.

    Raises:
        ModelLoadError: if a tensor is missing or does not fit.
    """
    settings, cut = job.settings, job.cut
    # While the process may still use the cores of all shards: the group compares their number with that of
    # all threads, and yields early if there are fewer.
    group = job.memory.open(job.descriptor, cut.rank)
    os.close(job.descriptor)
    num_threads, num_cores = job.memory.num_threads, ops.use_share_of_cores(cut.rank, cut.count)
    ops.configure_threads(
        num_threads, nice=settings.thread_nice, pin=num_threads == num_cores, num_shards=cut.count
    )
    limits = job.memory.limits
    with OpenModel(job.files, model_impl=settings.model_impl, rope=settings.given_rope) as opened:
        opened.use_cut(cut)
        model = load_by_team(opened, job.packing, limits.max_context)
    pool = make_cpu_pool(opened.config, job.kv_size, groups_of(opened.config, job.kv_size.dtype))
    assert pool is not None and isinstance(model, Decoder)
    adapters = None
    if job.adapter_pipe is not None:
        adapters = AdapterLoader(make_adapter_layout(model, settings, job.packing))
    program = make_program(
        model,
        pool.layers,
        limits,
        num_drafts=max_drafts_per_row(settings.speculation),
        adapters=None if adapters is None else adapters.layout,
        shard=ops.Shard(group, cut.vocab_ids.start),
    )
    native = program.native
    assert native is not None
    if job.adapter_pipe is not None and adapters is not None:
        # Before this thread may be pinned to a core, which the new one would inherit.
        follow_adapters(job.adapter_pipe, adapters, native.keep_adapter, native.drop_adapter)
    ops.join_threads()
    return native
