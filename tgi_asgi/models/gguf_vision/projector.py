"""Describes the projector files (`mmproj`) of GGUF models that accept images: tower and projector.

llama.cpp's converter writes them beside the text model. Their metadata and tensors become what a checkpoint
of `transformers` would have: a config.json, settings of the image processor, and tensors by its names.
Source: `tools/mtmd` and `conversion` of llama.cpp.
"""

from __future__ import annotations

import functools
import importlib
import math
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tgi_asgi.errors import ModelLoadError, check
from tgi_asgi.formats.gguf import GgufFile
from tgi_asgi.models import gguf_vision
from tgi_asgi.models.config_bounds import MAX_HEADS, MAX_LAYERS
from tgi_asgi.models.reader import Reader
from tgi_asgi.ops.arrays import Floats

MAX_SIDE = 1 << 12  # pixels of an image
_MAX_PIXELS = 1 << 24  # to which an image is enlarged, whatever its own size
_MAX_PATCHES = 256  # of a side: some towers compute a table for each place in that square
_MAX_WIDTH = 1 << 16
_MAX_HEAD_DIM = 256
_KINDS = ("weight", "bias")
# Keys that change what a tower computes, or how images become its input, in kinds that read them.
MEANINGFUL = (
    "feature_layer", "image_grid_pinpoints", "image_max_pixels", "image_min_pixels", "is_deepstack_layers",
    "mm_patch_merge_type", "n_wa_pattern", "preproc_image_size", "preproc_max_tiles", "preproc_min_tiles",
    "spatial_merge_size", "wa_layer_indexes", "wa_pattern_mode",
)  # fmt: skip
_PATCHES = "v.patch_embd.weight"
_UP, _DOWN = "v.blk.{}.ffn_up", "v.blk.{}.ffn_down"
_SWAPPED = {_UP: _DOWN, _DOWN: _UP}


@dataclass(frozen=True, slots=True)
class TowerPart:
    """What a tensor of the tower is made of.

    Attributes:
        stored: Names of the file's tensors: one, or several whose rows follow each other; none if it is made
            of nothing.
        pair_dim: Size of a head whose rows llama.cpp stores pair by pair, as for rotary embeddings.
        make: Computes the tensor from the decoded values of the file's, instead.
        shape: The tensor's shape then.
    """

    stored: tuple[str, ...]
    pair_dim: int | None = None
    make: Callable[..., Floats] | None = None
    shape: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class TextFile:
    """The text model's file, as readers of projectors see it.

    Attributes:
        config: The decoder's configuration, for `text_config`.
        is_certain: Whether the projector is surely this model's: the administrator named it, or both files
            are named alike.
    """

    file: GgufFile
    config: Mapping[str, Any]
    is_certain: bool = True

    def token_id(self, text: str) -> int:
        """Return the id of a special token.

        Raises:
            ModelLoadError: if the vocabulary has no such token.
        """
        found = self.find_token(text)
        if found is None:
            raise ModelLoadError(
                f"the text model's vocabulary has no token {text!r}, which stands for images"
            )
        return found

    def find_token(self, text: str) -> int | None:
        """Return the id of a token; None if the vocabulary has none, or the model no embedding of it."""
        tokens = self.file.metadata.get("tokenizer.ggml.tokens", ())
        try:
            found = list(tokens).index(text)
        except ValueError:
            return None
        return found if found < self.config["vocab_size"] else None


@dataclass(frozen=True, slots=True)
class VisionModel:
    """A model that accepts images, as `transformers` would have it.

    Attributes:
        config: Its config.json.
        decoder: What the names of the decoder's tensors begin with.
        parts: What each of the tower's tensors is made of, by the names of `transformers`.
        preprocessor: Contents of a preprocessor_config.json.
        processor: Contents of a processor_config.json.
        tokens: Special tokens by the names under which processors look for them.
        needless_tokens: Others that they look for, which the vocabulary may lack.
        chat_text: Text of an image in a chat whose template writes none; empty: the placeholder.
    """

    config: dict[str, Any]
    decoder: str
    parts: dict[str, TowerPart]
    preprocessor: dict[str, Any]
    processor: dict[str, Any]
    tokens: dict[str, str]
    needless_tokens: dict[str, str] = field(default_factory=dict)
    chat_text: str = ""


