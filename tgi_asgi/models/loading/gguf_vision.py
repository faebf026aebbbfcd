"""Opens the two GGUF files of a model that accepts images; their tensors have the names of `transformers`."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tgi_asgi import ops
from tgi_asgi.errors import ModelLoadError, check
from tgi_asgi.formats.gguf import GgufFile, GgufTensor
from tgi_asgi.models.gguf_vision.projector import MEANINGFUL, TextFile, TowerPart, VisionModel, find_projector
from tgi_asgi.models.gguf_vision.texts import is_known, read_text, text_module
from tgi_asgi.models.loading.gguf_module import GgufModuleWeights
from tgi_asgi.models.loading.gguf_tensors import (
    GgufTensors,
    held_format,
    join_rotary_halves,
    without_ones,
)
from tgi_asgi.models.loading.weights import WHOLE, NamedWeights, check_shape
from tgi_asgi.models.reader import Reader
from tgi_asgi.ops import WeightSource
from tgi_asgi.text import gguf_vocab

if TYPE_CHECKING:  # it imports torch
    from tgi_asgi.models.generic.vision.processor import GivenProcessor


def open_vision(
    text: GgufFile, path: Path, *, is_certain: bool = True
) -> tuple[VisionModel, GgufVisionWeights]:
    """Open a projector file for a text model; the weights close both files.

    Args:
        is_certain: As for `TextFile`.

    Raises:
        ModelLoadError: if it is damaged, of an unsupported kind, or of another model. It is closed then, and
            the text model's file stays open.
    """
    with contextlib.ExitStack() as failing:
        file = failing.enter_context(GgufFile.open(path))
        projector = find_projector(file)
        name = str(text.metadata.get("general.architecture"))
        check(
            name in projector.texts and is_known(name),
            f"projectors of type {projector.kind!r} are not supported with text models of architecture "
            f"{name[:100]!r}, only with {', '.join(projector.texts)}",
        )
        config = read_text(text, projector.texts[name])
        reader = Reader.of_clip(file.metadata, frozenset(file.tensors))
        reader.ignore("has_vision_encoder", "has_llava_projector", "has_text_encoder", "projector_type")
        model = projector.read(reader, file, TextFile(text, config, is_certain))
        reader.finish(*MEANINGFUL)
        module = text_module(text, config, model.decoder)
        texts = GgufModuleWeights(text, module, config["num_hidden_layers"], config["head_dim"])
        weights = GgufVisionWeights(texts, TowerWeights(file, model.parts))
        failing.pop_all()
    return model, weights


def _format(part: TowerPart, infos: Sequence[GgufTensor]) -> str:
    """Return the format in which a tensor is loaded."""
    found = {held_format(info.type) for info in infos}
    return found.pop() if part.make is None and len(found) == 1 else "F32"


class TowerWeights(GgufTensors):
    """The `NamedWeights` of a projector file."""

    def __init__(self, file: GgufFile, parts: Mapping[str, TowerPart]) -> None:
        super().__init__(file)
        self._parts = parts
        self._infos = {name: [file.tensor(each) for each in part.stored] for name, part in parts.items()}
        self._unread = {name for part in parts.values() for name in part.stored}
        for name, part in parts.items():
            self._check_part(part, self._infos[name])

    def _check_part(self, part: TowerPart, infos: list[GgufTensor]) -> None:
        """Refuse tensors that cannot make up one, before `get`: then, the text model can still be served.

        Raises:
            ModelLoadError: if rows that follow each other are of several widths, or `make` gets more numbers
                than it returns, or fewer.
        """
        for info in infos[1:]:
            check_shape(info.name, info.shape[1:], infos[0].shape[1:])
        if part.make is not None and part.shape is not None and infos:
            found = sum(math.prod(info.shape) for info in infos)
            wanted = math.prod(part.shape)
            check(
                found == wanted,
                f"tensor {infos[0].name!r} must have {wanted // len(infos)} numbers, but has "
                f"{found // len(infos)}",
            )

    def __contains__(self, name: object) -> bool:
        return name in self._parts

    def get(self, name: str, shape: tuple[int, ...], part: slice = WHOLE) -> WeightSource:
        """Return a tensor, as described in `Weights.get`."""
        found = self.shape(name)
        if without_ones(found) != without_ones(shape):
            check_shape(name, found, shape)
        source = self._whole(self._parts[name], self._infos[name], _flat(shape))
        return source if part == WHOLE else source.rows(*part.indices(source.shape[0])[:2])

    def _whole(self, part: TowerPart, infos: list[GgufTensor], shape: tuple[int, ...]) -> WeightSource:
        if part.make is not None:
            values = [ops.decode(self._plain(info)).reshape(info.shape) for info in infos]
            return ops.from_floats(np.ascontiguousarray(part.make(*values)).reshape(shape))
        if part.pair_dim is not None:
            (info,) = infos
            check(
                shape[0] % part.pair_dim == 0,
                f"tensor {info.name!r} must have whole heads of {part.pair_dim} rows",
            )
            data = join_rotary_halves(self._rows(info, 0, 1, 1), shape[0], part.pair_dim)
            return self._source(info, data, shape, 0)
        if len(infos) == 1:
            return self._source(infos[0], self._rows(infos[0], 0, 1, 1), shape, 0)
        found = [self._plain(info) for info in infos]
        if len(shape) == 1:
            return ops.from_floats(np.concatenate([ops.decode(each) for each in found]))
        return ops.stack_rows(found)

    def _plain(self, info: GgufTensor) -> WeightSource:
        return self._source(info, self._rows(info, 0, 1, 1), _flat(info.shape), 0)

    def names(self) -> list[str]:
        """Return the names of all weights, as described in `NamedWeights.names`."""
        return list(self._parts)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a weight after decoding."""
        part, infos = self._parts[name], self._infos[name]
        if part.shape is not None:
            return part.shape
        return (sum(info.shape[0] for info in infos), *infos[0].shape[1:])

    def stored(self) -> dict[str, tuple[str, int]]:
        """Return formats and sizes, as described in `Weights.stored`, by the names of `transformers`."""
        return {
            name: (_format(self._parts[name], infos), math.prod(self.shape(name)))
            for name, infos in self._infos.items()
        }


