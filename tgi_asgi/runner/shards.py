"""The shards of a model on a CPU, and the memory that they share.

```text
 shard 0   ─► step, head, blocks to copy ───────┐
 shard 1   its heads, columns, vocabulary ◄─────┤
 shard 2   ...                            ◄─────┘
           all: partial sums, logits and one barrier of all threads, in shared memory
```

The other shards know no plan; they compute the arrays that shard 0 made from one. `shard_processes.py` starts
and watches them.
"""

from __future__ import annotations

from collections.abc import Sequence

from tgi_asgi import ops
from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats.sources import ModelFiles
from tgi_asgi.models.config import ServedConfig
from tgi_asgi.models.loading.open import OpenModel
from tgi_asgi.models.shard import ModelCut
from tgi_asgi.runner.drafts import with_drafts
from tgi_asgi.runner.kv import KvSize, limits_of
from tgi_asgi.runner.shard_adapters import OtherAdapters
from tgi_asgi.runner.shard_processes import ShardProcesses
from tgi_asgi.runner.shard_program import CpuShardJob
from tgi_asgi.settings import Settings


def cuts_of(opened: OpenModel, settings: Settings, num_gpus: int | None) -> list[ModelCut]:
    """Return each shard's part of a model; empty if the model is not split. `num_gpus` is None on a CPU.

    Raises:
        ModelLoadError: if several shards cannot compute the model or what the settings ask for.
    """
    count = settings.num_shard
    if count == 1:
        return []
    asks, cure = f"--num-shard {count} asks for", "change it, or leave it out"
    if num_gpus is not None and num_gpus < count:
        raise ModelLoadError(f"{asks} {count} GPUs, and {num_gpus} can be seen: {cure}")
    return opened.cuts(count, reads_images=num_gpus is not None)


def repeats_of(config: ServedConfig, cuts: Sequence[ModelCut]) -> float:
    """Return how many shards hold each KV head, on average; all of them hold all latents."""
    if not cuts:
        return 1.0
    if any(cache.is_latent for cache in config.caches):
        return len(cuts)
    return sum(len(cut.kv_heads) for cut in cuts) / max(cut.kv_heads.stop for cut in cuts)


def jobs_of(
    config: ServedConfig, files: ModelFiles, settings: Settings, cuts: Sequence[ModelCut],
    packing: ops.Packing, kv_size: KvSize, max_context: int, adapters: OtherAdapters | None,
) -> list[CpuShardJob]:  # fmt: skip
    """Return what each shard needs to know, including shard 0.

    Args:
        adapters: What tells the other shards of adapters, if any are served.

    Raises:
        ModelLoadError: if the system cannot create shared memory.
    """
    memory = ops.ShardMemory(
        count=len(cuts), num_threads=ops.num_threads(), num_columns=config.hidden_size,
        limits=with_drafts(limits_of(settings, max_context), settings.speculation),
        vocab_size=config.vocab_size, num_groups=len(kv_size.windows),
        table_width=-(-max_context // kv_size.block_size),
    )  # fmt: skip
    try:
        descriptor = memory.create()
    except (OSError, AttributeError) as error:  # AttributeError: no memfd, as on macOS
        raise _no_memory(error) from error
    pipes: list[int | None] = [None] * len(cuts) if adapters is None else [None, *adapters.descriptors]
    return [
        CpuShardJob(files, settings, cut, packing, kv_size, memory, descriptor, pipe)
        for cut, pipe in zip(cuts, pipes, strict=True)
    ]


class Shards:
    """The other shards, and the memory that all shards share.

        shards = Shards(jobs)             # they begin to load
        shards.others.wait_ready()
        runner = HostRunner(model, ..., shards=shards)

    Attributes:
        others: The processes of the other shards.
        adapters: What tells them of adapters, if any are served.
        shard: The group and first vocabulary id of shard 0, for its program.
    """

    def __init__(self, jobs: Sequence[CpuShardJob], adapters: OtherAdapters | None = None) -> None:
        first, self.adapters = jobs[0], adapters
        try:
            group = first.memory.open(first.descriptor, 0)
        except (OSError, RuntimeError) as error:
            raise _no_memory(error) from error
        self.shard = ops.Shard(group, first.cut.vocab_ids.start)
        self.others = ShardProcesses(jobs[1:], lambda reason: group.abort())

    def close(self) -> None:
        """Let the other shards end, once no step runs, and wait for them. Idempotent."""
        if self.others.begin_to_close():
            if not self.shard.group.is_aborted:
                self.shard.group.end()
            self.others.end()
            self._close_pipes()

    def abandon(self) -> None:
        """End the other shards at once; this process will not serve."""
        self.others.begin_to_close()
        self.shard.group.abort()
        self.others.kill()
        self._close_pipes()

    def _close_pipes(self) -> None:
        if self.adapters is not None:
            self.adapters.close()


def _no_memory(error: Exception) -> ModelLoadError:
    return ModelLoadError(f"--num-shard: no memory can be shared between processes: {error}")