@dataclass(frozen=True, slots=True)
class Projector:
    """One kind of projector.

        PROJECTORS = (Projector("gemma3", {"gemma3": "gemma3_text"}, read_gemma3),)

    A module of `models/gguf_vision` with such a tuple is all that a kind needs.

    Attributes:
        kind: `clip.projector_type` of the file.
        texts: Types of the text models that it belongs to, by `general.architecture`.
        read: Reads the file; all of the metadata is untrusted.
    """

    kind: str
    texts: Mapping[str, str]
    read: Callable[[Reader, GgufFile, TextFile], VisionModel]


@dataclass(frozen=True, slots=True)
class TowerSizes:
    """What every tower has, checked against the file's tensors.

    Attributes:
        mlp_width: That of layers' MLPs, by the tensors: old files have another number in their metadata.
        is_swapped: Whether the file's names of an MLP's two matrices are swapped, as in old ones.
        side: Number of patches of a side.
        normal: Mean and standard deviation of pixels, for the image processor.
    """

    width: int
    mlp_width: int
    num_layers: int
    num_heads: int
    image_size: int
    patch_size: int
    is_swapped: bool
    side: int
    eps: float
    normal: Mapping[str, list[float]]

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads

    def config(self) -> dict[str, Any]:
        """Return a `vision_config` by the names that most towers have."""
        return {
            "hidden_size": self.width,
            "intermediate_size": self.mlp_width,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "image_size": self.image_size,
            "patch_size": self.patch_size,
        }


def read_sizes(reader: Reader, file: GgufFile) -> TowerSizes:
    """Return the tower's sizes.

    Raises:
        ModelLoadError: if they are absurd, or the file's tensors have others.
    """
    width = reader.positive("hidden_size", _MAX_WIDTH)
    num_heads = reader.positive("num_attention_heads", MAX_HEADS)
    check(
        width % num_heads == 0 and width // num_heads <= _MAX_HEAD_DIM,
        f"{num_heads} heads cannot share a width of {width}, or are too large",
    )
    reader.require(**{
        "attention.head_dim": width // num_heads, "attention.head_count_kv": num_heads,
    })  # fmt: skip
    num_layers = reader.positive("num_hidden_layers", MAX_LAYERS)
    check(
        f"v.blk.{num_layers - 1}.ln1.weight" in reader.tensors,
        f"block_count is {num_layers}, but there are fewer layers",
    )
    image_size = reader.positive("image_size", MAX_SIDE)
    patch_size = reader.positive("patch_size", image_size)
    side = image_size // patch_size
    check(
        side <= _MAX_PATCHES,
        f"an image would have {side} x {side} patches; a side has at most {_MAX_PATCHES}",
    )
    check_stored(file, _PATCHES, (width, 3, patch_size, patch_size))
    normal = {key: _read_channels(reader, key) for key in ("image_mean", "image_std")}
    check(min(normal["image_std"]) > 0, f"image_std must be positive, got {normal['image_std']}")
    eps = reader.number("layer_norm_eps", 1e-6)
    check(0 < eps < 1, f"attention.layer_norm_epsilon must be in (0, 1), got {eps}")
    reader.ignore("use_gelu", "use_silu")  # what is meant follows from the kind, except where it is read
    reader.ignore("intermediate_size")
    up, down = (file.tensor(f"v.blk.0.{name}.weight").shape for name in ("ffn_up", "ffn_down"))
    is_swapped = up[-1] != width and down[-1] == width
    mlp_width = (down if is_swapped else up)[0]
    return TowerSizes(
        width, mlp_width, num_layers, num_heads, image_size, patch_size, is_swapped, side, eps, normal
    )


def _read_channels(reader: Reader, key: str) -> list[float]:
    """Return a number for each colour; files may have more than three, which nothing reads."""
    given = reader.get(key)
    values = given[:3] if isinstance(given, list) else []
    check(
        len(values) == 3 and all(type(each) in (int, float) and math.isfinite(each) for each in values),
        f"{key} must be three numbers, got {str(given)[:100]}",
    )
    return [float(each) for each in values]


def check_stored(file: GgufFile, name: str, shape: Sequence[int]) -> None:
    """Refuse a tensor of another shape, apart from leading sizes of 1."""
    found = file.tensor(name).shape
    check(
        found[-len(shape) :] == tuple(shape) and math.prod(found) == math.prod(shape),
        f"tensor {name!r} has the shape {list(found)}, but the metadata says {list(shape)}",
    )


