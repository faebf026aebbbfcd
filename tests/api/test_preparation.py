"""What may happen while a request is prepared, before the engine gets it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.asgi import Call, request, send
from tests.support.scripted_engine import ScriptedEngine, say
from tests.support.tool_app import HI, TOOLS, app_of
from tests.support.waiting import until
from tgi_asgi.text.constrain.compiler import GrammarCompiler
from tgi_asgi.types import EngineState


class Gate:
    """A compiler of grammars that waits until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.has_begun, self.opened = threading.Event(), threading.Event()
        compiled = GrammarCompiler.compile

        def compile_later(compiler: GrammarCompiler, source: Any) -> Any:
            self.has_begun.set()
            assert self.opened.wait(10)
            return compiled(compiler, source)

        monkeypatch.setattr(GrammarCompiler, "compile", compile_later)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(monkeypatch)
    yield gate
    gate.opened.set()


def chat(**body: Any) -> Call:
    return request("POST", "/v1/chat/completions", {"messages": HI, "tools": TOOLS, **body})


async def test_a_client_that_leaves_does_not_hold_its_place(gate: Gate) -> None:
    engine = ScriptedEngine(say("hi"))
    call = chat()
    answering = asyncio.create_task(send(app_of(engine), call))
    await until(gate.has_begun.is_set)
    assert engine.num_permits == 127
    call.gone.set()
    await answering
    assert engine.num_permits == 128
    assert not engine.channels and not call.sent


async def test_what_is_prepared_when_draining_begins_is_served(gate: Gate) -> None:
    engine = ScriptedEngine(say("hi"))
    call = chat()
    answering = asyncio.create_task(send(app_of(engine), call))
    await until(gate.has_begun.is_set)
    engine.state = EngineState.DRAINING
    gate.opened.set()
    await answering
    assert call.status == 200, call.content


@pytest.mark.parametrize("kind", ["schema", "regex"])
async def test_a_constraint_is_not_blamed_on_the_tools_beside_it(kind: str) -> None:
    wrong: dict[str, Any] = {
        "schema": {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "strict": True, "schema": {"type": "object", "not": {}}},
            }
        },
        "regex": {"structured_outputs": {"regex": "(?=a)"}},
    }
    call = await send(app_of(ScriptedEngine()), chat(**wrong[kind]))
    assert (call.status, call.json()["error"]["param"]) == (400, next(iter(wrong[kind])))


async def test_tools_are_blamed_beside_a_right_constraint() -> None:
    broken = {"type": "object", "properties": {"a": {"type": "string", "pattern": "(?=a)"}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": broken, "strict": True}}
    right = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
    call = await send(app_of(ScriptedEngine()), chat(tools=[tool], response_format=right))
    assert (call.status, call.json()["error"]["param"]) == (400, "tools")
