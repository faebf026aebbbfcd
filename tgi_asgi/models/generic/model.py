"""A model of `transformers` as the runner uses it: its configuration, its weights, and its programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from tgi_asgi import ops
from tgi_asgi.model_info import EncoderDecoder
from tgi_asgi.models.config import CacheShape
from tgi_asgi.models.config_bounds import MAX_CONTEXT
from tgi_asgi.models.generic.adaptable import attach
from tgi_asgi.models.generic.attention import PagedLayers
from tgi_asgi.models.generic.delta_nets import DeltaNets, NativeStates
from tgi_asgi.models.generic.discover import AttentionLayer
from tgi_asgi.models.generic.encoder_decoder import EncoderDecoderProgram
from tgi_asgi.models.generic.invariance import all_products_are_native, applies_sines
from tgi_asgi.models.generic.program import GenericProgram, SequentialProgram
from tgi_asgi.models.generic.recurrent import RecurrentLayers
from tgi_asgi.models.generic.replace import Replaced
from tgi_asgi.models.generic.vision.encodings import EncodingCache
from tgi_asgi.models.generic.vision.program import SequentialVisionProgram, VisionProgram
from tgi_asgi.models.generic.vision.text import VisionTraits
from tgi_asgi.models.generic.vision.tower import Tower

_FEW = 8  # slots, and kept states, of programs that serve no clients


@dataclass(frozen=True, slots=True)
class GenericConfig:
    """The facts about a `transformers` model that the server needs."""

    architecture: str
    vocab_size: int
    hidden_size: int
    vocabulary_sizes: tuple[int, ...]  # numbers of elements of embeddings and heads
    context_length: int
    layers: tuple[AttentionLayer, ...]
    has_states: bool  # a sequence has state other than keys and values
    first_position: int = 0  # position of a sequence's first token
    # Why each sequence has a cache of the model's own, and runs alone (of encoder-decoders, only its prompt
    # does); empty: neither holds.
    sequential_reason: str = ""
    own_numbers: int = 0  # that each token adds to a sequence's own cache
    vision: VisionTraits | None = None  # for models that accept images
    is_dynamic: bool = False  # rotary tables are computed for the context served
    other_state_bytes: int = 0  # bytes of a running sequence's states
    other_kept_bytes: int = 0  # bytes of a state kept for other sequences; 0: states cannot be kept
    encoder_decoder: EncoderDecoder | None = None  # what sets an encoder-decoder apart; None: it is not one

    @property
    def other_bytes_per_token(self) -> int:
        """Approximate bytes per token in a cache of the model's own: float32, for two states."""
        return 2 * 4 * self.own_numbers

    @property
    def states(self) -> tuple[ops.StateShape, ...]:
        """Empty: the program keeps sequence states itself, not in a native `StatePool`."""
        return ()

    @property
    def longest_context(self) -> int:
        """Longest context that may be served: any, if the model has positions for any, or computes them."""
        pair = self.encoder_decoder
        is_free = self.is_dynamic or (pair is not None and pair.max_prompt is None)
        return MAX_CONTEXT if is_free else self.context_length

    @property
    def generates(self) -> bool:
        return True

    @property
    def num_labels(self) -> int:
        return 0

    @property
    def rotary_dims(self) -> tuple[int, ...]:
        """Empty: `OpenGeneric.table_bytes` counts the memory of rotary tables."""
        return ()

    @property
    def caches(self) -> tuple[CacheShape, ...]:
        """The KV cache shape of each layer, in the order of calls."""
        return tuple(
            CacheShape(layer.num_kv_heads, layer.head_dim, layer.value_dim, layer.rule.longest)
            for layer in self.layers
        )


class GenericModel:
    """A module with its weights.

    Attributes:
        config: The model's configuration.
        backend: The device that computes it.
        tower: The vision tower that encodes images, if the model accepts any.
        is_batch_invariant: Whether a token has the same bits whatever else is in the batch. torch's products
            may round differently with the number of rows, torch's sines with an element's position, and
            recurrent scans and cross-attention to images with the way a prompt is split.
        is_batched: Whether the answers of an encoder-decoder are computed together.
        delta_nets: All recurrent layers, if they run on native kernels.
        keeps_states: Whether sequences can resume from kept states. Not if tokens that continue from a state
            run one at a time: keeping one would cost as much as it saves.
    """

    kind: ClassVar[Literal["generic"]] = "generic"

    def __init__(
        self, module: Any, config: GenericConfig, replaced: Replaced, recurrent: RecurrentLayers | None,
    ) -> None:  # fmt: skip
        self.module, self.config, self.replaced, self.recurrent = module, config, replaced, recurrent
        self.backend = replaced.mode.backend
        self.is_batched = True
        self.keeps_states = config.other_kept_bytes > 0
        self.delta_nets: DeltaNets | None = None
        self.tower = None if config.vision is None else Tower(module, replaced.mode)
        self.is_batch_invariant = (
            self.backend.has_row_kernels
            and not config.has_states
            and not (config.vision is not None and config.vision.has_cross_attention)
            and all_products_are_native(module)
            and not applies_sines(module)
        )

    def program(
        self, caches: Sequence[Any], max_context: int, image_cache: int = 0,
        adapters: ops.AdapterLayout | None = None, *, num_slots: int = _FEW, num_kept: int = _FEW,
    ) -> GenericProgram | SequentialProgram | EncoderDecoderProgram:  # fmt: skip
        """Return a program that runs steps over these caches, one for each of the configuration's.

        Args:
            image_cache: Maximum bytes of encoded images to keep.
            adapters: Adapters that rows may use.
            num_slots: Number of slots.
            num_kept: Number of places for kept states.
        """
        if adapters is not None:
            attach(self.module, adapters)
        if self.config.encoder_decoder is not None:
            return EncoderDecoderProgram(
                self.module, self.replaced.head, self.config.encoder_decoder.starts,
                vocab_size=self.config.vocab_size, is_batched=self.is_batched, backend=self.backend,
            )  # fmt: skip
        images = None if self.tower is None else EncodingCache(self.tower, image_cache)
        if self.config.sequential_reason and images is not None and self.config.vision is not None:
            return SequentialVisionProgram(
                self.module, self.replaced.head, self.config.vision, images,
                vocab_size=self.config.vocab_size, device=self.backend.device,
            )  # fmt: skip
        if self.config.sequential_reason:
            return SequentialProgram(
                self.module, self.replaced.head, vocab_size=self.config.vocab_size, device=self.backend.device
            )
        layers = PagedLayers(self.config.layers, caches, max_context, self.backend)
        native_states = None
        if self.delta_nets is not None:
            native_states = NativeStates(self.delta_nets, num_slots=num_slots, num_kept=num_kept)
        if images is not None and self.config.vision is not None:
            return VisionProgram(
                self.module, self.replaced.head, layers, self.recurrent, self.config.vision, images,
                vocab_size=self.config.vocab_size, mode=self.replaced.mode, native_states=native_states,
            )  # fmt: skip
        return GenericProgram(
            self.module, self.replaced.head, layers, self.recurrent, vocab_size=self.config.vocab_size,
            first_position=self.config.first_position, mode=self.replaced.mode, native_states=native_states,
        )  # fmt: skip
