"""A client's request for vectors, independent of the API.

A dialect makes a `PoolCall` from a body, and `pooled.py` runs it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tgi_asgi.api.parse import refuse_field
from tgi_asgi.errors import ModelNotSupported, TooManyPrompts
from tgi_asgi.model_info import Classification, Embedding, ModelInfo, Scoring
from tgi_asgi.settings import Settings
from tgi_asgi.types import Pooling

if TYPE_CHECKING:
    from tgi_asgi.types import Vector

MAX_INPUTS = 2048  # per call: OpenAI's limit


@dataclass(frozen=True, slots=True)
class Pair:
    """Two texts that are scored together."""

    query: str
    document: str
    instruction: str | None = None


@dataclass(frozen=True, slots=True)
class Input:
    """The content for one vector, and its path in the body: `input[3]`."""

    content: str | list[int] | Pair
    where: str

    @property
    def num_characters(self) -> int:
        """Length of its text, or of both of a pair's; 0 for token ids."""
        content = self.content
        if isinstance(content, Pair):
            return len(content.query) + len(content.document)
        return len(content) if isinstance(content, str) else 0

    @property
    def size(self) -> int:
        """The number of its characters or token ids."""
        return len(self.content) if isinstance(self.content, list) else self.num_characters


@dataclass(frozen=True, slots=True)
class Truncation:
    """How many tokens to keep of an input that is too long; None: as many as fit."""

    keep: int | None = None
    from_left: bool = False


@dataclass(slots=True)
class Pooled:
    """The vectors of a call's inputs, in order."""

    model: str
    vectors: list[Vector]
    num_tokens: int


@dataclass(slots=True, kw_only=True)
class PoolCall:
    """One request of a client for vectors.

    Attributes:
        answer: Returns the body of the answer; called in a thread if that is slow.
        truncation: How to truncate inputs that are too long; None: refuse them.
    """

    inputs: Sequence[Input]
    how: Embedding | Scoring | Classification
    answer: Callable[[Pooled], bytes]
    model: str | None = None
    truncation: Truncation | None = None
    adds_special_tokens: bool = True
    priority: int = 0
    cache_salt: str | None = None

    @property
    def pooling(self) -> Pooling:
        return self.how.pooling


def embedding_of(info: ModelInfo) -> Embedding:
    """Return how the served model embeds.

    Raises:
        ModelNotSupported: if it does not.
    """
    if info.embedding is None:
        why = info.why_no_pooling
        if info.classification is not None:
            why = "it classifies texts"
        elif info.scoring is not None:
            why = "it scores pairs of texts"
        raise ModelNotSupported(f"The model does not embed: {why}", param="model")
    return info.embedding


def scoring_of(info: ModelInfo) -> Scoring | Embedding:
    """Return how the served model scores pairs: as a scoring model, or by the cosine of embeddings.

    Raises:
        ModelNotSupported: if it does neither.
    """
    if info.scoring is None and info.embedding is None:
        raise ModelNotSupported(f"The model does not score: {info.why_no_pooling}", param="model")
    return info.scoring or embedding_of(info)


def classification_of(info: ModelInfo) -> Classification:
    """Return how the served model classifies.

    Raises:
        ModelNotSupported: if it does not.
    """
    if info.classification is None:
        raise ModelNotSupported(
            f"The model does not classify: {info.architecture} has no labels", param="model"
        )
    return info.classification


def max_inputs(settings: Settings) -> int:
    """Return how many inputs a call may have."""
    return settings.max_client_batch_size or MAX_INPUTS


def check_num_inputs(num_inputs: int, name: str, settings: Settings) -> None:
    """Refuse a call without inputs or with too many."""
    if not num_inputs:
        refuse_field(name, "must not be empty")
    limit = max_inputs(settings)
    if num_inputs > limit:
        message = f"`{name}` takes at most {limit} inputs, got {num_inputs}"
        raise TooManyPrompts(message, param=name)
