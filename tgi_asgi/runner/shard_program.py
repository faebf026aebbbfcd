"""The part of a model that a shard other than shard 0 computes on a CPU: what it is, and how it is loaded."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection

from tgi_asgi import ops
from tgi_asgi.formats.sources import ModelFiles
from tgi_asgi.models.decoder import Decoder
from tgi_asgi.models.loading.open import OpenModel
from tgi_asgi.models.shard import ModelCut
from tgi_asgi.runner.drafts import max_drafts_per_row
from tgi_asgi.runner.kv import KvSize, groups_of
from tgi_asgi.runner.load_by_team import load_by_team
from tgi_asgi.runner.programs import make_cpu_pool, make_program
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

    @property
    def rank(self) -> int:
        """The shard's number."""
        return self.cut.rank

    @property
    def descriptors(self) -> Sequence[int]:
        """The shared memory's descriptor."""
        return (self.descriptor,)

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
        model = load_by_team(opened, job.packing, limits.max_context, opened.weights)
    pool = make_cpu_pool(opened.config, job.kv_size, groups_of(opened.config, job.kv_size.dtype))
    assert pool is not None and isinstance(model, Decoder)
    program = make_program(
        model,
        pool.layers,
        limits,
        num_drafts=max_drafts_per_row(settings.speculation),
        shard=ops.Shard(group, cut.vocab_ids.start),
    )
    ops.join_threads()
    assert program.native is not None
    return program.native
