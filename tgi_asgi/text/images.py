"""Images in prompts: each placeholder in the text is replaced by the model's own tokens for the image.

"<user> <image> what is it?"  ──►  "<user> <image><image><image> what is it?"  ──►  ids, and where in them
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any

from tgi_asgi.errors import InvalidRequest
from tgi_asgi.text.chat.message import ChatMessage
from tgi_asgi.types import ImageInput, ProcessedImage


def expand_placeholders(source: str, placeholder: str, texts: Sequence[str]) -> str:
    """Return a prompt with each placeholder replaced by a text.

    Raises:
        InvalidRequest: if their numbers differ: the template drops images, or a client wrote a placeholder.
    """
    pieces = source.split(placeholder)
    if len(pieces) != len(texts) + 1:
        raise _mismatch(len(pieces) - 1, len(texts))
    return "".join(part for pair in zip(pieces, (*texts, ""), strict=True) for part in pair)


def spell_out_images(
    messages: list[ChatMessage], text: str, *, part_roles: Collection[str]
) -> list[ChatMessage]:
    """Return messages with a text in place of each image, for a template that writes nothing for images.

    Args:
        part_roles: Roles whose content the template takes as a list of parts; that of others becomes lines of
            one text.
    """

    def shown(role: Any, content: Any) -> Any:
        if not isinstance(content, list) or {"type": "image"} not in content:
            return content
        parts = [{"type": "text", "text": text} if part == {"type": "image"} else part for part in content]
        return parts if role in part_roles else "\n".join(str(part["text"]) for part in parts)

    return [
        {**message, "content": shown(message.get("role"), message.get("content"))} for message in messages
    ]


def join_fences(source: str, fence: str, mark: str = "") -> str:
    """Return a prompt with expanded images, in which images side by side share the token between them.

    A space follows that token if a word would, as in the prompts of Idefics 2's processor.

    Args:
        fence: The token around an image; empty: there is none.
        mark: Text before each special token that acts as one; tokens without it are a client's plain text.
    """
    if not fence:
        return source
    one, special = re.escape(mark + fence), re.escape(mark)
    source = source.replace(2 * (mark + fence), mark + fence)
    return re.sub(rf"{one}(?=(?:{special})?+[^\s<])", lambda found: f"{found[0]} ", source)


def locate_images(
    ids: Sequence[int], images: Sequence[tuple[bytes, ProcessedImage]]
) -> tuple[ImageInput, ...]:
    """Return the positions of a prompt's images in its tokens; each image comes with its digest.

    Raises:
        InvalidRequest: if a client wrote tokens that stand for images, or no token where the model needs one.
    """
    kinds = {image.token_id for _, image in images}
    places = [at for at, token_id in enumerate(ids) if token_id in kinds]
    num_wanted = sum(image.num_tokens for _, image in images)
    if len(places) != num_wanted:
        raise _mismatch(len(places), num_wanted)
    found, begin = [], 0
    for digest, image in images:
        if image.needs_gap and begin and places[begin] == places[begin - 1] + 1:
            message = "`{field}` must have text between two images: the model tells them apart by it"
            raise InvalidRequest(message, field=("prompt",))
        first, begin = places[begin], begin + image.num_tokens
        num_tokens = places[begin - 1] - first + 1
        found.append(ImageInput(digest, first, num_tokens, image.payload, image.is_seen_by_all))
    return tuple(found)


def _mismatch(num_places: int, num_wanted: int) -> InvalidRequest:
    message = f"`{{field}}` has room for {num_places} images or parts of them, but there are {num_wanted}"
    return InvalidRequest(message, field=("prompt",))
