"""The schemas of tools' arguments as clients write them, valid or not."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.client import client_of
from tests.support.scripted_engine import ScriptedEngine, say
from tests.support.tool_app import HI, app_of
from tgi_asgi.text.tools import ToolSpec


async def test_types_named_as_python_names_them_are_enforced() -> None:
    engine = ScriptedEngine(say("hi"))
    ignored = []
    async with client_of(app_of(engine)) as client:
        for kinds in (("dict", "int"), ("object", "integer"), ("object", "inte")):
            parameters = {"type": kinds[0], "properties": {"a": {"type": kinds[1]}}, "required": ["a"]}
            tool = {"type": "function", "function": {"name": "add", "parameters": parameters}}
            body = {"messages": HI, "tools": [tool], "tool_choice": "required"}
            answer = await client.post("/v1/chat/completions", json=body)
            ignored.append(answer.headers.get("x-tgi-ignored-keywords"))
    assert ignored == [None, None, "tools.add"]
    of_python, of_json, of_nobody = (request.grammar for request in engine.requests)
    assert of_python is of_json and of_python is not of_nobody


@pytest.mark.parametrize(
    ("kind", "is_object"),
    [("array", False), (["string", "null"], False), ("OBJECT", True), (["object", "null"], True)],
)
async def test_arguments_are_an_object_whatever_a_schema_says(kind: Any, is_object: bool) -> None:
    function: dict[str, Any] = {"name": "add", "parameters": {"type": kind, "required": ["a"]}}
    body = {"messages": HI, "tools": [{"type": "function", "function": function}], "tool_choice": "required"}
    engine = ScriptedEngine(say("hi"))
    async with client_of(app_of(engine)) as client:
        answer = await client.post("/v1/chat/completions", json=body)
        assert answer.headers.get("x-tgi-ignored-keywords") == (None if is_object else "tools.add")
        function["strict"] = True
        strict = await client.post("/v1/chat/completions", json=body)
    if not is_object:
        error = strict.json()["error"]
        assert (strict.status_code, error["param"]) == (400, "tools[0].function.parameters")
        assert "must have type `object`" in error["message"]


@pytest.mark.parametrize("kind", ["array", ["object", "null"], "object"])
def test_the_schema_of_a_call_s_arguments_allows_only_objects(kind: Any) -> None:
    assert ToolSpec("add", {"type": kind, "required": ["a"]}).schema == {"type": "object", "required": ["a"]}
