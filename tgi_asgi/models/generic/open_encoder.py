"""Opens an embedding model of `transformers` without weights, and loads it; see `encoder.py`."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import nn

from tgi_asgi import ops
from tgi_asgi.errors import ModelLoadError
from tgi_asgi.models.config_bounds import MAX_CONTEXT
from tgi_asgi.models.generic import attention, encoder_check
from tgi_asgi.models.generic.build import build
from tgi_asgi.models.generic.discover import configurations
from tgi_asgi.models.generic.encoder import EncoderConfig, EncoderModel
from tgi_asgi.models.generic.positions import context_length, first_position
from tgi_asgi.models.generic.recurrent import recurrent_modules
from tgi_asgi.models.generic.replace import Replaced, packed_names, vocabulary_sizes
from tgi_asgi.models.generic.rope import fix_rotary_tables, table_bytes, tabulate
from tgi_asgi.models.generic.weights import Filler
from tgi_asgi.models.generic.whole import WholeLayer, discover_whole
from tgi_asgi.models.loading import NamedWeights
from tgi_asgi.models.loading.recognise import CLASSIFIER, TOKEN_HEADS

_MAX_SCORES = 1 << 28  # of a layer's [heads, tokens, tokens] if the model's own code attends: 1 GiB


class OpenEncoder:
    """A model of a checkpoint directory or a GGUF file, built without weights.

    Raises:
        ModelLoadError: if it does not produce vectors. No weights have been read then.
    """

    kind: ClassVar[Literal["encoder"]] = "encoder"

    def __init__(self, directory: Path | None, config: Mapping[str, Any], *, trusts_code: bool) -> None:
        self._is_gguf = directory is None
        self.architecture = str(config["architectures"][0])
        self._model = _built(directory, config, self.architecture, trusts_code=trusts_code)
        try:
            self.config = self._describe()
        except ModelLoadError:
            raise
        except Exception as error:  # a model of something other than text
            raise ModelLoadError(
                f"{self.architecture} does not produce vectors of tokens: {error!r}"
            ) from error

    def _describe(self) -> EncoderConfig:
        model, base = self._model, self._model.base_model
        text = model.config.get_text_config()
        if getattr(model.config, "is_encoder_decoder", False) and not self.architecture.endswith(
            "EncoderModel"
        ):
            raise ModelLoadError(f"{self.architecture} is an encoder-decoder, which is not supported")
        if hasattr(base, "set_attention_type"):  # BigBird: its first short text switches it for good
            raise ModelLoadError(
                f"{self.architecture} attends in another way to short texts, which is not supported"
            )
        rows, columns = base.get_input_embeddings().weight.shape
        first = first_position(base)
        context = min(context_length(text) - first, MAX_CONTEXT)
        is_classifier = self.architecture.endswith(CLASSIFIER)
        layers: list[WholeLayer] = []
        reason = ""
        try:
            if recurrent_modules(base):
                raise ModelLoadError(f"{self.architecture} carries a state from token to token")
            layers = discover_whole(base, context)
            if is_classifier and isinstance(getattr(base, "pooler", None), nn.Linear):
                raise ModelLoadError(f"{self.architecture} pools within its own code")
        except ModelLoadError as error:
            layers, reason = [], str(error)
            num_heads = int(getattr(text, "num_attention_heads", 0)) or 16
            context = min(context, math.isqrt(_MAX_SCORES // num_heads))
        has_types = "token_type_ids" in inspect.signature(base.forward).parameters
        return EncoderConfig(
            architecture=self.architecture,
            vocab_size=int(rows),
            hidden_size=_width(base, int(getattr(text, "hidden_size", columns))),
            vocabulary_sizes=vocabulary_sizes(self._model),
            context_length=context,
            num_labels=int(model.config.num_labels) if is_classifier else 0,
            num_token_types=int(getattr(text, "type_vocab_size", 0) or 0) if has_types else 0,
            first_position=first,
            layers=tuple(layers),
            sequential_reason=reason,
        )

    def packed_tensors(self, weights: NamedWeights) -> list[tuple[str, int]]:
        """Return formats and element counts that the module will hold; see `OpenGeneric.packed_tensors`."""
        filler = Filler(self._model, weights, is_unused=self._is_unused)
        return filler.packed_tensors(packed_names(self._model))

    def table_bytes(self, max_positions: int) -> int:
        """Return the approximate bytes of the rotary tables."""
        return table_bytes(self._model, max_positions)

    def load(self, weights: NamedWeights, arithmetic: ops.Arithmetic, max_positions: int) -> EncoderModel:
        """Fill the module with its packed weights, and check that it computes the same as its own code.

        Raises:
            ModelLoadError: if a tensor is missing, does not fit or is unknown, or the check fails.
        """
        model = self._model
        filler = Filler(model, weights, is_unused=self._is_unused)
        replaced = Replaced(model, arithmetic)
        filler.fill(replaced.place)
        replaced.finish_rows()
        fix_rotary_tables(model, max_positions)
        tabulate(model, max_positions)
        replaced.mode.backend.take(model)
        attention.install(configurations(model), attends=not self.config.sequential_reason)
        loaded = EncoderModel(model, self.config, replaced)
        encoder_check.check(loaded)
        return loaded

    def _is_unused(self, name: str) -> bool:
        """Return whether a tensor belongs to a head or a pooler, which vectors do not need.

        This may match too much: a tensor that the model needs and lacks is refused elsewhere. A GGUF file has
        neither, except for what its `GgufModule` names.
        """
        if self._is_gguf:
            return False
        model, base = self._model, self._model.base_model
        prefix, _, rest = name.partition(".")
        if prefix == model.base_model_prefix and rest:
            return rest.partition(".")[0] not in _parts(base)
        return prefix not in _parts(model) and prefix not in _parts(base)


def _built(directory: Path | None, config: Mapping[str, Any], name: str, *, trusts_code: bool) -> Any:
    """Return the module that computes the vectors, without a token head and without its pooler."""
    for head in TOKEN_HEADS:
        name = name.removesuffix(head) + "Model" if name.endswith(head) else name
    model = build(directory, {**config, "architectures": [name]}, trusts_code=trusts_code)
    if "add_pooling_layer" in inspect.signature(type(model).__init__).parameters:
        model.pooler = None  # vectors do not need it, and many checkpoints lack it
    return model


def _width(base: Any, hidden_size: int) -> int:
    """Return the width of a module's states: EmbeddingGemma 2 projects them to another."""
    projection = getattr(getattr(base, "language_model", base), "embedding_projection", None)
    return projection.out_features if isinstance(projection, nn.Linear) else hidden_size


def _parts(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_children()} | {
        name for name, _ in module.named_parameters("", False)
    }
