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
        description: what the request shows.
        answer: the model's answer, as text.
        expected_items: what the client must read in the server's answer.
        in_prompt: texts that the prompt must contain, in this order.
        not_in_prompt: texts that the prompt must not contain.
    """

    client: str
    description: str
    path: str
    body: dict[str, Any]
    answer: str = "Done."
    expected_items: Sequence[Item] = (("text", "Done."),)
    in_prompt: Sequence[str] = ()
    not_in_prompt: Sequence[str] = ()


def render_call(name: str, **arguments: Any) -> str:
    """Return a tool call as the model writes it."""
    call = json.dumps({"name": name, "arguments": arguments})
    return f"<tool_call>\n{call}\n</tool_call>"


def object_schema(**properties: Any) -> dict[str, Any]:
    """Return the schema of an object that requires these properties and allows no others."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


TEXT = {"type": "string", "description": "a text"}
WHOLE = 9007199254740991  # JavaScript's largest safe integer