class GgufVisionWeights:
    """The `NamedWeights` of a text model's file and a projector's, both of which `close` closes."""

    is_gguf = True

    def __init__(self, texts: GgufModuleWeights, tower: TowerWeights) -> None:
        self._texts, self.tower = texts, tower
        self.num_bytes = texts.num_bytes + tower.num_bytes

    def _of(self, name: object) -> GgufModuleWeights | TowerWeights:
        return self.tower if name in self.tower else self._texts

    def __contains__(self, name: object) -> bool:
        return name in self._of(name)

    def get(self, name: str, shape: tuple[int, ...], part: slice = WHOLE) -> WeightSource:
        """Return a tensor, as described in `Weights.get`."""
        return self._of(name).get(name, shape, part)

    def names(self) -> list[str]:
        """Return the names of all weights, as described in `NamedWeights.names`."""
        return [*self._texts.names(), *self.tower.names()]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a weight after decoding."""
        return self._of(name).shape(name)

    def integers(self, name: str, shape: tuple[int, ...]) -> npt.NDArray[np.integer[Any]]:
        """Refuse a table of integers, as llama.cpp's converter writes none."""
        return self._texts.integers(name, shape)

    def parts(self, name: str) -> list[str]:
        """Return the name by which `stored` lists a weight: its own."""
        return [name]

    def unread(self) -> list[str]:
        """Return the names that were not read, as described in `Weights.unread`."""
        return [*self._texts.unread(), *self.tower.unread()]

    def stored(self) -> dict[str, tuple[str, int]]:
        """Return formats and sizes, as described in `Weights.stored`, by the names of `transformers`."""
        return {**self._texts.stored(), **self.tower.stored()}

    def close_tower(self) -> None:
        """Unmap only the projector's file, to go on with the text model alone."""
        self.tower.close()

    def close(self) -> None:
        """Unmap both files."""
        self._texts.close()
        self.tower.close()


def check_fits(weights: NamedWeights, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse files that lack a tensor of a module, or have it with another shape.

    Args:
        shapes: Those of the module's parameters, by name.
    """
    for name, shape in shapes.items():
        if name not in weights:
            raise ModelLoadError(f"the files have no tensor for {name!r}, which the model needs")
        if without_ones(weights.shape(name)) != without_ones(shape):
            check_shape(name, weights.shape(name), shape)


def _flat(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return a shape of one or two sizes for as many numbers."""
    if len(shape) > 2:
        return (math.prod(shape[:-1]), shape[-1])
    return shape or (1,)


def processor_of(vision: VisionModel, metadata: Mapping[str, Any]) -> GivenProcessor:
    """Return what stands for the files of a processor.

    Args:
        metadata: Of the text model's file, which has the vocabulary.
    """
    from tgi_asgi.models.generic.vision.processor import GivenProcessor

    def tokenizer() -> Any:
        from transformers import PreTrainedTokenizerFast

        vocab = gguf_vocab.build(metadata)
        tokens = {**vision.tokens, **vision.needless_tokens}
        return PreTrainedTokenizerFast(
            tokenizer_object=vocab.backend, extra_special_tokens=tokens, **vocab.special_tokens
        )

    return GivenProcessor(vision.preprocessor, vision.processor, tokenizer, vision.chat_text)
