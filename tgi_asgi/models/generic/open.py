"""Opens a model of `transformers` without weights, finds out whether it can be served, and loads it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from tgi_asgi import ops
from tgi_asgi.errors import ModelLoadError, check
from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.decoder import Decoder
from tgi_asgi.models.family import Model
from tgi_asgi.models.generation_config import read_generation_config
from tgi_asgi.models.generic import attention, encoder_decoder, encoder_decoder_check
from tgi_asgi.models.generic import check as self_check
from tgi_asgi.models.generic.build import build
from tgi_asgi.models.generic.common import CommonDecoder
from tgi_asgi.models.generic.delta_nets import DeltaNets, are_delta_nets
from tgi_asgi.models.generic.discover import AttentionLayer, configurations, discover
from tgi_asgi.models.generic.guards import check_cache_uses, check_servable
from tgi_asgi.models.generic.inline_attention import adapt_attention
from tgi_asgi.models.generic.inline_experts import adapt_experts
from tgi_asgi.models.generic.model import GenericConfig, GenericModel
from tgi_asgi.models.generic.module_caches import state_bytes
from tgi_asgi.models.generic.modules import Mode
from tgi_asgi.models.generic.own_cache import WholeText, cache_name, own_cache, own_sizes
from tgi_asgi.models.generic.positions import context_length, first_position
from tgi_asgi.models.generic.recurrent import (
    RecurrentLayers,
    can_fork,
    clamp_single_steps,
    keep_states_in_caches,
    recurrent_modules,
)
from tgi_asgi.models.generic.replace import Replaced, packed_names, vocabulary_sizes
from tgi_asgi.models.generic.rope import (
    fix_rotary_tables,
    is_dynamic,
    table_bytes,
    tabulate,
)
from tgi_asgi.models.generic.states import KEPT
from tgi_asgi.models.generic.vision import cross_attention
from tgi_asgi.models.generic.vision.check import check_images, check_processor, is_tested
from tgi_asgi.models.generic.vision.cross_attention import CrossFeatures
from tgi_asgi.models.generic.vision.native import NativeImages
from tgi_asgi.models.generic.vision.native_text import NativeText, find_text, strip
from tgi_asgi.models.generic.vision.processor import (
    GivenProcessor,
    VisionProcessor,
    load_processor,
)
from tgi_asgi.models.generic.vision.text import TextView, complete_outputs, vision_traits
from tgi_asgi.models.generic.vision.tower import Tower, input_names
from tgi_asgi.models.generic.weights import Filler, file_names
from tgi_asgi.models.loading import NamedWeights
from tgi_asgi.settings import GivenRope
from tgi_asgi.types import ImageProcessor

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Kept:
    """What a model keeps of a sequence; see the fields of `GenericConfig`.

    Attributes:
        shared_bytes: Bytes of a state kept for other sequences.
    """

    layers: Sequence[AttentionLayer] = ()
    sequential_reason: str = ""
    own_numbers: int = 0
    state_bytes: int = 0
    shared_bytes: int = 0


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
        adapt_attention(self._model)
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
        embedding: Any = getattr(self._model.get_input_embeddings(), "weight", None)
        check(embedding is not None, f"{type(self._model).__name__} reads no tokens: its encoder embeds none")
        hidden_size = int(embedding.shape[1])
        if pair is None:
            context, num_ids = context_length(text) - first, self._num_ids(text)
            estimate = 2 * int(getattr(text, "num_hidden_layers", 0) or 1) * hidden_size
            kept = self._kept(context, estimate)
        else:
            context, num_ids = encoder_decoder.context_length(pair), encoder_decoder.num_written(self._model)
            numbers = 2 * encoder_decoder.cache_columns(self._model)
            kept = _Kept(sequential_reason="it is an encoder-decoder", own_numbers=numbers)
        self.config = GenericConfig(
            architecture=type(self._model).__name__,
            vocab_size=num_ids,
            hidden_size=hidden_size,
            vocabulary_sizes=vocabulary_sizes(self._model),
            context_length=context,
            layers=tuple(kept.layers),
            has_states=bool(self._recurrent) or bool(kept.sequential_reason),
            first_position=first,
            sequential_reason=kept.sequential_reason,
            own_numbers=kept.own_numbers,
            vision=self._vision,
            is_dynamic=is_dynamic(self._model),
            other_state_bytes=kept.state_bytes,
            other_kept_bytes=kept.shared_bytes,
            encoder_decoder=pair,
        )

    def _num_ids(self, text: Any) -> int:
        """Return the number of token ids: that of logits, or if images' ids have none, of embeddings."""
        num_logits = _num_logits(text)
        if self._vision is None or self._vision.image_token_id < num_logits:
            return num_logits
        return int(self._model.get_input_embeddings().weight.shape[0])

    def _kept(self, context: int, estimate: int) -> _Kept:
        """Return what a decoder keeps of a sequence.

        Args:
            estimate: Numbers that each token adds to a cache of the model's own, if they cannot be counted.
        """
        layers, reason = self._discover(context)
        if reason:
            state_size, numbers = own_sizes(self._model) or (0, estimate)
            return _Kept(sequential_reason=reason, own_numbers=numbers, state_bytes=state_size)
        if not self._recurrent:
            return _Kept(layers)
        each = state_bytes(self._model, cache_name(self._model))
        shared = each if can_fork(self._recurrent) else 0
        return _Kept(layers, state_bytes=KEPT * each, shared_bytes=shared)

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
        loaded = GenericModel(model, self.config, replaced, recurrent)
        if recurrent is not None and loaded.backend.has_row_kernels and are_delta_nets(self._recurrent):
            loaded.delta_nets = DeltaNets(self._recurrent)
        if self.config.encoder_decoder is None:
            self_check.check(loaded)
        else:
            encoder_decoder_check.check(loaded)
        if self._processor is not None:
            check_images(loaded, self._processor)
        return loaded

    def native_text(self) -> NativeText | None:
        """Return the text model of a vision model if a native family may compute it, else None."""
        name = self.config.architecture
        if self._vision is None or self.config.sequential_reason or not is_tested(name):
            return None
        try:
            return find_text(self._model, self._vision)
        except Exception as error:  # the code of the class may raise anything when it is asked
            logger.debug("%s runs as a module: %s: %s", name, type(error).__name__, error)
            return None

    def file_names(self, names: Iterable[str]) -> dict[str, str]:
        """Return which of these tensors of a checkpoint the module's are, by its names; see `weights`."""
        return file_names(self._model, names)

    def load_images(
        self, weights: NamedWeights, arithmetic: ops.Arithmetic, text: NativeText, model: Decoder
    ) -> NativeImages:
        """Fill the tower alone, for a native family's model of the text.

        Args:
            weights: The tower's.
        """
        strip(self._model, text)
        if isinstance(arithmetic, ops.Packing):  # only the text has prompts
            arithmetic = replace(arithmetic, has_float_prompts=False)
        filler = Filler(self._model, weights)
        replaced = Replaced(self._model, arithmetic)
        filler.fill(replaced.place)
        replaced.finish_rows()
        replaced.mode.backend.take(self._model)
        attention.install(configurations(self._model), attends=False)
        tower = Tower(self._model, replaced.mode)
        return NativeImages(self._model, tower, text, model)

    def _keep_encodings(self, arithmetic: ops.Arithmetic, mode: Mode) -> None:
        """Let keys and values of images be as exact as products, and requests count their memory."""
        features: CrossFeatures = self._model.model.get_image_features
        features.mode = mode
        features.is_exact = isinstance(arithmetic, ops.Packing) and arithmetic.is_exact
        if self._processor is not None:
            self._processor.encoded_bytes = features.num_bytes


def _num_logits(text: Any) -> int:
    """Return the size of the vocabulary; Inkling pads its matrices, but not its logits, beyond it."""
    rows = int(text.vocab_size)
    return min(rows, getattr(text, "unpadded_vocab_size", None) or rows)
