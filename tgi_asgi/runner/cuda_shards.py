"""Several GPUs that compute a model together: rank 0's side, which tells the others what to launch.

```text
 rank 0   plan ─► inputs ─► pipe: shape, inputs ─────┐   the same calls, in the same order, by all:
 rank 1   (cuda_follower.py)  up, launch  ◄──────────┤   collectives meet on the devices, and nowhere
 rank 2   ...                             ◄──────────┘   waits a host for another
```

The others know no plan and no sampler: what a slot drew last is in the ids that rank 0 sends them from its
device, within the step.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import Tensor

from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats.sources import ModelFiles
from tgi_asgi.models.shard import ModelCut
from tgi_asgi.ops.cuda_shards import CudaShard, DeviceGroup
from tgi_asgi.runner.cuda_buffers import StepShape
from tgi_asgi.runner.cuda_device import Device
from tgi_asgi.runner.cuda_steps import CudaTypes, StepLimits
from tgi_asgi.runner.plan import DeviceLost
from tgi_asgi.runner.shard_processes import ShardProcesses
from tgi_asgi.settings import Settings

_MULTIPLE = 8  # of columns that a product of the CUDA kernels takes


@dataclass(frozen=True, slots=True)
class CudaShardJob:
    """What a process must know to compute its part, as the first has chosen it."""

    files: ModelFiles
    settings: Settings
    cuts: Sequence[ModelCut]  # of all ranks
    rank: int
    device_class: type[Device]
    limits: StepLimits
    types: CudaTypes  # but for the scales that files say
    store: Path  # as `DeviceGroup` has it
    descriptors: Sequence[int] = ()

    @property
    def cut(self) -> ModelCut:
        """What this rank has."""
        return self.cuts[self.rank]

    def load(self, connection: Connection) -> Callable[[], None]:
        """Load the part, as `ProcessJob.load` says."""
        from tgi_asgi.runner.cuda_follower import Follower  # which imports this module

        return Follower(self, connection).run

    def join(self, device: torch.device) -> CudaShard:
        """Meet the others."""
        group = DeviceGroup(
            self.device_class.backend, self.store, rank=self.rank, count=len(self.cuts), device=device
        )
        return CudaShard(group, [cut.words for cut in self.cuts])


@dataclass(frozen=True, slots=True)
class Cache:
    """Make the cache of so many blocks, then the graphs."""

    num_blocks: int


@dataclass(frozen=True, slots=True)
class Copies:
    """Copy blocks (from, to)."""

    pairs: Sequence[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Logits:
    """Compute the logits of these tokens of the last step; None: of those that the step says."""

    rows: Sequence[int] | None


# Behind a `StepShape`, which means a step, come its inputs as bytes. None: end.
Message = Cache | Copies | Logits | StepShape | None


def check_cuts(cuts: Sequence[ModelCut]) -> None:
    """Refuse parts that the CUDA kernels do not multiply.

    Raises:
        ModelLoadError: there is one.
    """
    sizes = sorted({len(cut.inner) for cut in cuts if len(cut.inner) % _MULTIPLE})
    if sizes:
        raise ModelLoadError(
            f"--num-shard {len(cuts)}: a shard would have {sizes[0]} columns of the MLP, and the GPU kernels "
            f"take multiples of {_MULTIPLE}: change it"
        )


class CudaShards:
    """The other processes, and the group of all devices.

    shards = CudaShards(files, settings, cuts, type(device), limits, types)   # they begin to load
    shards.wait_ready()
    runner = CudaRunner(model, ..., shards=shards)
    """

    def __init__(
        self, files: ModelFiles, settings: Settings, cuts: Sequence[ModelCut], device_class: type[Device],
        limits: StepLimits, types: CudaTypes,
    ) -> None:  # fmt: skip
        self._folder = Path(tempfile.mkdtemp(prefix="tgi-shards-"))
        self._job, *others = (
            CudaShardJob(
                files, settings, cuts, rank, device_class, limits, types, self._folder / "store"
            )
            for rank in range(len(cuts))
        )  # fmt: skip
        self._shard: CudaShard | None = None
        self._lost: str | None = None
        self._others = ShardProcesses(others, self._give_up)
        self.processes = self._others.processes
        self.wait_ready, self.watch = self._others.wait_ready, self._others.watch

    def join(self, device: torch.device) -> CudaShard:
        """Meet the others, which have loaded their parts."""
        self._shard = self._job.join(device)
        return self._shard

    def least(self, value: int) -> int:
        """Return the smallest of all ranks' values, which they give now."""
        assert self._shard is not None, "they have not met"
        return self._shard.group.least(value)

    @contextlib.contextmanager
    def together(self, message: Message, data: Tensor | None = None) -> Iterator[None]:
        """Have the others do something; what is called inside is the same of rank 0's device.

        Raises:
            DeviceLost: they cannot be told, or rank 0 has failed within: no rank knows where the others are.
        """
        try:
            for connection in self._others.connections:
                connection.send(message)
                if data is not None:
                    connection.send_bytes(data.numpy().data)
            yield
        except Exception as error:
            raise DeviceLost(self._lost or f"the shards of the model have parted: {error}") from error

    def check(self) -> None:
        """Hold that what the device has computed means something.

        Raises:
            DeviceLost: a process has ended, and nothing was waited for.
        """
        if self._lost is not None:
            raise DeviceLost(self._lost)

    def close(self) -> None:
        """Let the others end, once no step runs and no graph is left, and wait for them. Idempotent."""
        if not self._others.begin_to_close():
            return
        if self._lost is None:
            with contextlib.suppress(DeviceLost), self.together(None):
                pass
            self._leave()  # as the others do now: NCCL's groups end together
            self._others.end()
        else:  # the others wait for the one that has ended
            self._others.kill()
            self._leave()

    def abandon(self) -> None:
        """End the others at once: this process will not serve."""
        self._others.begin_to_close()
        self._others.kill()
        self._leave()

    def _leave(self) -> None:
        if self._shard is not None:
            self._shard.group.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _give_up(self, reason: str) -> None:
        self._lost = reason
        if self._shard is not None:
            self._shard.group.abort()
