"""Reasoning as clients keep it and send it back unread: `encrypted_content`, or the `signature` of a thought.

Many clients send back no other field. The text is only encoded: it is the client's own.
"""

from __future__ import annotations

import base64
import binascii

_PREFIX = "tgi-"  # OpenAI's own begin otherwise; they come with histories that began elsewhere


def sealed(text: str) -> str:
    """Return reasoning in the form that clients do not read."""
    return _PREFIX + base64.urlsafe_b64encode(text.encode()).decode()


def unsealed(content: object) -> str:
    """Return the reasoning in such a form; "" if it is not one of this server's."""
    if not isinstance(content, str) or not content.startswith(_PREFIX):
        return ""
    try:
        return base64.b64decode(content.removeprefix(_PREFIX), b"-_", validate=True).decode()
    except (binascii.Error, ValueError):  # includes UnicodeError
        return ""
