"""Creates step programs and their cache and state pools, for native and generic models on the CPU."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from tgi_asgi import ops
from tgi_asgi.models.adapters import targets_of
from tgi_asgi.models.config import ServedConfig
from tgi_asgi.models.family import Model, record
from tgi_asgi.models.loading.open import ServedModel
from tgi_asgi.ops.arrays import Floats
from tgi_asgi.runner.groups import CacheGroups
from tgi_asgi.runner.kv import EAGER_BYTES, KvSize, refusal
from tgi_asgi.settings import Settings
from tgi_asgi.types import Bidirectional, ImageInput

if TYPE_CHECKING:
    from tgi_asgi.models.generic.backend import Pool
    from tgi_asgi.models.generic.model import GenericModel


class Program(Protocol):
    """Computes steps; the methods are those of `ops.CpuProgram`, and `ImageProgram` for images."""

    @property
    def native(self) -> ops.NativeProgram | None:
        """The program in the extension, if steps can run without Python."""

    @property
    def bidirectional(self) -> Bidirectional | None: ...

    @property
    def is_encoding(self) -> bool: ...

    @property
    def num_steps(self) -> int: ...

    def start(self, slot: int, prompt_ids: Sequence[int], images: Sequence[ImageInput]) -> None: ...

    def advance(self, images: Sequence[ImageInput], seconds: float) -> tuple[list[bool], float]: ...

    def roll_back_to(self, num_steps: int) -> None: ...

    def discard_states(self, slot: int, num_tokens: int) -> None: ...

    def run(self, batch: ops.FlatRows, rows: Iterable[int]) -> Floats: ...

    def run_head(self, rows: Sequence[int]) -> Floats: ...

    def hidden(self, start: int, stop: int) -> Floats: ...

    def run_and_sample(
        self,
        batch: ops.FlatRows,
        rows: Sequence[int],
        slots: Sequence[int],
        state: ops.SampleState,
        mask: npt.NDArray[np.int32] | None = None,
        drafts: Sequence[int] = (),
    ) -> ops.SampleResult: ...


def make_pool(
    model: Model | GenericModel, size: KvSize, groups: CacheGroups, *, is_on_gpu: bool = False
) -> Pool | None:
    """Create the KV block pool; None for a model without a KV cache.

    Raises:
        ModelLoadError: if the system does not provide that much address space.
    """
    if not model.config.caches:
        return None
    if model.kind == "generic" and is_on_gpu:
        return model.backend.pool(
            model.config.caches, num_blocks=size.num_blocks, block_size=size.block_size, dtype=size.dtype,
        )  # fmt: skip
    return make_cpu_pool(model.config, size, groups)


def make_cpu_pool(config: ServedConfig, size: KvSize, groups: CacheGroups) -> ops.KvPool:
    """Create a KV block pool in this machine's memory.

    Raises:
        ModelLoadError: if the system does not provide that much address space.
    """
    try:
        pool = ops.KvPool(
            config.caches, groups=groups.of_layers, num_blocks=size.num_blocks, block_size=size.block_size,
            dtype=size.dtype,
        )  # fmt: skip
    except MemoryError:
        raise refusal(size) from None
    pool.supply(EAGER_BYTES)
    return pool


def make_states(
    config: ServedConfig, max_batch_size: int, num_kept: int, num_drafts: int
) -> Sequence[ops.StateLayer]:
    """Allocate the recurrent states of all sequences; empty if the model has none."""
    if not config.states:
        return ()
    pool = ops.StatePool(config.states, num_slots=max_batch_size, num_kept=num_kept, num_drafts=num_drafts)
    return pool.layers


def make_adapter_layout(model: ServedModel, settings: Settings, packing: ops.Packing) -> ops.AdapterLayout:
    """Return the layout of the adapters that rows of a program may have.

    Raises:
        ModelLoadError: if adapters can change nothing in this model.
    """
    return ops.AdapterLayout(targets_of(model), settings.max_lora_rank, is_exact=packing.is_exact)


def make_program(
    model: Model | GenericModel, caches: Sequence[Any], limits: ops.StepLimits, *, image_cache: int = 0,
    num_drafts: int = 0, num_kept_states: int = 0, adapters: ops.AdapterLayout | None = None,
    shard: ops.Shard | None = None,
) -> Program:  # fmt: skip
    """Create the program that runs a model's steps over its layers' caches.

    Args:
        image_cache: Bytes of encoded images to keep.
        num_drafts: Maximum number of drafts per row; each needs a state. `limits` has their rows of logits.
        num_kept_states: Number of kept states, in addition to those of running sequences.
        adapters: Layout of the adapters that rows may have.
        shard: The shard whose part of the model this is, if the model is split.
    """
    if model.kind == "generic":
        return model.program(
            caches, limits.max_context, image_cache, adapters, num_slots=limits.max_sequences,
            num_kept=num_kept_states,
        )  # fmt: skip
    states = make_states(model.config, limits.max_sequences, num_kept_states, num_drafts)
    if model.images is not None:
        return model.images.program(model, caches, states, limits, adapters=adapters, image_cache=image_cache)
    return ops.CpuProgram(record(model, caches, states), limits, adapters=adapters, shard=shard)
