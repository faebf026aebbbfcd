"""The device that a model computes on: the steps of loading that differ between CPU and GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from tgi_asgi import ops
from tgi_asgi.models.adapters import AdapterLoader
from tgi_asgi.models.loading.open import ServedModel
from tgi_asgi.models.loading.watched import Watch
from tgi_asgi.models.pooling import PoolingFiles
from tgi_asgi.runner.kv import KvSize
from tgi_asgi.runner.runner import HostRunner
from tgi_asgi.runner.shard_adapters import SplitAdapterLoader
from tgi_asgi.runner.shards import Shards
from tgi_asgi.settings import Settings

if TYPE_CHECKING:  # these import torch
    from tgi_asgi.runner.cuda import CudaRunner
    from tgi_asgi.runner.cuda_shards import CudaShards
    from tgi_asgi.runner.encoder import EncoderRunner

Runner: TypeAlias = "HostRunner | CudaRunner | EncoderRunner"


@dataclass(frozen=True, slots=True)
class Placed:
    """A model ready to compute, with its cache.

    Attributes:
        bits: What decides output bits besides the model's files and the cache.
        prompt_precision: The arithmetic of prompts, if they have one of their own.
    """

    runner: Runner
    cache: KvSize
    bits: str
    prompt_precision: str | None = None
    adapters: AdapterLoader[Any] | SplitAdapterLoader | None = None  # if adapters are served


class Placement(Protocol):
    """A model between the opening of its files and its first step.

    It is constructed before any weight is read; the constructor refuses what the device cannot serve. Then
    `load` and `place` are called, once each.
    """

    @property
    def device(self) -> str:
        """The device: cpu or cuda."""

    @property
    def dtype(self) -> str:
        """The type that products compute in, by its name."""

    @property
    def max_context(self) -> int:
        """Maximum number of tokens in a sequence."""

    @property
    def settings(self) -> Settings:
        """The given settings, with the batch size reduced to what memory allows."""

    @property
    def kernels(self) -> ops.KernelSet | None:
        """The CPU's kernel set; None on a GPU."""

    @property
    def shards(self) -> Shards | CudaShards | None:
        """The other shards, if the model is split."""

    def load(self, watch: Watch) -> ServedModel:
        """Load the model, and wait until the other shards have loaded theirs.

        Args:
            watch: Follows the reading of the weights.

        Raises:
            ModelLoadError: if a tensor is missing or does not fit, or memory does not suffice.
        """

    def place(self, model: ServedModel, pooling: PoolingFiles) -> Placed:
        """Create the model's cache and runner; `pooling` is how its files say that it pools.

        Raises:
            ModelLoadError: if memory does not suffice.
        """

    def is_batch_invariant(self, model: ServedModel) -> bool:
        """Return whether a sequence's output bits are independent of what else runs."""

    def abandon(self) -> None:
        """End the other shards at once; this process will not serve."""
