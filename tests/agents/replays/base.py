"""Requests of real clients, reworded: their fields, items, blocks and tools, with short texts and schemas.

Each request has the form that the named version of the client sent; `agent_server.py` describes how to record
more.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="

Item = tuple[str, ...]  # ("text", text), ("thoughts", text), ("call" or "custom", name, arguments)


@dataclass(frozen=True)
class Replay:
    """One request.

    Attributes:
        client: the client's name and version.
        what: what the request shows.
        says: the model's answer, as text.
        items: what the client must read in the server's answer.
        sees: texts that the prompt must contain, in this order.
        misses: texts that the prompt must not contain.
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
    """Return a tool call as the model writes it."""
    call = json.dumps({"name": name, "arguments": arguments})
    return f"<tool_call>\n{call}\n</tool_call>"


def obj(**properties: Any) -> dict[str, Any]:
    """Return the schema of an object that requires these properties and allows no others."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


TEXT = {"type": "string", "description": "a text"}
WHOLE = 9007199254740991  # JavaScript's largest safe integer
