"""What a tiny checkpoint of a vision model family is made of; `vision_table` has one of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

VOCAB_SIZE = 416
_IMAGE = {"image_token": "<image>"}


@dataclass(frozen=True, slots=True)
class Family:
    """A family: values of its configuration and its processors.

    Attributes:
        tokens: Special tokens, keyed by the names that its tokenizer gives them.
        others: Special tokens without such a name.
        before, after: What its chat template writes around an image.
        image_key: Configuration key of the token that image rows replace.
        image_token: Text of that token; None for the token that its chat template writes.
        has_image_last: Whether that token's id is the largest: it has an embedding, but no logit.
    """

    architecture: str
    config: Mapping[str, Any]
    image_processor: str
    preprocessor: Mapping[str, Any]
    processor: Mapping[str, Any] = field(default_factory=dict)
    tokens: Mapping[str, str] = field(default_factory=lambda: dict(_IMAGE))
    others: tuple[str, ...] = ()
    before: str = ""
    after: str = ""
    placeholder: str = "image_token"
    image_key: str = "image_token_id"
    image_token: str | None = None
    has_image_last: bool = False
