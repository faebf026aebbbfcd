"""Models of `transformers` that produce vectors, not text: run uncached.

These are mainly encoders (BERT, XLM-R, ModernBERT), their classifiers, and decoders without a head that no
native family covers. Prompts are computed whole. If native attention supports the model, all prompts of a
step are computed in one batch; otherwise the model's own code computes them one after the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from tgi_asgi import ops
from tgi_asgi.models.config import CacheShape
from tgi_asgi.models.generic.encoder_program import EncoderProgram
from tgi_asgi.models.generic.invariance import all_products_are_native, applies_sines
from tgi_asgi.models.generic.replace import Replaced
from tgi_asgi.models.generic.whole import WholeLayer, WholeLayers


@dataclass(frozen=True, slots=True)
class EncoderConfig:
    """The facts about an embedding model that the server needs."""

    architecture: str
    vocab_size: int
    hidden_size: int
    vocabulary_sizes: tuple[int, ...]  # numbers of elements of embeddings
    context_length: int
    num_labels: int  # of a classifier; 0: it is not one
    num_token_types: int  # below 2: a pair's second text is not marked; 0: the model accepts none
    first_position: int  # position of a prompt's first token
    layers: tuple[WholeLayer, ...]
    sequential_reason: str = ""  # why prompts run one by one; empty: they do not

    @property
    def longest_context(self) -> int:
        return self.context_length

    @property
    def generates(self) -> bool:
        return False

    @property
    def caches(self) -> tuple[CacheShape, ...]:
        """Empty: nothing of a prompt is kept."""
        return ()

    @property
    def other_bytes_per_token(self) -> int:
        return 0

    @property
    def states(self) -> tuple[ops.StateShape, ...]:
        """Empty: nothing of a prompt is kept."""
        return ()

    @property
    def other_state_bytes(self) -> int:
        return 0

    @property
    def other_kept_bytes(self) -> int:
        return 0

    @property
    def rotary_dims(self) -> tuple[int, ...]:
        """Empty: `OpenEncoder.table_bytes` counts the memory of rotary tables."""
        return ()

    @property
    def has_states(self) -> bool:
        return True

    @property
    def encoder_decoder(self) -> None:
        return None


class EncoderModel:
    """A module with its weights.

    Attributes:
        config: The model's configuration.
        is_batch_invariant: Whether a vector has the same bits whatever else is in the batch. It does not if
            torch multiplies rows of several prompts, or applies sines to them: rounding then depends on an
            element's position.
    """

    kind: ClassVar[Literal["encoder"]] = "encoder"

    def __init__(self, module: Any, config: EncoderConfig, replaced: Replaced) -> None:
        self.module, self.config, self.replaced = module, config, replaced
        self.backend = replaced.mode.backend
        base = module.base_model
        self.is_batch_invariant = bool(config.sequential_reason) or (
            self.backend.has_row_kernels and all_products_are_native(base) and not applies_sines(base)
        )

    def program(self, *, max_tokens: int, max_rows: int, max_context: int) -> EncoderProgram:
        """Return a program for steps of at most these numbers of tokens and prompts."""
        layers = None
        if not self.config.sequential_reason:
            layers = WholeLayers(
                self.config.layers,
                self.backend,
                max_tokens=max_tokens,
                max_rows=max_rows,
                max_context=max_context,
            )
        return EncoderProgram(
            self.module, layers, device=self.backend.device, first_position=self.config.first_position,
            num_token_types=self.config.num_token_types, is_classifier=self.config.num_labels > 0,
        )  # fmt: skip
