"""Where a model computes: what loading asks of a processor or a GPU, each in its turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from tgi_asgi import ops
from tgi_asgi.models.adapters import AdapterLoader
from tgi_asgi.models.loading import Weights
from tgi_asgi.models.loading.open import ServedModel
from tgi_asgi.models.pooling import Dense
from tgi_asgi.runner.cuda import CudaRunner
from tgi_asgi.runner.cuda_shards import CudaShards
from tgi_asgi.runner.encoder import EncoderRunner
from tgi_asgi.runner.kv import KvSize
from tgi_asgi.runner.runner import CpuRunner
from tgi_asgi.runner.shards import Shards
from tgi_asgi.settings import Settings

Runner = CpuRunner | CudaRunner | EncoderRunner


@dataclass(frozen=True, slots=True)
class Placed:
    """A model that computes, with its cache."""

    runner: Runner
    cache: KvSize
    adapters: AdapterLoader | None = None  # where adapters are served


class Placement(Protocol):
    """A model between the opening of its files and its first step.

    Made before any weight is read: what cannot be served there is refused by its constructor. Then `load` and
    `place`, each once.
    """

    @property
    def device(self) -> str:
        """Where that is: cpu or cuda."""

    @property
    def dtype(self) -> torch.dtype:
        """What products compute in."""

    @property
    def arithmetic(self) -> ops.Arithmetic:
        """The layout that weights are packed in."""

    @property
    def longest(self) -> int:
        """Tokens that a sequence may have."""

    @property
    def settings(self) -> Settings:
        """Those given, with as many sequences as have room."""

    @property
    def kernels(self) -> ops.KernelSet | None:
        """The CPU's kernel set; None on a GPU."""

    @property
    def has_float_prompts(self) -> bool:
        """Prompts have an arithmetic of their own; known once the weights are loaded."""

    @property
    def shards(self) -> Shards | CudaShards | None:
        """The other processes, where the model is split."""

    @property
    def bits(self) -> str:
        """What decides the bits of results, beside the model's files and the cache; known likewise."""

    def load(self, weights: Weights) -> ServedModel:
        """Load the model, and wait until the other shards have loaded theirs.

        Raises:
            ModelLoadError: a tensor is missing or does not fit, or memory does not suffice.
        """

    def place(self, model: ServedModel, dense: Sequence[Dense]) -> Placed:
        """Make its cache and what computes its steps; `dense` are the layers behind its pooling.

        Raises:
            ModelLoadError: memory does not suffice.
        """

    def is_batch_invariant(self, model: ServedModel) -> bool:
        """Return whether a sequence's bits are the same whatever runs beside it."""

    def abandon(self) -> None:
        """End the other shards at once: this process will not serve."""
