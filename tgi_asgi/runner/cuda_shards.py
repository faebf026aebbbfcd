"""The shards of a model on several GPUs: shard 0's side, which tells the other shards what to launch.

```text
 shard 0   plan ─► inputs ─► pipe: shape, inputs ─────┐   all shards make the same calls in the same order:
 shard 1   (cuda_follower.py)  up, launch  ◄──────────┤   collectives synchronise the devices, and no host
 shard 2   ...                             ◄──────────┘   waits for another
```

The other shards know no plan and no sampler. Shard 0's device sends them a step's token ids within the step,
because some are the last samples of slots, which only that device has.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from tgi_asgi.errors import check
from tgi_asgi.formats.sources import ModelFiles
from tgi_asgi.models.shard import ModelCut
from tgi_asgi.ops.cuda_shards import CudaShard
from tgi_asgi.runner.cuda_device import Device
from tgi_asgi.runner.cuda_follower import CudaShardJob, Message
from tgi_asgi.runner.cuda_steps import CudaStepSpec
from tgi_asgi.runner.plan import DeviceLost
from tgi_asgi.runner.shard_adapters import OtherAdapters
from tgi_asgi.runner.shard_processes import ShardProcesses
from tgi_asgi.settings import Settings

_MULTIPLE = 8  # divides the column counts of the CUDA kernels' products


def check_cuts(cuts: Sequence[ModelCut]) -> None:
    """Refuse parts that the CUDA kernels cannot multiply.

    Raises:
        ModelLoadError: if there is one.
    """
    for cut in cuts:
        for part, what in ((cut.inner, "MLP"), (cut.of_expert, "experts"), (cut.of_shared, "shared expert")):
            check(
                len(part) % _MULTIPLE == 0,
                f"--num-shard {len(cuts)}: a shard would have {len(part)} columns of the {what}, but the GPU "
                f"kernels need a multiple of {_MULTIPLE}: change --num-shard",
            )


class CudaShards:
    """The other shards, and the group of all devices.

        shards = CudaShards(files, settings, cuts, type(device), spec)   # they begin to load
        shards.others.wait_ready()
        runner = CudaRunner(model, ..., shards=shards)

    Attributes:
        others: The processes of the other shards.
        adapters: What tells them of adapters, if any are served.
    """

    def __init__(
        self, files: ModelFiles, settings: Settings, cuts: Sequence[ModelCut], device_class: type[Device],
        spec: CudaStepSpec,
    ) -> None:  # fmt: skip
        self._folder = Path(tempfile.mkdtemp(prefix="tgi-shards-"))
        self.adapters = OtherAdapters(len(cuts) - 1) if settings.serves_adapters else None
        pipes = [None] * len(cuts) if self.adapters is None else [None, *self.adapters.descriptors]
        self._job, *others = (
            CudaShardJob(files, settings, cuts, rank, device_class, spec, self._folder / "store", pipe)
            for rank, pipe in enumerate(pipes)
        )
        self._shard: CudaShard | None = None
        self._lost: str | None = None
        self.others = ShardProcesses(others, self._give_up)

    def join(self, device: torch.device) -> CudaShard:
        """Join the other shards, which have loaded their parts."""
        self._shard = self._job.join(device)
        return self._shard

    def minimum(self, value: int) -> int:
        """Return the minimum of all shards' values; every shard must call this now."""
        assert self._shard is not None, "`join` comes first"
        return self._shard.group.all_reduce_min(value)

    @contextlib.contextmanager
    def together(self, message: Message, data: Tensor | None = None) -> Iterator[None]:
        """Send the other shards a message; the body must make the same calls on shard 0's device.

        Raises:
            DeviceLost: if a shard cannot be reached, or the body failed; the shards' states are then unknown.
        """
        try:
            for connection in self.others.connections:
                connection.send(message)
                if data is not None:
                    connection.send_bytes(data.numpy().data)
            yield
        except Exception as error:
            raise DeviceLost(self._lost or f"the shards of the model have parted: {error}") from error

    def broadcast(self, value: Tensor) -> None:
        """Give the other shards a tensor, for which they wait after the message that tells them of it."""
        assert self._shard is not None, "`join` comes first"
        self._shard.group.broadcast(value)

    def check(self) -> None:
        """Check that the device's last results are valid.

        Raises:
            DeviceLost: if a shard has ended, so that the device did not wait for it.
        """
        if self._lost is not None:
            raise DeviceLost(self._lost)

    def close(self) -> None:
        """Let the other shards end, once no step runs and no graph is left; wait for them. Idempotent."""
        if not self.others.begin_to_close():
            return
        if self._lost is None:
            with contextlib.suppress(DeviceLost), self.together(None):
                pass
            self._leave()  # at the same time as the others, because NCCL groups end together
            self.others.end()
        else:  # the others wait for the shard that ended
            self.others.kill()
            self._leave()

    def abandon(self) -> None:
        """End the other shards at once; this process will not serve."""
        self.others.begin_to_close()
        self.others.kill()
        self._leave()

    def _leave(self) -> None:
        if self._shard is not None:
            self._shard.group.close()
        if self.adapters is not None:
            self.adapters.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _give_up(self, reason: str) -> None:
        self._lost = reason
        if self._shard is not None:
            self._shard.group.abort()
