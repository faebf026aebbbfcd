"""Lets a native family compute the text of a vision model, of which the module then only reads images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, TypeAlias

from tgi_asgi.errors import ModelLoadError, check
from tgi_asgi.models.loading.modules import GenericModule
from tgi_asgi.models.loading.native import Images, Native
from tgi_asgi.models.loading.options import OpenOptions
from tgi_asgi.models.loading.vision import VisionText

if TYPE_CHECKING:  # it imports torch
    from tgi_asgi.models.generic.vision.native_text import NativeText

# Opens a vision model's text as its native family reads it; None if none does. Raises ModelLoadError.
OpenText: TypeAlias = "Callable[[NativeText], VisionText | None]"


def with_native_text(
    whole: GenericModule, open_text: OpenText, options: OpenOptions
) -> Native | GenericModule:
    """Return the model with its text computed natively; or as it is, if no family computes that."""
    text, expected = whole.module.native_text(), whole.module.config
    if text is None:
        return whole
    try:
        found = open_text(text)
        if found is None:
            return whole
        config = text.with_images(options.stretched(found.config))
        check(config.vocab_size == expected.vocab_size, "its head has other tokens than its embedding")
    except ModelLoadError as error:
        return replace(whole, why=str(error))
    return Native(
        found.family,
        replace(config, architecture=expected.architecture),
        found.weights,
        fallback=lambda reason: replace(whole, why=reason),
        images=Images(whole, text, found.weights),
    )
