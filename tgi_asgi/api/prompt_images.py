"""The images of a prompt, as requests send them. `images.py` loads them."""

from __future__ import annotations

from dataclasses import dataclass, field

from tgi_asgi.api.parse import refuse_field
from tgi_asgi.types import ProcessedImage


@dataclass(frozen=True, slots=True)
class ImageSource:
    """An image as a client sends it: a URL, or a base64 file; `param` is the client's name of the field."""

    content: str
    param: str
    is_base64: bool = False


@dataclass(slots=True)
class Images:
    """The images of one prompt, in order. Parsers of message parts add them; `images.py` loads them.

    Exists only if the model accepts images; false if there are none.
    """

    sources: list[ImageSource] = field(default_factory=list)
    loaded: list[tuple[bytes, ProcessedImage]] = field(default_factory=list)  # with their digests

    def __len__(self) -> int:
        return len(self.sources)

    def add(self, content: object, param: str, *, is_base64: bool = False) -> dict[str, str]:
        """Add an image; return its placeholder for a message.

        Raises:
            InvalidRequest: if it is not a string.
        """
        if not isinstance(content, str):
            refuse_field(param, "must be a string")
        self.sources.append(ImageSource(content, param, is_base64))
        return {"type": "image"}
