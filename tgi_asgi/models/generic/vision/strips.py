"""Long, narrow images that an image processor would make huge before it cuts or shrinks them; called by it.

A strip of 1 x 60,000 pixels is a file of some hundred bytes. CLIP's processor enlarges it until its shorter
edge has 336 pixels, and keeps the middle; LLaVA-OneVision's pads it to a square: 20 and 11 GB.
"""

from __future__ import annotations

from typing import Any

# Four times the pixels that an image may have by default.
MAX_PIXELS = 1 << 27


def check_strip(processor: Any, width: int, height: int, *, is_one_of_several: bool) -> None:
    """Refuse an image that an image processor would make larger than `MAX_PIXELS`.

    Args:
        processor: The image processor, of `transformers` or the server's own.
        is_one_of_several: Whether it prepares the image as one of several.

    Raises:
        ValueError: if it would.
    """
    shorter, longer = sorted((width, height))
    edge = _shortest_edge(processor)
    if _pads_first(processor, is_one_of_several=is_one_of_several):
        num_pixels = longer**2
    elif edge is not None:
        num_pixels = edge * (edge * longer // shorter)
    else:
        return
    if num_pixels > max(MAX_PIXELS, width * height):
        raise ValueError("it is too long and narrow")


def _pads_first(processor: Any, *, is_one_of_several: bool) -> bool:
    """Return whether a processor pads an image to a square before it resizes it."""
    if hasattr(processor, "image_grid_pinpoints"):  # LLaVA-NeXT and -OneVision
        return is_one_of_several
    return type(processor).__name__.startswith("LlavaImageProcessor") and bool(processor.do_pad)


def _shortest_edge(processor: Any) -> int | None:
    """Return the size to which a processor enlarges an image's shorter edge, whatever becomes of the longer.

    None if it does not. LLaVA-NeXT and -OneVision bring images to a square of that size.
    """
    size = getattr(processor, "size", None)
    is_free = not hasattr(processor, "image_grid_pinpoints") and getattr(size, "longest_edge", None) is None
    edge = getattr(size, "shortest_edge", None)
    return edge if is_free and getattr(processor, "do_resize", False) else None
