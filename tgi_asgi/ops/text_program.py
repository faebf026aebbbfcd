"""What programs have in common whose sequences have no images."""

from __future__ import annotations

from collections.abc import Sequence

from tgi_asgi.types import Bidirectional, ImageInput


class TextProgram:
    """A program of a model that reads text alone; `ImageProgram` overrides all of this."""

    @property
    def bidirectional(self) -> Bidirectional | None:
        """Which parts of a prompt must be in one step; None: the model accepts no images."""
        return None

    @property
    def is_encoding(self) -> bool:
        """Whether an image is partly encoded."""
        return False

    def start(self, slot: int, prompt_ids: Sequence[int], images: Sequence[ImageInput]) -> None:
        """Assign a slot to a sequence with this prompt."""
        return None

    def advance(self, images: Sequence[ImageInput], seconds: float) -> tuple[list[bool], float]:
        """Encode images for about so long; return which need no more of this, and the seconds it took."""
        return [], 0.0
