"""Runs a vision tower in pieces, so that steps of text streams can run in between.

The tower's code is called unchanged. Its parts (embeddings, encoder layers, what follows them) cache their
results for an image, and so do the products of the layer in progress. When the time is up, the call is
aborted; the next call passes through the cached parts at once.

    embed ─ layer ─ layer(q k v ✗                 first call, until the time is up
    known   known   layer(known  attention o ✗    second call

The next layer alone reads most layers' results: once it has ended, their shapes are enough for later calls.
Of 32 layers for an image of 12 megapixels, that is 0.3 GB instead of 10.
"""

from __future__ import annotations

import functools
import inspect
import logging
import threading
import time
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tgi_asgi import ops
from tgi_asgi.models.generic.modules import Mode, PackedModule
from tgi_asgi.models.generic.vision.text import decoder_of
from tgi_asgi.models.generic.vision.tower_attention import TowerAttention
from tgi_asgi.ops.cuda_errors import is_out_of_memory

logger = logging.getLogger(__name__)

NAME = "tgi_tower"
_MIN_QUERIES = 128  # with 4,096 keys, pieces of 64 would cost 40% more per query
# Settings of LLaVA and its kin, and of Mllama.
_LAYERS = ("vision_feature_layer", "intermediate_layers_indices")
_running = threading.local()


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class ImageEncoding:
    """The encoding of an image.

    Attributes:
        rows: [n, hidden], the rows that replace its placeholder tokens.
        deep: For each of the decoder's first layers, [n, hidden] rows to add after it (Qwen3-VL); or before
            each of `VisionTraits.deep_layers` (Granite 4 Vision); or for each layer of cross-attention, keys
            and then values (Mllama).
        num_visible: Number of the first of these keys and values that tokens after the image see: the others
            are of padding.
    """

    rows: Tensor
    deep: tuple[Tensor, ...] = ()
    num_visible: int = 0

    @property
    def num_bytes(self) -> int:
        """Bytes of all rows."""
        return sum(each.numel() * each.element_size() for each in (self.rows, *self.deep))

    @property
    def is_shape(self) -> bool:
        """Whether a part of it has no numbers."""
        return any(each.is_meta for each in (self.rows, *self.deep))


class _TimeIsUp(BaseException):
    """Aborts a call of the tower; a BaseException, so that the tower's code does not catch it."""


