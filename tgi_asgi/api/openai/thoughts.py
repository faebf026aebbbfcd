"""Reasoning in the form of `encrypted_content`, which clients keep and send back unread.

Many clients send back no other field of a reasoning item. The text is only encoded: the client has it anyway.
"""

from __future__ import annotations

import base64
import binascii

_PREFIX = "tgi-"  # OpenAI's own begin otherwise; they come with histories that began elsewhere


def sealed(text: str) -> str:
    """Return reasoning as `encrypted_content`."""
    return _PREFIX + base64.urlsafe_b64encode(text.encode()).decode()


def unsealed(content: object) -> str:
    """Return the reasoning in an `encrypted_content`; "" if it is not one of this server's."""
    if not isinstance(content, str) or not content.startswith(_PREFIX):
        return ""
    try:
        return base64.b64decode(content.removeprefix(_PREFIX), b"-_", validate=True).decode()
    except (binascii.Error, ValueError):  # includes UnicodeError
        return ""
