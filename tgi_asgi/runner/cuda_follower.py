"""A shard on a GPU other than shard 0: loads its part and makes the launches that shard 0 requests."""

from __future__ import annotations

from dataclasses import replace
from multiprocessing.connection import Connection

from tgi_asgi import ops
from tgi_asgi.models.decoder import Decoder
from tgi_asgi.models.loading.open import OpenModel
from tgi_asgi.runner import cuda_load
from tgi_asgi.runner.cuda_buffers import StepShape
from tgi_asgi.runner.cuda_device import Event
from tgi_asgi.runner.cuda_shards import Cache, Copies, CudaShardJob, Logits
from tgi_asgi.runner.cuda_steps import CudaSteps
from tgi_asgi.runner.handoff import MAX_IN_FLIGHT


class Follower:
    """Loads its part on construction; `run` computes until shard 0 stops it.

    Raises:
        ModelLoadError: if a tensor is missing or does not fit.
    """

    def __init__(self, job: CudaShardJob, connection: Connection) -> None:
        settings = job.settings
        cuda_load.register_kernels()
        self._job, self._connection = job, connection
        self._device = device = job.device_class(job.rank)
        device.enter_thread()
        with (
            cuda_load.must_fit(),
            OpenModel(job.files, model_impl=settings.model_impl, rope=settings.given_rope) as opened,
        ):
            opened.use_cut(job.cut)
            arithmetic = ops.Repacking(job.types.dtype, device.device)
            model = opened.load(arithmetic, job.limits.max_context)
            assert isinstance(model, Decoder)  # only native families are cut
            self._model = model
            self._types = replace(job.types, kv_scales=cuda_load.kv_scales_of(opened, settings))

    def run(self) -> None:
        """Do what shard 0 does, until it sends the end."""
        job, device, connection = self._job, self._device, self._connection
        shard = job.join(device.device)
        steps = CudaSteps(self._model, device, job.limits, self._types, shard=shard)
        del self._model  # the program holds all of it
        steps.profile()
        shard.group.all_reduce_min(device.free_bytes())
        staging = [device.pinned(job.limits.largest.num_bytes) for _ in range(MAX_IN_FLIGHT)]
        taken: list[Event] = [device.record() for _ in staging]
        num_steps = 0
        while (message := connection.recv()) is not None:
            match message:
                case StepShape():
                    at = num_steps % MAX_IN_FLIGHT
                    num_steps += 1
                    taken[at].synchronize()  # the step before the last has read its inputs
                    connection.recv_bytes_into(staging[at].numpy())
                    buffers = steps.upload(message, staging[at])
                    taken[at] = device.record()
                    steps.graphs_of(buffers).forward()
                case Logits():
                    steps.head(message.rows)
                case Copies():
                    steps.copy_blocks(message.pairs)
                case Cache():
                    steps.make_cache(message.num_blocks)
                    steps.capture()
        steps.release()
        shard.group.close()