class Tower:
    """A model's vision tower, including the projection to the decoder's width.

    tower.begin(inputs)
    while (encoding := tower.resume(seconds)) is None: ...
    """

    def __init__(self, model: Any, mode: Mode) -> None:
        self._mode, self.backend = mode, mode.backend
        self._attentions: dict[ops.KvDtype, TowerAttention] = {}  # of the host, by type of keys
        self._inner = getattr(model, "model", model)
        self._features = _features_of(model)
        self._inputs: Mapping[str, Any] = {}
        self._known: list[Any] = []
        self._parts: list[Any] = []  # finished tiles of the piece in progress
        self._products = _Products()
        self._next = 0
        self._last_of: nn.Module | None = None  # the layers one of which has the last known result
        self._has_shapes = False  # of results that are no longer there
        self._reads_layers = _selects_layers(model)  # the tower's code needs the results of all layers
        self._ends_at: float | None = None
        self._is_inside = False
        decoder = decoder_of(model)
        _take_attention(self._inner, decoder)
        others: list[tuple[Any, nn.Module | None]] = [
            (each, None) for each in getattr(self._features, "pieces", ())
        ]
        modules = pieces(self._inner, {decoder, model.get_output_embeddings()})
        for piece, layers in [*modules, *others]:
            if layers is not None:
                for product in products(piece):
                    product.forward = functools.partial(self._multiply, product.forward)
            piece.forward = functools.partial(self._run, piece.forward, layers)

    def begin(self, inputs: Mapping[str, Any]) -> None:
        """Start an image; discards the results of any other."""
        self.forget()
        self._inputs = {
            name: value.to(self.backend.device) if isinstance(value, Tensor) else value
            for name, value in inputs.items()
        }

    def forget(self) -> None:
        """Discard the current image and its results."""
        self._inputs = {}
        self._forget_results()

    def _forget_results(self) -> None:
        self._known, self._parts, self._last_of, self._has_shapes = [], [], None, False
        self._products.forget()
        for attention in self._attentions.values():
            attention.forget()

    def resume(self, seconds: float | None) -> ImageEncoding | None:
        """Compute pieces, at least one, as long as the next is likely to finish in time (None: no limit).

        Returns None until the encoding is complete.
        """
        self._ends_at = None if seconds is None else time.monotonic() + seconds
        try:
            found = self._call()
            if not (self._has_shapes and found.is_shape):
                return found
        except _TimeIsUp:
            return None
        except Exception as error:
            if not self._has_shapes or is_out_of_memory(error):
                raise
            logger.debug("the tower needs the results of all its layers: %s", error)
        self._reads_layers = True
        self._forget_results()
        return self.resume(seconds)

    def _call(self) -> ImageEncoding:
        self._next = 0
        self._is_inside = True
        _running.tower = self
        try:
            with torch.inference_mode():
                return _encoding(self._features(**self._inputs, return_dict=True))
        finally:
            self._is_inside = False
            _running.tower = None

    def encode(self, inputs: Mapping[str, Any]) -> ImageEncoding:
        """Encode an image at once."""
        self.begin(inputs)
        try:
            encoding = self.resume(None)
        finally:
            self.forget()
        assert encoding is not None
        return encoding

    def attention_of(self, *heads: Any) -> TowerAttention | None:
        """Return what computes the attention of these heads natively; None: torch does.

        The arguments are those of `TowerAttention.takes`.
        """
        if not self.backend.has_row_kernels:
            return None
        dtype: ops.KvDtype = "float32" if self._mode.keeps_floats else "bfloat16"
        attention = self._attentions.setdefault(dtype, TowerAttention(dtype))
        return attention if attention.takes(*heads) else None

    def _run(self, forward: Callable[..., Any], layers: nn.Module | None, *args: Any, **kwargs: Any) -> Any:
        """Replace the `forward` of a piece, which may be one of these layers."""
        if not self._is_inside:
            return forward(*args, **kwargs)
        index, self._next = self._next, self._next + 1
        if index < len(self._known):
            return self._known[index]
        num_tiles = 1 if layers is None else _num_tiles(args, kwargs)
        while len(self._parts) < num_tiles:
            tile = len(self._parts)
            given = (args, kwargs) if num_tiles == 1 else _tile((args, kwargs), tile, num_tiles)
            self._products.begin()
            self._parts.append(forward(*given[0], **given[1]))
            has_products = self._products.end()
            if not has_products and tile + 1 < num_tiles:
                self._stop_if_late(0.0)
        is_next = layers is not None and layers is self._last_of
        if is_next and not self._reads_layers and _is_in(self._known[-1], (*args, *kwargs.values())):
            self._known[-1], self._has_shapes = _shapes(self._known[-1]), True
        self._known.append(_stacked(self._parts))
        self._parts, self._last_of = [], layers
        if not has_products:
            self._stop_if_late(0.0)
        return self._known[-1]

    def _multiply(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Replace the `forward` of a layer's product, or its attention."""
        if not self._is_inside:
            return forward(*args, **kwargs)
        known = self._products.next()
        if known is not None:
            return known
        found = forward(*args, **kwargs)
        self._stop_if_late(self._products.add(found))
        return found

    def _stop_if_late(self, next_s: float) -> None:
        """Abort after a piece if the next one, of about `next_s` seconds, would exceed the time."""
        if self._ends_at is None:
            return
        self.backend.wait()
        if time.monotonic() + next_s > self._ends_at:
            raise _TimeIsUp


class _Products:
    """Results of a layer's products so far, and their durations, which predict those of the next layer."""

    def __init__(self) -> None:
        self._known: list[Any] = []
        self._taken_s: list[float] = []
        self._before_s: list[float] = []  # durations in the last layer, each including what precedes it
        self._next = 0
        self._since = 0.0

    def begin(self) -> None:
        """Begin a layer, or return to it."""
        self._next, self._since = 0, time.monotonic()

    def next(self) -> Any:
        """Return the result of the next product if it is known, else None."""
        index, self._next = self._next, self._next + 1
        if index < len(self._known):
            self._since = time.monotonic()
            return self._known[index]
        return None

    def add(self, found: Any) -> float:
        """Store a result; return how long the next one is likely to take."""
        now = time.monotonic()
        self._known.append(found)
        self._taken_s.append(now - self._since)
        self._since = now
        at = len(self._known)
        return self._before_s[at] if at < len(self._before_s) else 0.0

    def end(self) -> bool:
        """End a layer and discard its results; return whether there were any."""
        had_any = bool(self._known)
        if had_any:
            self._before_s = self._taken_s
        self.forget()
        return had_any

    def forget(self) -> None:
        """Discard the results."""
        self._known, self._taken_s = [], []


def input_names(model: Any) -> frozenset[str]:
    """Return the names of the image processor outputs that a model's tower accepts."""
    found = inspect.signature(getattr(model, "model", model).get_image_features).parameters.values()
    return frozenset(each.name for each in found if each.kind is not each.VAR_KEYWORD)


def pieces(root: nn.Module, others: Container[nn.Module]) -> list[tuple[Any, nn.Module | None]]:
    """Return the parts of a model, except these others, that are called one after the other, finely divided.

    A list of at least two modules is divided into them; a module that contains such a list, into its
    children. Each part comes with the list that it is of, if it is a layer.
    """
    found: list[tuple[Any, nn.Module | None]] = []
    for child in root.children():
        if child in others:
            continue
        if _is_list(child):
            found.extend((each, child) for each in child.children())
        elif any(map(_is_list, child.modules())):
            found.extend(pieces(child, others))
        else:
            found.append((child, None))
    return found


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> Any:
    """Attend natively or with torch's own function, as `transformers` does; a running tower caches results.

    query, key, value: [n, n_heads, n_tokens, head_dim]. Many queries are split into pieces, each with all
    keys.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    function = ALL_ATTENTION_FUNCTIONS["sdpa"]
    tower: Tower | None = getattr(_running, "tower", None)
    if tower is None:
        return function(module, query, key, value, attention_mask, **kwargs)
    num_queries, num_keys = query.shape[2], key.shape[2]
    count = max(tower.backend.attention_size // num_keys, _MIN_QUERIES)
    is_causal = kwargs.get("is_causal")
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    is_causal = is_causal and attention_mask is None  # Mllama's tower has a mask instead of the attribute
    native = None if is_causal else tower.attention_of(query, key, value, attention_mask, kwargs)
    if native is not None:
        scale = kwargs.get("scaling")
        attend = native.over(key, value, query.shape[3] ** -0.5 if scale is None else float(scale))
        return torch.cat([tower._multiply(attend, piece) for piece in query.split(count, dim=2)], dim=1), None
    if is_causal or kwargs.get("position_bias") is not None:  # their masks cover all queries
        count = num_queries
    found = []
    for first in range(0, num_queries, count):
        mask = attention_mask
        if mask is not None and mask.shape[-2] == num_queries:
            mask = mask[..., first : first + count, :]
        part = query[:, :, first : first + count]
        found.append(tower._multiply(function, module, part, key, value, mask, **kwargs)[0])
    return (found[0] if len(found) == 1 else torch.cat(found, dim=1)), None


def _take_attention(root: nn.Module, decoder: nn.Module) -> None:
    """Install this attention in a tower whose code supports torch's own."""
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    inside = set(decoder.modules())
    module: Any
    for module in root.modules():
        is_tower = isinstance(module, PreTrainedModel) and module not in inside
        # What contains the decoder shares its configuration with it.
        if is_tower and decoder not in module.modules() and module._supports_sdpa:
            module.config._attn_implementation_internal = NAME


def products(layer: nn.Module) -> list[Any]:
    """Return the products of a layer."""
    found: list[Any] = []
    for module in layer.modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, (nn.Linear, PackedModule)) and weight is not None and weight.dim() == 2:
            found.append(module)
    return found


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList) and len(module) > 1


