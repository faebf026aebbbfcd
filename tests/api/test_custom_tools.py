"""Custom tools, whose calls have one string as input, in chats and in responses."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from openai.types.chat import ChatCompletionMessageCustomToolCall

from tests.support.client import client_of
from tests.support.scripted_engine import ScriptedEngine, say
from tests.support.tool_app import HI, app_of, sdk
from tgi_asgi.api.custom_input import CustomInput
from tgi_asgi.settings import Settings

PATCH = '*** Begin\n"quoted" \\ é 😀\n*** End'
RESPONSES_TOOL: Any = {"type": "custom", "name": "patch"}
CHAT_TOOLS: Any = [
    {"type": "custom", "custom": {"name": "patch"}},
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}},
]


def read(pieces: list[str]) -> tuple[list[str], str]:
    source = CustomInput()
    return [source.push(piece) for piece in pieces], source.finish()


def calling(arguments: str) -> list[str]:
    """Return tokens of an answer that calls `patch`."""
    return [
        '<tool_call>\n{"name": "patch", "arguments": ',
        *(arguments[i : i + 3] for i in range(0, len(arguments), 3)),
        "}\n</tool_call>",
    ]


@pytest.mark.parametrize("is_ascii", [True, False])
@pytest.mark.parametrize("indent", [None, 2])
def test_the_input_does_not_depend_on_how_the_arguments_are_cut(is_ascii: bool, indent: int | None) -> None:
    arguments = json.dumps({"input": PATCH + "\t\u2028" + PATCH}, ensure_ascii=is_ascii, indent=indent)
    rng = random.Random(0)
    for _ in range(300):
        cuts = sorted(rng.choices(range(len(arguments) + 1), k=rng.randrange(12)))
        pieces = [arguments[i:j] for i, j in zip([0, *cuts], [*cuts, len(arguments)], strict=True)]
        parts, rest = read(pieces)
        assert ("".join(parts), rest) == (PATCH + "\t\u2028" + PATCH, "")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ('{"input": "ab', "ab"),  # cut off
        ('{"input": "ab\\', "ab"),
        ('{"input": "ab\\u00', "ab"),
        ('{"input": "ab\\ud83d', "ab"),
        ('{"inp', ""),
        ("", ""),
        ('{"input": "\\ud83dx"}', "\ufffdx"),  # half a pair
        ('{"input": "\\ud83d\\n"}', "\ufffd\n"),
        ('{"input": "\\\\ud83d"}', "\\ud83d"),  # a backslash
        ('{"input": "a\nb"}', "a\nb"),  # a line feed that JSON does not allow
        ('{"input": "a\\xb"}', "a\\xb"),  # no escape of JSON's
        ('{"input": "a\\nb\\xc\\td\\"e"}', 'a\nb\\xc\td"e'),
        ('{"input": "C:\\users\\n and \\u12"}', "C:\\users\n and \\u12"),
        ('{"input": "\\ud83d\\users"}', "\ufffd\\users"),
        (" " * 300 + '{"input": "late"}', "late"),
        ('{"other": 5}', '{"other": 5}'),
        ('"bare"', "bare"),
        ('{"input": 5}', '{"input": 5}'),
    ],
)
def test_what_is_cut_off_or_of_another_form_is_kept_as_far_as_it_goes(arguments: str, expected: str) -> None:
    for pieces in ([arguments], list(arguments)):
        parts, rest = read(pieces)
        assert "".join(parts) + rest == expected


async def test_a_chat_returns_the_call_of_a_custom_tool_as_its_clients_expect() -> None:
    script = say(
        *calling(json.dumps({"input": PATCH})),
        '\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
    )
    async with sdk(script) as client:
        whole = await client.chat.completions.create(model="m", messages=HI, tools=CHAT_TOOLS)
        stream = await client.chat.completions.create(model="m", messages=HI, tools=CHAT_TOOLS, stream=True)
        parts = [chunk.choices[0].delta.tool_calls or [] async for chunk in stream]
    calls = whole.choices[0].message.tool_calls
    assert whole.choices[0].finish_reason == "tool_calls" and calls is not None
    custom, function = calls
    assert isinstance(custom, ChatCompletionMessageCustomToolCall)
    assert (custom.type, custom.custom.name, custom.custom.input) == ("custom", "patch", PATCH)
    assert function.type == "function" and function.function.arguments == "{}"
    deltas: list[Any] = [part.model_dump(exclude_none=True) for parts_ in parts for part in parts_]
    begun, *more, named, arguments = deltas
    assert begun.pop("id") and named.pop("id")
    assert begun == {"index": 0, "type": "custom", "custom": {"name": "patch", "input": ""}}
    assert len(more) > 5 and "".join(part["custom"]["input"] for part in more) == PATCH
    assert named == {"index": 1, "type": "function", "function": {"name": "now", "arguments": ""}}
    assert arguments == {"index": 1, "function": {"arguments": "{}"}}


@pytest.mark.parametrize("stream", [False, True])
async def test_tgi_s_chats_call_functions_only(stream: bool) -> None:
    app = app_of(ScriptedEngine(say(*calling(json.dumps({"input": PATCH})))), Settings(tgi_compat=True))
    async with client_of(app) as client:
        body = {"messages": HI, "tools": CHAT_TOOLS, "stream": stream}
        answer = await client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200 and '"function"' in answer.text and '"custom"' not in answer.text


async def test_a_chat_s_custom_call_of_another_form_is_complete_at_its_end() -> None:
    async with sdk(say(*calling('{"text": 5}'))) as client:
        stream = await client.chat.completions.create(model="m", messages=HI, tools=CHAT_TOOLS, stream=True)
        chunks = [chunk.model_dump(exclude_none=True)["choices"][0] async for chunk in stream]
        whole = await client.chat.completions.create(model="m", messages=HI, tools=CHAT_TOOLS)
    inputs = [call["custom"]["input"] for each in chunks for call in each["delta"].get("tool_calls", ())]
    assert inputs == ["", '{"text": 5}'] and chunks[-1]["finish_reason"] == "tool_calls"
    assert whole.choices[0].message.tool_calls[0].custom.input == '{"text": 5}'  # type: ignore[index, union-attr]


@pytest.mark.parametrize("is_cut", [False, True])
async def test_a_response_streams_the_input_of_a_custom_tool(is_cut: bool) -> None:
    tokens = calling(json.dumps({"input": PATCH}))
    body: dict[str, Any] = {"input": "hi", "tools": [RESPONSES_TOOL], "stream": True}
    if is_cut:
        body["max_output_tokens"] = 8
    async with client_of(app_of(ScriptedEngine(say(*tokens)))) as client:
        answer = await client.post("/v1/responses", json=body)
        whole = (await client.post("/v1/responses", json={**body, "stream": False})).json()
    events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: ")]
    deltas = [each["delta"] for each in events if each["type"].endswith("custom_tool_call_input.delta")]
    (done,) = (each["input"] for each in events if each["type"].endswith("custom_tool_call_input.done"))
    (item,) = whole["output"]
    assert len(deltas) > 1 and all(deltas)
    assert "".join(deltas) == done == item["input"]
    assert (item["type"], item["name"]) == ("custom_tool_call", "patch") and item["id"].startswith("ctc_")
    if is_cut:
        assert PATCH.startswith(done) and 0 < len(done) < len(PATCH) and item["status"] == "incomplete"
    else:
        assert done == PATCH and item["status"] == "completed"
