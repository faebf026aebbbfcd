"""A checkpoint with an adapter merged into it: what `peft` calls `merge_and_unload`, a piece at a time.

An adapter that is the model itself (`--model-id` names it, as in TGI) is served at the speed of its base, and
may do what adapters beside a base may not: DoRA (Liu et al., arXiv 2402.09353), and whole modules.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tgi_asgi import ops
from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats.peft import PeftAdapter, PeftTarget
from tgi_asgi.formats.safetensors import SafeTensor
from tgi_asgi.formats.weight_files import Checkpoint

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_PIECE = 1 << 22  # numbers of a matrix that are merged at a time, as float32
# Beginnings of modules' names, and of the same modules' tensors in checkpoints of other versions of
# `transformers`. The last ones are of models without their head, as adapters or as checkpoints.
_PREFIXES = (
    ("", ""),
    ("model.language_model.", "language_model.model."),
    ("model.language_model.", "model."),
    ("model.visual.", "visual."),
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("language_model.model.", "model.language_model."),
    ("model.", "model.language_model."),
    ("model.", ""),
    ("transformer.", ""),
    ("", "model."),
    ("", "transformer."),
)


@dataclass(frozen=True, slots=True)
class _Change:
    """What is added to a matrix: `up @ down`, or its transpose where the base stores that."""

    target: PeftTarget
    is_transposed: bool


class MergedCheckpoint(Checkpoint):
    """The tensors of a base model, changed by an adapter when they are read; overrides all of its class."""

    def __init__(self, base: Checkpoint, directory: Path) -> None:
        """Read an adapter's directory.

        Raises:
            ModelLoadError: if it cannot be read, or does not fit the base; the message names the tensor.
        """
        self._base = base
        self._adapter = PeftAdapter(directory, is_merged=True)
        self._whole: dict[str, SafeTensor] = {}  # by name in the base
        self._changes: dict[str, _Change] = {}
        self._vocab_size: int | None = None  # if the adapter's embedding has another number of rows
        try:
            for name, tensor in self._adapter.whole.items():
                self._replace(_name_in(base, name) or name, tensor)
            for target in self._adapter.targets:
                self._change(target)
        except ModelLoadError as error:
            self.close()
            raise ModelLoadError(f"{directory}: {error}") from None

    def _replace(self, name: str, tensor: SafeTensor) -> None:
        """Take a whole tensor of the adapter; embeddings and heads may have more rows than the base's."""
        if tensor.dtype not in _DTYPES:
            raise ModelLoadError(f"tensor {tensor.name!r} is of dtype {tensor.dtype}")
        if name in self._base:
            shape = self._base.tensor(name).shape
            if tensor.shape[1:] != shape[1:] or len(tensor.shape) != len(shape):
                raise ModelLoadError(f"tensor {tensor.name!r} {_shapes(tensor.shape, shape)}")
            if tensor.shape != shape:
                if self._vocab_size not in (None, tensor.shape[0]) or len(shape) != 2:
                    raise ModelLoadError(f"tensor {tensor.name!r} {_shapes(tensor.shape, shape)}")
                self._vocab_size = tensor.shape[0]
        self._whole[name] = tensor

    def _change(self, target: PeftTarget) -> None:
        """Take a LoRA target, in the order of the base's matrix."""
        what = f"tensor {target.down.name!r}"
        name = _name_in(self._base, f"{target.module}.weight")
        if name is None or self._base.tensor(name).dtype not in _DTYPES:
            why = "has no matrix of that name" if name is None else "has codes there"
            raise ModelLoadError(
                f"{what}: the base model {why}, so the adapter cannot be merged into it: serve the base with "
                "--lora-adapters"
            )
        if name in self._whole:
            raise ModelLoadError(f"{what} changes what the adapter replaces as a whole")
        shape, rows, columns = self._base.tensor(name).shape, target.up.shape[0], target.down.shape[1]
        is_transposed = shape != (rows, columns) or (rows == columns and self._adapter.is_transposed)
        if shape != ((columns, rows) if is_transposed else (rows, columns)):
            raise ModelLoadError(f"{what} {_shapes((rows, columns), shape)}: is it of another base?")
        if target.up.shape[1] != target.rank:
            raise ModelLoadError(f"{what} has the rank {target.rank}, its other matrix {target.up.shape[1]}")
        if target.magnitude is not None and (is_transposed or math.prod(target.magnitude.shape) != rows):
            raise ModelLoadError(f"{what}: its magnitudes are not one for each row of the base's matrix")
        self._changes[name] = _Change(target, is_transposed)

    def __iter__(self) -> Iterator[str]:
        return iter({**dict.fromkeys(self._base), **self._whole})

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        return name in self._base or name in self._whole

    @property
    def names(self) -> list[str]:
        """All tensors' names."""
        return list(self)

    def tensor(self, name: str) -> SafeTensor:
        """Return a tensor's dtype and shape; raise `ModelLoadError` if there is none of that name."""
        return self._whole[name] if name in self._whole else self._base.tensor(name)

    def raw(self, name: str, start: int = 0, stop: int | None = None) -> npt.NDArray[np.uint8]:
        """Return a tensor's bytes, or some of them; merged matrices are computed anew at each call."""
        if name in self._whole:
            found: npt.NDArray[np.uint8] = self._adapter.raw(self._whole[name])[start:stop]
            return found
        change = self._changes.get(name)
        if change is None:
            return self._base.raw(name, start, stop)
        info = self._base.tensor(name)
        stop = info.nbytes if stop is None else stop
        row_bytes = info.nbytes // info.shape[0]
        first, last = start // row_bytes, -(-stop // row_bytes)
        merged = self._merged(info, change, first, last)
        return merged[start - first * row_bytes : stop - first * row_bytes]

    def _merged(self, info: SafeTensor, change: _Change, first: int, last: int) -> npt.NDArray[np.uint8]:
        """Return the bytes of some rows of a merged matrix: each row depends on no other."""
        columns, dtype, target = info.shape[1], _DTYPES[info.dtype], change.target
        up, down = self._floats(target.up), self._floats(target.down)
        if change.is_transposed:
            up, down = down.T, up.T
        magnitude = None if target.magnitude is None else self._floats(target.magnitude).reshape(-1, 1)
        merged = torch.empty(last - first, columns, dtype=dtype)
        num_rows = max(_PIECE // columns, 1)
        width = columns * dtype.itemsize
        for at in range(first, last, num_rows):
            end = min(at + num_rows, last)
            source = ops.WeightSource(
                self._base.raw(info.name, at * width, end * width), info.dtype, (end - at, columns)
            )
            rows = ops.plain_tensor(source).float().addmm(up[at:end], down, alpha=target.scale)
            if magnitude is not None:
                rows *= magnitude[at:end] / torch.linalg.vector_norm(rows, dim=1, keepdim=True)
            merged[at - first : end - first] = rows
        return merged.view(torch.uint8).numpy().reshape(-1)

    def _floats(self, tensor: SafeTensor) -> Tensor:
        source = ops.WeightSource(self._adapter.raw(tensor), tensor.dtype, tensor.shape)
        return ops.plain_tensor(source).float()

    def fitted(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the base's configuration, with the size of the vocabulary that the adapter has."""
        text = config.get("text_config")
        if self._vocab_size is None:
            return dict(config)
        if isinstance(text, dict) and "vocab_size" in text:
            return {**config, "text_config": {**text, "vocab_size": self._vocab_size}}
        return {**config, "vocab_size": self._vocab_size}

    def close(self) -> None:
        """Release the mappings."""
        self._base.close()
        self._adapter.close()


def _name_in(base: Checkpoint, name: str) -> str | None:
    """Return the base's name of a tensor, None if it has none."""
    renamed = (new + name.removeprefix(old) for old, new in _PREFIXES if name.startswith(old))
    return next((each for each in renamed if each in base), None)


def _shapes(shape: tuple[int, ...], base: tuple[int, ...]) -> str:
    return f"is for the shape {list(shape)}, the base model's is {list(base)}"
