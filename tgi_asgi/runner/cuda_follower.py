"""A shard on a GPU other than shard 0: loads its part and makes the launches that shard 0 requests.

What it must know is a `CudaShardJob`; what shard 0 sends it, step by step, are `Message`s.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from tgi_asgi.formats.sources import ModelFiles
from tgi_asgi.models.adapters import AdapterLoader
from tgi_asgi.models.decoder import Decoder
from tgi_asgi.models.loading.open import OpenModel
from tgi_asgi.models.shard import ModelCut
from tgi_asgi.ops.arrays import Floats
from tgi_asgi.ops.cuda_adapters import CudaAdapter, CudaAdapterLayout
from tgi_asgi.ops.cuda_batch import CudaImageRows
from tgi_asgi.ops.cuda_quant import Repacking
from tgi_asgi.ops.cuda_shards import CudaShard, DeviceGroup
from tgi_asgi.runner.cuda_adapters import make_adapter_layout
from tgi_asgi.runner.cuda_buffers import StepShape
from tgi_asgi.runner.cuda_device import Device, Event, must_fit, register_kernels
from tgi_asgi.runner.cuda_steps import CudaSteps, CudaStepSpec
from tgi_asgi.runner.kv import kv_scales_of
from tgi_asgi.runner.plan import MAX_IN_FLIGHT
from tgi_asgi.runner.shard_adapters import follow_adapters
from tgi_asgi.settings import Settings

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CudaShardJob:
    """What a shard needs to know to compute its part, as chosen by shard 0."""

    files: ModelFiles
    settings: Settings
    cuts: Sequence[ModelCut]  # of all shards, by rank
    rank: int
    device_class: type[Device]
    spec: CudaStepSpec  # without the scales from the files
    store: Path  # as in `DeviceGroup`
    adapter_pipe: int | None = None  # a descriptor, as `follow_adapters` takes it; None: no adapters

    @property
    def descriptors(self) -> Sequence[int]:
        """The descriptor of the pipe."""
        return () if self.adapter_pipe is None else (self.adapter_pipe,)

    @property
    def cut(self) -> ModelCut:
        """This shard's part of the model."""
        return self.cuts[self.rank]

    def load(self, connection: Connection) -> Callable[[], None]:
        """Load the part, as described in `ShardJob.load`."""
        return Follower(self, connection).run

    def join(self, device: torch.device) -> CudaShard:
        """Join the group of all shards."""
        group = DeviceGroup(
            self.device_class.backend, self.store, rank=self.rank, count=len(self.cuts), device=device
        )
        return CudaShard(group, [cut.vocab_ids for cut in self.cuts])


@dataclass(frozen=True, slots=True)
class Cache:
    """Create a cache of `num_blocks` blocks, then the graphs."""

    num_blocks: int


@dataclass(frozen=True, slots=True)
class Copies:
    """Copy blocks (from, to)."""

    pairs: Sequence[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Logits:
    """Compute the logits of these tokens of the last step; None: of the step's own rows."""

    rows: Sequence[int] | None


@dataclass(frozen=True, slots=True)
class AdapterCopy:
    """Copy an adapter to a slot of the device."""

    slot: int
    adapter: int  # its number


@dataclass(frozen=True, slots=True)
class StepImages:
    """The next step has rows of images, which shard 0 broadcasts now, and rows of its own rotary table."""

    tokens: npt.NDArray[np.int64]  # [n], those of the step that have rows
    shape: tuple[int, ...]  # of the rows, [levels, n, hidden]
    cosines: Floats | None
    sines: Floats | None


# A `StepShape` means a step; its inputs follow as bytes. None: end.
Message = Cache | Copies | Logits | AdapterCopy | StepImages | StepShape | None


class Follower:
    """Loads its part on construction; `run` computes until shard 0 stops it.

    Raises:
        ModelLoadError: if a tensor is missing or does not fit.
    """

    def __init__(self, job: CudaShardJob, connection: Connection) -> None:
        settings = job.settings
        register_kernels()
        self._job, self._connection = job, connection
        self._device = device = job.device_class(job.rank)
        device.limit_memory(job.settings.cuda_memory_fraction)
        device.enter_thread()
        with (
            must_fit(),
            OpenModel(job.files, model_impl=settings.model_impl, rope=settings.given_rope) as opened,
        ):
            opened.use_cut(job.cut)
            arithmetic = Repacking(job.spec.modes.dtype, device.device)
            model = opened.load(arithmetic, job.spec.limits.max_context)
            assert isinstance(model, Decoder)  # only native families are cut
            self._model = model
            self._spec = job.spec.with_kv_scales(kv_scales_of(opened, settings))
        self._layout: CudaAdapterLayout | None = None
        self._adapters: dict[int, CudaAdapter] = {}  # by number
        if job.adapter_pipe is not None:
            self._layout = make_adapter_layout(model, settings, device, job.spec.modes.dtype)
            follow_adapters(job.adapter_pipe, AdapterLoader(self._layout), self._keep, self._drop)

    def run(self) -> None:
        """Do what shard 0 does, until it sends the end."""
        job, device, connection = self._job, self._device, self._connection
        shard = job.join(device.device)
        steps = CudaSteps(self._model, device, self._spec, shard=shard, adapters=self._layout)
        del self._model  # the program holds all of it
        steps.profile()
        shard.group.all_reduce_min(device.free_bytes())
        staging = [device.pinned(self._spec.largest.num_bytes) for _ in range(MAX_IN_FLIGHT)]
        taken: list[Event] = [device.event() for _ in staging]
        num_steps, images = 0, None
        while (message := connection.recv()) is not None:
            match message:
                case StepShape():
                    at = num_steps % MAX_IN_FLIGHT
                    num_steps += 1
                    taken[at].synchronize()  # the step before the last has read its inputs
                    connection.recv_bytes_into(staging[at].numpy())
                    upload = steps.upload(message, staging[at])
                    device.submit([upload, taken[at], steps.graphs_of(message, images).forward])
                    images = None
                case StepImages():
                    images = _receive(message, steps, shard)
                case Logits():
                    steps.head(message.rows)
                case Copies():
                    steps.copy_blocks(message.pairs)
                case AdapterCopy():
                    self._copy(message)
                case Cache():
                    steps.make_cache(message.num_blocks)
                    steps.capture()
        steps.release()
        shard.group.close()

    def _keep(self, adapter: CudaAdapter) -> None:
        self._adapters[adapter.number] = adapter

    def _drop(self, number: int) -> None:
        self._adapters.pop(number, None)

    def _copy(self, message: AdapterCopy) -> None:
        # If the step was refused after this message, shard 0 may have dropped the adapter already.
        adapter = self._adapters.get(message.adapter)
        if adapter is None or self._layout is None:
            logger.debug("adapter %d is not copied: it has been dropped", message.adapter)
            return
        self._layout.copy(message.slot, adapter)


def _receive(message: StepImages, steps: CudaSteps, shard: CudaShard) -> CudaImageRows | None:
    """Write the step's angles, and return its rows of images, if it has any."""
    program = steps.program
    if message.cosines is not None and message.sines is not None and program.own_angles is not None:
        program.own_angles.write(message.cosines, message.sines)
    if not len(message.tokens):
        return None
    rows = torch.empty(message.shape, dtype=torch.float32, device=program.device)
    shard.group.broadcast(rows)
    return CudaImageRows(torch.from_numpy(message.tokens).to(program.device), rows)
