"""Emulated devices of tensor-parallel shards: each creates one of the class that shard 0 names."""

from __future__ import annotations

import os

import torch.distributed as dist
from torch import Tensor

from tests.cuda.emulated_device import EmulatedDevice
from tests.emulation import bindings
from tgi_asgi.ops.cuda_shards import DeviceGroup


class ShardDevice(EmulatedDevice):
    """The device of one of several shards."""

    def __init__(self, index: int = 0) -> None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        bindings.install()
        super().__init__(index)


class SilentDevice(ShardDevice):
    """Shard 1 adds nothing to sums."""

    def __init__(self, index: int = 0) -> None:
        super().__init__(index)
        if index == 1:
            DeviceGroup.all_reduce = _sum_of_nothing  # type: ignore[assignment,method-assign]


class MissingDevice(ShardDevice):
    """Shard 1 has no device."""

    def __init__(self, index: int = 0) -> None:
        if index == 1:
            raise RuntimeError("there is no GPU 1")
        super().__init__(index)


def _sum_of_nothing(group: DeviceGroup, part: Tensor) -> None:
    dist.all_reduce(part.zero_())
