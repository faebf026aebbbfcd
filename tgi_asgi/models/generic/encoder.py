"""Models of `transformers` that give vectors and no text: opened without weights, loaded, run with no cache.

Encoders first of all (BERT, XLM-R, ModernBERT), their classifiers, and decoders that are no family of ours
and have no head. Prompts come whole. Where a model's attention can be ours, all of a step are computed side
by side; else one after the other, by the model's own code.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch import nn

from tgi_asgi import ops
from tgi_asgi.errors import ModelLoadError
from tgi_asgi.models.config import MAX_CONTEXT, CacheShape, StateShape
from tgi_asgi.models.generic import attention, encoder_check
from tgi_asgi.models.generic.build import build
from tgi_asgi.models.generic.discover import configurations
from tgi_asgi.models.generic.encoder_program import EncoderProgram
from tgi_asgi.models.generic.model import context_length
from tgi_asgi.models.generic.replace import Replaced, all_products_are_ours, packed_names, takes_sines
from tgi_asgi.models.generic.rope import fix_rotary_tables, table_bytes, tabulate
from tgi_asgi.models.generic.weights import Filler
from tgi_asgi.models.generic.whole import WholeLayer, WholeLayers, discover_whole
from tgi_asgi.models.loading import NamedWeights, Weights

_CLASSIFIER = "ForSequenceClassification"
_HEADS = ("ForMaskedLM", "ForPreTraining")  # which give tokens: states are what comes before
_MOST_SCORES = 1 << 28  # of one layer's [heads, tokens, tokens], where a model's own code attends: 1 GiB
_POSITIONS = ("create_position_ids_from_input_ids", "create_position_ids_from_inputs_embeds")


@dataclass(frozen=True, slots=True)
class EncoderConfig:
    """What the server must know of a model that gives vectors."""

    architecture: str
    vocab_size: int
    hidden_size: int
    context_length: int
    num_labels: int  # of a classifier; 0: it is none
    num_token_types: int  # below 2: the second text of a pair is not marked; 0: the model takes none
    first_position: int  # of a prompt's first token
    layers: tuple[WholeLayer, ...]
    floor_reason: str = ""  # why prompts run one by one; empty: they do not

    @property
    def longest_context(self) -> int:
        return self.context_length

    @property
    def generates(self) -> bool:
        return False

    @property
    def caches(self) -> tuple[CacheShape, ...]:
        """None: nothing of a prompt is kept."""
        return ()

    @property
    def other_bytes_per_token(self) -> int:
        return 0

    @property
    def states(self) -> tuple[StateShape, ...]:
        """None: nothing of a prompt is kept."""
        return ()

    @property
    def other_state_bytes(self) -> int:
        return 0

    @property
    def rotary_dims(self) -> tuple[int, ...]:
        """None: `OpenEncoder.table_bytes` counts what is kept of them."""
        return ()

    @property
    def has_states(self) -> bool:
        return True


def gives_vectors(architecture: str) -> bool:
    """Tell whether an architecture is of a model without a head that gives the tokens of a text."""
    is_head = architecture.endswith(("LMHeadModel", "HeadsModel"))
    return architecture.endswith(("Model", _CLASSIFIER, *_HEADS)) and not is_head


class OpenEncoder:
    """A checkpoint directory's model, built without weights.

    Raises:
        ModelLoadError: it is none that gives vectors; nothing of the weights has been read.
    """

    def __init__(self, directory: Path, config: Mapping[str, Any], *, trusts_code: bool) -> None:
        self.architecture = str(config["architectures"][0])
        self._model = _built(directory, config, self.architecture, trusts_code=trusts_code)
        try:
            self.config = self._describe()
        except ModelLoadError:
            raise
        except Exception as error:  # a model of something other than text
            raise ModelLoadError(f"{self.architecture} does not make vectors of tokens: {error!r}") from error

    def _describe(self) -> EncoderConfig:
        model, base = self._model, self._model.base_model
        text = model.config.get_text_config()
        if getattr(model.config, "is_encoder_decoder", False) and not self.architecture.endswith(
            "EncoderModel"
        ):
            raise ModelLoadError(f"{self.architecture} is an encoder-decoder: it is not served")
        if hasattr(base, "set_attention_type"):  # BigBird: for good, by the first text that is short
            raise ModelLoadError(
                f"{self.architecture} attends in another way to short texts: it is not served"
            )
        rows, columns = base.get_input_embeddings().weight.shape
        first = _first_position(base)
        context = min(context_length(text) - first, MAX_CONTEXT)
        is_classifier = self.architecture.endswith(_CLASSIFIER)
        layers: list[WholeLayer] = []
        reason = ""
        try:
            layers = discover_whole(base, context)
            if is_classifier and isinstance(getattr(base, "pooler", None), nn.Linear):
                raise ModelLoadError(f"{self.architecture} pools within its own code")
        except ModelLoadError as error:
            layers, reason = [], str(error)
            num_heads = int(getattr(text, "num_attention_heads", 0)) or 16
            context = min(context, math.isqrt(_MOST_SCORES // num_heads))
        has_types = "token_type_ids" in inspect.signature(base.forward).parameters
        return EncoderConfig(
            architecture=self.architecture,
            vocab_size=int(rows),
            hidden_size=int(getattr(text, "hidden_size", columns)),
            context_length=context,
            num_labels=int(model.config.num_labels) if is_classifier else 0,
            num_token_types=int(getattr(text, "type_vocab_size", 0) or 0) if has_types else 0,
            first_position=first,
            layers=tuple(layers),
            floor_reason=reason,
        )

    def held(self, weights: Weights) -> list[tuple[str, int]]:
        """Return formats and elements of what the module will hold, as `OpenGeneric.held` says."""
        filler = Filler(
            self._model, cast(NamedWeights, weights), lambda name, value: False, is_unused=self._is_unused
        )
        return filler.held(packed_names(self._model))

    def table_bytes(self, max_positions: int) -> int:
        """Return about what rotary tables will take."""
        return table_bytes(self._model, max_positions)

    def load(self, weights: Weights, arithmetic: ops.Arithmetic, max_positions: int) -> EncoderModel:
        """Fill the module with its weights, packed; check that it computes what its own code does.

        Raises:
            ModelLoadError: a tensor is missing, does not fit or is not known, or the check fails.
        """
        model = self._model
        made: list[Replaced] = []
        filler = Filler(
            model, cast(NamedWeights, weights), lambda name, value: made[0].place(name, value),
            is_unused=self._is_unused,
        )  # fmt: skip
        made.append(Replaced(model, arithmetic))
        filler.fill()
        made[0].finish_norms()
        fix_rotary_tables(model, max_positions)
        tabulate(model, max_positions)
        attention.register()
        for config in configurations(model):
            config._experts_implementation_internal = attention.NAME
            if not self.config.floor_reason:
                config._attn_implementation_internal = attention.NAME
        loaded = EncoderModel(model, self.config, made[0])
        encoder_check.check(loaded)
        return loaded

    def _is_unused(self, name: str) -> bool:
        """Tell whether a tensor is of a head or a pooler, which vectors are not made of.

        What the model needs and does not get is refused elsewhere: so this may be wide.
        """
        model, base = self._model, self._model.base_model
        prefix, _, rest = name.partition(".")
        if prefix == model.base_model_prefix and rest:
            return rest.partition(".")[0] not in _parts(base)
        return prefix not in _parts(model) and prefix not in _parts(base)


class EncoderModel:
    """A module with its weights.

    Attributes:
        config: what it is.
        is_batch_invariant: a vector has the same bits whatever runs beside it. Not so where torch multiplies
            rows of several prompts, or takes their sines: a number's place then matters.
    """

    def __init__(self, module: Any, config: EncoderConfig, replaced: Replaced) -> None:
        self.module, self.config, self.replaced = module, config, replaced
        base = module.base_model
        self.is_batch_invariant = bool(config.floor_reason) or (
            all_products_are_ours(base) and not takes_sines(base)
        )

    def program(self, *, max_tokens: int, max_rows: int, max_context: int) -> EncoderProgram:
        """Return what runs steps of so many tokens and prompts at most."""
        layers = None
        if not self.config.floor_reason:
            layers = WholeLayers(
                self.config.layers, max_tokens=max_tokens, max_rows=max_rows, max_context=max_context
            )
        return EncoderProgram(
            self.module, layers, first_position=self.config.first_position,
            num_token_types=self.config.num_token_types, is_classifier=self.config.num_labels > 0,
        )  # fmt: skip


def _built(directory: Path, config: Mapping[str, Any], name: str, *, trusts_code: bool) -> Any:
    """Return the module that makes the vectors: without a head that gives tokens, and its pooler."""
    for head in _HEADS:
        name = name.removesuffix(head) + "Model" if name.endswith(head) else name
    model = build(directory, {**config, "architectures": [name]}, trusts_code=trusts_code)
    if "add_pooling_layer" in inspect.signature(type(model).__init__).parameters:
        model.pooler = None  # which vectors are not made of; many checkpoints lack it
    return model


def _first_position(model: nn.Module) -> int:
    """Return the position of a prompt's first token: RoBERTa and its kin begin behind the padding's id."""
    for module in model.modules():
        if any(hasattr(module, name) for name in _POSITIONS):
            return int(module.padding_idx) + 1  # type: ignore[arg-type]
    return 0


def _parts(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_children()} | {
        name for name, _ in module.named_parameters("", False)
    }
