"""A model of `transformers` as the runner uses it: opened without weights, loaded, turned into a program."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from tgi_asgi import ops
from tgi_asgi.errors import ModelLoadError
from tgi_asgi.model_info import EncoderDecoder
from tgi_asgi.models.config import CacheShape, ModelConfig
from tgi_asgi.models.config_bounds import MAX_CONTEXT
from tgi_asgi.models.family import Model
from tgi_asgi.models.generation_config import read_generation_config
from tgi_asgi.models.generic import attention, encoder_decoder, encoder_decoder_check
from tgi_asgi.models.generic import check as self_check
from tgi_asgi.models.generic.adaptable import adaptable, attach
from tgi_asgi.models.generic.attention import PagedLayers
from tgi_asgi.models.generic.build import build
from tgi_asgi.models.generic.classics import adapt
from tgi_asgi.models.generic.common import CommonDecoder
from tgi_asgi.models.generic.delta_nets import DeltaNets, NativeStates, are_delta_nets
from tgi_asgi.models.generic.discover import AttentionLayer, configurations, discover
from tgi_asgi.models.generic.encoder_decoder import EncoderDecoderProgram
from tgi_asgi.models.generic.guards import check_cache_uses, check_servable
from tgi_asgi.models.generic.inline_experts import adapt_experts
from tgi_asgi.models.generic.invariance import all_products_are_native, applies_sines
from tgi_asgi.models.generic.modules import Mode
from tgi_asgi.models.generic.own_cache import WholeText, cache_name, own_cache, own_sizes
from tgi_asgi.models.generic.positions import context_length, first_position
from tgi_asgi.models.generic.program import GenericProgram, SequentialProgram
from tgi_asgi.models.generic.recurrent import (
    RecurrentLayers,
    can_fork,
    clamp_single_steps,
    keep_states_in_caches,
    recurrent_modules,
)
from tgi_asgi.models.generic.replace import Replaced, packed_names
from tgi_asgi.models.generic.rope import (
    fix_rotary_tables,
    is_dynamic,
    table_bytes,
    tabulate,
)
from tgi_asgi.models.generic.states import KEPT, state_bytes
from tgi_asgi.models.generic.vision import cross_attention
from tgi_asgi.models.generic.vision.check import check_images, check_processor
from tgi_asgi.models.generic.vision.cross_attention import CrossFeatures
from tgi_asgi.models.generic.vision.encodings import EncodingCache
from tgi_asgi.models.generic.vision.processor import (
    GivenProcessor,
    VisionProcessor,
    load_processor,
)
from tgi_asgi.models.generic.vision.program import SequentialVisionProgram, VisionProgram
from tgi_asgi.models.generic.vision.text import TextView, VisionTraits, complete_outputs, vision_traits
from tgi_asgi.models.generic.vision.tower import Tower, input_names
from tgi_asgi.models.generic.weights import Filler
from tgi_asgi.models.loading import NamedWeights
from tgi_asgi.settings import GivenRope
from tgi_asgi.types import ImageProcessor

logger = logging.getLogger(__name__)

_FEW = 8  # slots, and kept states, of programs that serve no clients


@dataclass(frozen=True, slots=True)
class GenericConfig:
    """The facts about a `transformers` model that the server needs."""

    architecture: str
    vocab_size: int
    hidden_size: int
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
    encoder_decoder: EncoderDecoder | None = None  # what sets an encoder-decoder apart; None: it is none

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


class OpenGeneric:
    """A model of a checkpoint directory or a GGUF file, built without weights and found to be servable.

    Raises:
        ModelLoadError: if it is not servable. No weights have been read then.
    """

    kind: ClassVar[Literal["generic"]] = "generic"

    def __init__(
        self,
        directory: Path | None,
        config: Mapping[str, Any],
        *,
        trusts_code: bool,
        rope: GivenRope | None = None,
        vocab_size: int | None = None,
    ) -> None:
        self._model = build(directory, config, trusts_code=trusts_code, rope=rope, vocab_size=vocab_size)
        check_servable(self._model)
        adapt(self._model)
        adapt_experts(self._model, is_gguf=directory is None)
        complete_outputs(self._model)
        cross_attention.adapt(self._model)
        keep_states_in_caches(self._model)
        clamp_single_steps(self._model)
        self._vision = vision_traits(self._model)
        self._processor: VisionProcessor | None = None
        self._text: Any = self._model if self._vision is None else TextView(self._model)
        self._recurrent = recurrent_modules(self._model)
        generation = {} if directory is None else read_generation_config(directory)
        pair = encoder_decoder.describe(self._model, config, generation)
        text = self._model.config.get_text_config(**({} if pair is None else {"decoder": True}))
        first = first_position(self._model)
        hidden_size = int(self._model.get_input_embeddings().weight.shape[1])
        state_size = kept_size = 0
        if pair is None:
            context = context_length(text) - first
            layers, reason = self._discover(context)
            numbers = 0
            if reason:
                estimate = 2 * int(getattr(text, "num_hidden_layers", 0) or 1) * hidden_size
                state_size, numbers = own_sizes(self._model) or (0, estimate)
            elif self._recurrent:
                each = state_bytes(self._model, cache_name(self._model))
                state_size, kept_size = KEPT * each, each if can_fork(self._recurrent) else 0
        else:
            context, layers = encoder_decoder.context_length(pair), []
            reason, numbers = "it is an encoder-decoder", 2 * encoder_decoder.cache_columns(self._model)
        self.config = GenericConfig(
            architecture=type(self._model).__name__,
            vocab_size=self._num_ids(text),
            hidden_size=hidden_size,
            context_length=context,
            layers=tuple(layers),
            has_states=bool(self._recurrent) or bool(reason),
            first_position=first,
            sequential_reason=reason,
            own_numbers=numbers,
            vision=self._vision,
            is_dynamic=is_dynamic(self._model),
            other_state_bytes=state_size,
            other_kept_bytes=kept_size,
            encoder_decoder=pair,
        )

    def _num_ids(self, text: Any) -> int:
        """Return the number of token ids: that of logits, or if images' ids have none, of embeddings."""
        num_logits = _num_logits(text)
        if self._vision is None or self._vision.image_token_id < num_logits:
            return num_logits
        return int(self._model.get_input_embeddings().weight.shape[0])

    def _discover(self, context: int) -> tuple[list[AttentionLayer], str]:
        """Return the attention layers; or none, and why sequences must run one by one."""
        try:
            check_cache_uses(self._model)
            return discover(self._text, context), ""
        except ModelLoadError as error:
            is_whole = isinstance(own_cache(self._model), WholeText)
            if self._vision is not None and (is_whole or not self._vision.is_rows_alone):
                raise
            return [], f"{error}{'; each token computes the whole text again' if is_whole else ''}"

    def image_processor(self, source: Path | GivenProcessor) -> ImageProcessor | None:
        """Return the model's image processor; None if it accepts no images.

        Raises:
            ModelLoadError: if the processor cannot be created.
        """
        if self._vision is None:
            return None
        config = self._model.config.to_dict()
        names = input_names(self._model)
        self._processor = load_processor(
            source, config, self._vision.image_token_id, names, needs_gap=self._vision.has_axes,
            is_seen_by_all=self._vision.has_cross_attention,
        )  # fmt: skip
        if self._processor is not None:
            check_processor(self._processor, self.config.architecture)
        return self._processor

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the module's parameters by name, except of those that are tied to others."""
        tied = getattr(self._model, "all_tied_weights_keys", None) or {}
        found = self._model.named_parameters()
        return {name: tuple(each.shape) for name, each in found if name not in tied}

    def packed_tensors(self, weights: NamedWeights) -> list[tuple[str, int]]:
        """Return formats and numbers of elements that the module will hold of these weights.

        Called before they are loaded.

        Raises:
            ModelLoadError: if the module has no place for a tensor.
        """
        filler = Filler(self._model, weights)
        return filler.packed_tensors(packed_names(self._model))

    def table_bytes(self, max_positions: int) -> int:
        """Return the approximate bytes of the rotary tables."""
        return table_bytes(self._text, max_positions)

    def _common(self, max_positions: int) -> CommonDecoder | None:
        if self._recurrent or self.config.sequential_reason or self.config.first_position or self._vision:
            return None
        fix_rotary_tables(self._model, max_positions)
        return CommonDecoder.find(self._model, self.config.layers, max_positions)

    def common_config(self, max_positions: int) -> ModelConfig | None:
        """Return the configuration of a decoder of the common shape, which its code is yet to confirm."""
        common = self._common(max_positions)
        return None if common is None else common.config

    def load(
        self, weights: NamedWeights, arithmetic: ops.Arithmetic, max_positions: int,
        has_kernels: Callable[[ModelConfig], bool] = lambda config: True,
    ) -> GenericModel | Model:  # fmt: skip
        """Fill the module with its packed weights, and check that it computes the same as its own code.

        A decoder of the common shape becomes a native model, if the device `has_kernels` for it.

        Raises:
            ModelLoadError: if a tensor is missing, does not fit or is unknown, or the check fails.
        """
        model = self._model
        common = self._common(max_positions)
        if common is not None and has_kernels(common.config):
            config = common.verified(weights)
            if config is not None:
                return common.load(config, weights, arithmetic)
        filler = Filler(model, weights)
        replaced = Replaced(model, arithmetic)
        filler.fill(replaced.place)
        replaced.finish()
        fix_rotary_tables(model, max_positions)
        tabulate(self._text, max_positions)
        replaced.mode.backend.take(model)
        attention.install(configurations(model), attends=False)  # towers may have experts, too (dots 3)
        attention.install(configurations(self._text), attends=not self.config.sequential_reason)
        if self._vision is not None and self._vision.has_cross_attention:
            self._keep_encodings(arithmetic, replaced.mode)
        recurrent = None
        if self._recurrent and not self.config.sequential_reason:
            recurrent = RecurrentLayers(self._recurrent)
        loaded = GenericModel(model, self.config, replaced, recurrent, max_positions)
        if recurrent is not None and loaded.backend.has_row_kernels and are_delta_nets(self._recurrent):
            loaded.delta_nets = DeltaNets(self._recurrent)
        if self.config.encoder_decoder is None:
            self_check.check(loaded)
        else:
            encoder_decoder_check.check(loaded)
        if self._processor is not None:
            check_images(loaded, self._processor)
        return loaded

    def _keep_encodings(self, arithmetic: ops.Arithmetic, mode: Mode) -> None:
        """Let keys and values of images be as exact as products, and requests count their memory."""
        features: CrossFeatures = self._model.model.get_image_features
        features.mode = mode
        features.is_exact = isinstance(arithmetic, ops.Packing) and arithmetic.is_exact
        if self._processor is not None:
            self._processor.encoded_bytes = features.num_bytes


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
        max_positions: int,
    ) -> None:  # fmt: skip
        self.module, self.config, self.replaced, self.recurrent = module, config, replaced, recurrent
        self._max_positions = max_positions
        self.backend = replaced.mode.backend
        self.is_batched = True
        self.keeps_states = config.other_kept_bytes > 0
        self.delta_nets: DeltaNets | None = None
        self.tower = None if config.vision is None else Tower(module, self.backend)
        self.is_batch_invariant = (
            self.backend.has_row_kernels
            and not config.has_states
            and not (config.vision is not None and config.vision.has_cross_attention)
            and all_products_are_native(module)
            and not applies_sines(module)
        )

    def adapter_targets(self) -> dict[str, ops.Target]:
        """Return the products that adapters may change, by path; runs a few tokens to find them."""
        return adaptable(self.module, lambda count: self_check.step_of(self, count)())

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


def _num_logits(text: Any) -> int:
    """Return the size of the vocabulary; Inkling pads its matrices, but not its logits, beyond it."""
    rows = int(text.vocab_size)
    return min(rows, getattr(text, "unpadded_vocab_size", None) or rows)