def _num_tiles(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """Return the number of independent images [tiles, patches, width] in a layer's arguments."""
    hidden = args[0] if args else kwargs.get("hidden_states", kwargs.get("hidden_state"))  # Llama 4's name
    if not isinstance(hidden, Tensor) or hidden.dim() != 3 or hidden.shape[0] == hidden.shape[1]:
        return 1
    return max(hidden.shape[0], 1)


def _tile(value: Any, tile: int, num_tiles: int) -> Any:
    """Return one tile's part of a layer's arguments."""
    if isinstance(value, tuple):
        return tuple(_tile(each, tile, num_tiles) for each in value)
    if isinstance(value, dict):
        return {name: _tile(each, tile, num_tiles) for name, each in value.items()}
    if isinstance(value, Tensor) and value.dim() > 1 and value.shape[0] == num_tiles:
        return value[tile : tile + 1]
    return value


def _stacked(parts: list[Any]) -> Any:
    if len(parts) == 1:
        return parts[0]
    if isinstance(parts[0], tuple):
        return tuple(_stacked([part[index] for part in parts]) for index in range(len(parts[0])))
    return torch.cat(parts) if isinstance(parts[0], Tensor) else parts[0]


def _is_in(value: Any, arguments: Iterable[Any]) -> bool:
    """Return whether a result, or the first of several, is among a call's arguments."""
    first = value[0] if isinstance(value, tuple) else value
    return any(each is first for each in arguments)


def _shapes(value: Any) -> Any:
    """Return a result without its numbers: what is computed from it fails, or has none either."""
    if isinstance(value, tuple):
        return tuple(map(_shapes, value))
    return torch.empty_like(value, device="meta") if isinstance(value, Tensor) else value


def _selects_layers(model: Any) -> bool:
    """Return whether a configuration names layers whose results are read; it is not the only way to do so."""
    config = getattr(model, "config", None)
    parts = (config, getattr(config, "vision_config", None))
    return any(getattr(part, name, None) is not None for part in parts for name in _LAYERS)


def _features_of(model: Any) -> Callable[..., Any]:
    """Return the function that encodes an image; Llama 4 applies its projector to what its own returns."""
    encode: Callable[..., Any] = getattr(model, "model", model).get_image_features
    if type(model).__name__ != "Llama4ForConditionalGeneration":
        return encode

    def encode_and_project(**inputs: Any) -> Any:
        found = encode(**inputs)
        found.pooler_output = model.multi_modal_projector(found.last_hidden_state)
        return found

    return encode_and_project


def _encoding(found: Any) -> ImageEncoding:
    if isinstance(found, ImageEncoding):
        return found
    if found.pooler_output is None:  # Granite 4 Vision has zeros for an image's tokens, and adds rows later
        deep = tuple(_joined(rows) for _, rows in _deep(found))
        return ImageEncoding(torch.zeros_like(deep[0]), deep)
    return ImageEncoding(_joined(found.pooler_output), tuple(map(_joined, _deep(found))))


def _deep(found: Any) -> Any:
    return getattr(found, "deepstack_features", None) or ()


def _joined(rows: Any) -> Tensor:
    """Return rows [n, hidden] of a tensor with any leading dimensions, or of a list of such tensors."""
    parts = [rows] if isinstance(rows, Tensor) else list(rows)
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in parts]).float().contiguous()
