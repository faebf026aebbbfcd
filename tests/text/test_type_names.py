"""Tools whose types have the names of Python or Google."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest

from tgi_asgi.text.tools import with_json_types

# As in the examples that Meta published with Llama 3.2, and in the leaderboard's functions.
LLAMA = {
    "type": "dict",
    "required": ["user_id"],
    "properties": {
        "user_id": {"type": "int", "description": "The user's id."},
        "special": {"type": "str", "default": "none"},
        "at": {"type": "tuple", "items": {"type": "float"}},
        "extra": {"type": "any"},
    },
}
GOOGLE = {
    "type": "OBJECT",
    "properties": {
        "type": {"type": "STRING", "enum": ["INT", "any"]},
        "size": {"anyOf": [{"type": "INTEGER"}, {"type": ["NUMBER", "null"]}]},
    },
}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (
            LLAMA,
            {
                "type": "object",
                "required": ["user_id"],
                "properties": {
                    "user_id": {"type": "integer", "description": "The user's id."},
                    "special": {"type": "string", "default": "none"},
                    "at": {"type": "array", "items": {"type": "number"}},
                    "extra": {},
                },
            },
        ),
        (
            GOOGLE,
            {
                "type": "object",
                "properties": {
                    "type": {"type": "string", "enum": ["INT", "any"]},
                    "size": {"anyOf": [{"type": "integer"}, {"type": ["number", "null"]}]},
                },
            },
        ),
        ({"type": "HashMap", "properties": []}, {"type": "HashMap", "properties": []}),
        ({"type": 5, "items": None}, {"type": 5, "items": None}),
        (None, None),
    ],
)
def test_names_of_types_become_those_of_json_schema(given: Any, expected: Any) -> None:
    before = deepcopy(given)
    assert with_json_types(given) == expected
    assert given == before  # the model is shown what the client wrote


def test_a_schema_of_any_depth_is_read() -> None:
    schema: dict[str, Any] = {"type": "int"}
    for _ in range(5_000):
        schema = {"type": "LIST", "items": schema}
    assert with_json_types(schema)["items"]["items"]["type"] == "array"