def check_width(file: GgufFile, name: str, text: TextFile, *, axis: int = 0) -> None:
    """Refuse a projector whose outputs, on this axis of a tensor, are not as wide as embeddings."""
    found, wanted = file.tensor(name).shape[axis], text.config["hidden_size"]
    check(
        found == wanted,
        f"it belongs to another model: it gives rows of {found} numbers, the text model's have {wanted}",
    )


def flat_patches(stored: Floats) -> Floats:
    """Return a convolution's weights [n, 3, p, p] as those of a product with patches [p, p, 3]."""
    found: Floats = stored.transpose(0, 2, 3, 1)
    return found


def check_enlarged(num_pixels: int, keys: str) -> None:
    """Refuse settings by which any image, however small, becomes one of so many pixels."""
    check(
        num_pixels <= _MAX_PIXELS,
        f"{keys} would enlarge every image to {num_pixels} pixels; at most {_MAX_PIXELS} are allowed",
    )


@dataclass(slots=True)
class TowerNames:
    """Collects the tensors of a tower by the names of `transformers`.

        names = TowerNames(file, sizes)
        names.add({"model.vision.layers.{}.q_proj": "v.blk.{}.attn_q"})
        names.finish()

    In the names that `add` receives, `{}` is a layer's index; weight and bias follow them.
    """

    file: GgufFile
    sizes: TowerSizes
    parts: dict[str, TowerPart] = field(default_factory=dict)
    unused: set[str] = field(default_factory=set)

    def add(self, names: Mapping[str, str], *, pair_dim: int | None = None) -> None:
        """Add tensors that the file has, by the names of the file."""
        for own, given in names.items():
            stored = _SWAPPED.get(given, given) if self.sizes.is_swapped else given
            for index in range(self.sizes.num_layers if "{}" in own else 1):
                for kind in _KINDS:
                    name = f"{stored.format(index)}.{kind}"
                    if name in self.file.tensors:
                        self.parts[f"{own.format(index)}.{kind}"] = TowerPart((name,), pair_dim)

    def add_joined(self, own: str, *stored: str) -> None:
        """Add tensors that the file has in several, whose rows follow each other."""
        for index in range(self.sizes.num_layers):
            for kind in _KINDS:
                names = tuple(f"{each.format(index)}.{kind}" for each in stored)
                if any(name in self.file.tensors for name in names):
                    self.parts[f"{own.format(index)}.{kind}"] = TowerPart(names)

    def add_one(self, own: str, *stored: str, make: Any = None, shape: tuple[int, ...] | None = None) -> None:
        """Add one tensor by its whole names."""
        self.parts[own] = TowerPart(stored, make=make, shape=shape)

    def finish(self) -> dict[str, TowerPart]:
        """Return the parts.

        Raises:
            ModelLoadError: if the file has further tensors, which the model would compute something with.
        """
        known = {name for part in self.parts.values() for name in part.stored} | self.unused
        further = next((name for name in self.file.names if name not in known), None)
        check(further is None, f"it has the tensor {further!r}, which this server does not know for its kind")
        return self.parts


@functools.cache
def all_projectors() -> dict[str, Projector]:
    """Import every module of `models/gguf_vision`, and return what they describe by its kind."""
    names = sorted(module.name for module in pkgutil.iter_modules(gguf_vision.__path__))
    imported = (importlib.import_module(f"{gguf_vision.__name__}.{name}") for name in names)
    return {each.kind: each for module in imported for each in getattr(module, "PROJECTORS", ())}


def find_projector(file: GgufFile) -> Projector:
    """Return what describes a projector file.

    Raises:
        ModelLoadError: if it is none, is of an unsupported kind, or is for sound only.
    """
    metadata = file.metadata
    check(metadata.get("general.architecture") == "clip", "it is not the file of a vision tower")
    kind = metadata.get("clip.projector_type", metadata.get("clip.vision.projector_type"))
    if kind is None:
        is_audio = "clip.audio.projector_type" in metadata
        raise ModelLoadError("it is for sound only" if is_audio else "it has no clip.projector_type")
    found = all_projectors().get(str(kind))
    if found is None:
        known = ", ".join(sorted(all_projectors()))
        raise ModelLoadError(f"projectors of type {str(kind)[:100]!r} are not supported, only {known}")
    return found
