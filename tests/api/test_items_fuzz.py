"""Random items, blocks, schemas and tools for `/v1`: never a 500 or a lost permit."""

from __future__ import annotations

import asyncio
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.api.test_fuzz import ANYTHING, SCALARS, bodies
from tests.support.fuzzing import post_and_check
from tests.support.scripted_engine import ScriptedEngine, say, scripted_app, toy_info
from tgi_asgi.api.anthropic.schema import MessagesRequest
from tgi_asgi.api.openai.client_tools import CALLS, OUTPUTS
from tgi_asgi.api.openai.response_schema import ResponsesRequest
from tgi_asgi.settings import Settings

TEXT = st.text(max_size=5)
PARTS = st.fixed_dictionaries(
    {"type": st.sampled_from(["input_text", "output_text", "text", "refusal", "input_image"])},
    optional={"text": TEXT | SCALARS, "refusal": TEXT | SCALARS},
)
CONTENT = TEXT | st.lists(PARTS | ANYTHING, max_size=3) | SCALARS
KINDS = [
    "message", "agent_message", "function_call", "function_call_output", "reasoning", "item_reference",
    "additional_tools", "tool_search_output", *CALLS, *OUTPUTS,
]  # fmt: skip
FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "commands": CONTENT, "command": CONTENT, "env": ANYTHING, "type": st.just("delete_file"), "path": TEXT
    },
)  # fmt: skip
OFFERED = st.fixed_dictionaries(
    {"type": st.sampled_from(["function", "custom", "namespace", "tool_search", "shell", "x"])},
    optional={"name": st.sampled_from(["f", "g", "a b"]), "parameters": ANYTHING, "tools": ANYTHING},
)
ITEMS = st.fixed_dictionaries(
    {},
    optional={
        "execution": st.sampled_from(["client", "server", None]),
        "tools": st.lists(OFFERED | ANYTHING, max_size=3) | ANYTHING,
        "type": st.sampled_from(KINDS) | SCALARS,
        "role": st.sampled_from(["user", "assistant", "system", "x"]),
        "content": CONTENT, "call_id": TEXT | SCALARS, "name": TEXT | SCALARS, "arguments": TEXT | SCALARS,
        "output": CONTENT, "action": FIELDS | ANYTHING, "operation": FIELDS | ANYTHING,
    },
)  # fmt: skip
BLOCKS = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "tool_use", "tool_result", "thinking", "redacted_thinking", "image"])},
    optional={
        "text": TEXT | SCALARS, "id": TEXT, "name": TEXT, "input": ANYTHING, "tool_use_id": TEXT,
        "content": CONTENT, "thinking": TEXT | SCALARS,
    },
)  # fmt: skip
TURNS = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system"]), "content": TEXT | st.lists(BLOCKS, max_size=3)}
)
TYPES = ["object", "string", "integer", "array", "null", "x"]
SCHEMAS = st.recursive(
    st.fixed_dictionaries({}, optional={"type": st.sampled_from(TYPES) | ANYTHING, "enum": ANYTHING}),
    lambda inner: st.fixed_dictionaries(
        {},
        optional={
            "type": st.sampled_from(TYPES), "properties": st.dictionaries(TEXT, inner, max_size=3),
            "items": inner, "anyOf": st.lists(inner, max_size=3), "$ref": st.sampled_from(["#", "#/$defs/a"]),
            "required": ANYTHING, "pattern": TEXT, "minimum": SCALARS, "multipleOf": SCALARS,
            "$defs": ANYTHING,
        },
    ),
    max_leaves=8,
)  # fmt: skip
FUNCTIONS = st.fixed_dictionaries(
    {"name": st.sampled_from(["f", "g", "h-1"])},
    optional={"parameters": SCHEMAS, "strict": st.booleans()},
)
TOOLS = st.fixed_dictionaries({"type": st.just("function"), "function": FUNCTIONS})
CONSTRAINTS = st.one_of(
    st.fixed_dictionaries({"guided_json": SCHEMAS}),
    st.fixed_dictionaries({"guided_regex": TEXT}),
    st.fixed_dictionaries({"guided_grammar": TEXT | st.builds("start: {}".format, TEXT)}),
    st.fixed_dictionaries({"guided_choice": st.lists(TEXT, max_size=3)}),
    st.fixed_dictionaries(
        {"tools": st.lists(TOOLS, min_size=1, max_size=2)},
        optional={
            "tool_choice": st.sampled_from(["auto", "required", "f", "none"]),
            "stream": st.booleans(),
        },
    ),
)


async def post(path: str, body: Any) -> None:
    engine = ScriptedEngine(say("Hel", "<tool_call>", '\n{"name": "f", "arg', 'uments": {', b"\xf0\x9f"))
    app = scripted_app(engine, Settings(), info=toy_info(max_input_tokens=4095, max_total_tokens=4096))
    await post_and_check(app, engine, path, body)


@settings(max_examples=100)
@given(bodies(ResponsesRequest, {"input": st.lists(ITEMS, max_size=4) | TEXT | ANYTHING}))
def test_random_responses(body: Any) -> None:
    asyncio.run(post("/v1/responses", body))


@settings(max_examples=100)
@given(bodies(MessagesRequest, {"messages": st.lists(TURNS, max_size=3), "max_tokens": st.just(9)}))
def test_random_messages(body: Any) -> None:
    asyncio.run(post("/v1/messages", body))


@settings(max_examples=100)
@given(CONSTRAINTS)
def test_random_constraints(fields: dict[str, Any]) -> None:
    asyncio.run(post("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], **fields}))
