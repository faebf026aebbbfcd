"""Loads the part of a model that a shard other than shard 0 computes, as a program for CPUs."""

from __future__ import annotations

import os

from tgi_asgi import ops
from tgi_asgi.models.decoder import Decoder
from tgi_asgi.models.loading.open import OpenModel
from tgi_asgi.runner.cpu_load import load_by_team
from tgi_asgi.runner.drafts import MAX_DRAFTS_PER_STEP, max_drafts_per_row
from tgi_asgi.runner.kv import groups_of
from tgi_asgi.runner.plan import DraftLimits
from tgi_asgi.runner.programs import make_pool, make_program
from tgi_asgi.runner.shards import CpuShardJob


def load(job: CpuShardJob) -> ops.NativeProgram:
    """Load this shard's part of the model; return its program, which the calling thread follows.

    Raises:
        ModelLoadError: if a tensor is missing or does not fit.
    """
    settings, cut, how = job.settings, job.cut, job.settings.speculation
    # While the process may still use the cores of all shards: the group compares their number with that of
    # all threads, and yields early if there are fewer.
    group = job.memory.open(job.descriptor, cut.rank)
    os.close(job.descriptor)
    num_threads, num_cores = job.memory.num_threads, ops.use_share_of_cores(cut.rank, cut.count)
    ops.configure_threads(
        num_threads, nice=settings.thread_nice, pin=num_threads == num_cores, num_shards=cut.count
    )
    with OpenModel(job.files, model_impl=settings.model_impl, rope=settings.given_rope) as opened:
        opened.use_cut(cut)
        model = load_by_team(opened, job.packing, job.longest, opened.weights)
    pool = make_pool(opened.config, job.kv_size, groups_of(opened.config, job.kv_size.dtype))
    assert pool is not None and isinstance(model, Decoder)
    program = make_program(
        model,
        pool.layers,
        max_batch_size=settings.max_batch_size,
        max_step_tokens=job.memory.max_tokens,
        max_context=job.longest,
        drafts=None if how is None else DraftLimits(max_drafts_per_row(how), MAX_DRAFTS_PER_STEP),
        shard=ops.Shard(group, cut.vocab_ids.start),
    )
    ops.join_threads()
    assert program.native is not None
    return program.native
