"""What clients send, in our own words: their fields, items, blocks and tools, with short texts and schemas.

Each request is as the real client sent it, in the version named; `agent_server.py` tells how to see more.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="

Item = tuple[str, ...]  # ("text", it), ("thoughts", them), ("call" or "custom", the name, the arguments)


@dataclass(frozen=True)
class Replay:
    """One request.

    Attributes:
        client: its name and version.
        what: what the request shows.
        says: the model's answer, as text.
        items: what the client must read in our answer.
        sees: texts that the prompt must hold, in this order.
        misses: texts that it must not.
    """

    client: str
    what: str
    path: str
    body: dict[str, Any]
    says: str = "Done."
    items: Sequence[Item] = (("text", "Done."),)
    sees: Sequence[str] = ()
    misses: Sequence[str] = ()


def spelt(name: str, **arguments: Any) -> str:
    """Return a call as the model writes it."""
    call = json.dumps({"name": name, "arguments": arguments})
    return f"<tool_call>\n{call}\n</tool_call>"


def obj(**properties: Any) -> dict[str, Any]:
    """Return the schema of an object that must have these properties and no others."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


TEXT = {"type": "string", "description": "a text"}
WHOLE = 9007199254740991  # JavaScript's largest
