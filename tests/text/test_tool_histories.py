"""What a conversation's tools, calls and results become before a chat template renders them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.support.processor_time import computed_within
from tests.support.tool_calls import parse
from tests.support.tool_writers import write
from tgi_asgi.text.chat.template import ChatTemplate
from tgi_asgi.text.tools import (
    FORMATS,
    CallArguments,
    CallStart,
    ToolSpec,
    add_tool_prompt,
    spell_out,
    with_calls_in_text,
    with_fitting_ids,
    with_listed_tools,
    with_own_tools,
    with_single_calls,
)
from tgi_asgi.text.tools.answer import AnswerParser


def test_a_history_of_calls_is_spelled_out_for_templates_that_know_none() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": [call, call]},
        {"role": "tool", "tool_call_id": "c1", "content": "42"},
        {"role": "tool", "tool_call_id": "c2", "content": "43"},
    ]
    tool = {"type": "function", "function": {"name": "f", "parameters": {"const": 2**70}}}
    system, user, assistant, answer = spell_out(messages, [tool])
    assert system["role"] == "system" and '"name": "f"' in system["content"]
    assert user == messages[0]
    assert assistant["content"].count('<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>') == 2
    assert answer["role"] == "user"
    assert answer["content"].index("42") < answer["content"].index("43")
    assert messages[1]["tool_calls"] == [call, call]  # the request's messages are unchanged
    kept, *_ = spell_out([{"role": "system", "content": "Be kind."}, *messages], [tool])
    assert kept["content"].startswith("Be kind.\n\n")


def test_ids_are_short_where_a_template_refuses_long_ones() -> None:
    call = {"id": "call_0123456789abcdef", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    history: list[dict[str, Any]] = [
        {"role": "assistant", "content": None, "tool_calls": [call, {**call, "id": "abcdefgh9"}]},
        {"role": "tool", "tool_call_id": call["id"], "content": "42"},
    ]
    assert with_fitting_ids(history, "{{ tool_call.id }}") == history
    made, answered = with_fitting_ids(history, "{% if tool_call.id|length != 9 %}")
    first, second = (call["id"] for call in made["tool_calls"])
    assert len(first) == 9 and first.isalnum() and second == "abcdefgh9"
    assert answered["tool_call_id"] == first
    assert history[1]["tool_call_id"] == call["id"]


def test_ids_name_the_function_where_a_template_shows_nothing_else() -> None:
    """Kimi K2's. Clients number their calls anew in each turn, or send the ids of another server."""
    call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    other = {**call, "function": {"name": "g", "arguments": "{}"}}
    history: list[dict[str, Any]] = [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "42"},
        {"role": "assistant", "content": None, "tool_calls": [other, {**call, "id": "call_2"}]},
        {"role": "tool", "tool_call_id": "call_1", "content": "43"},
        {"role": "tool", "tool_call_id": "lost", "content": "44"},
    ]
    first, result, second, another, lost = with_fitting_ids(history, "<|tool_call_argument_begin|>")
    assert first["tool_calls"][0]["id"] == result["tool_call_id"] == "functions.f:0"
    assert second["tool_calls"][0]["id"] == another["tool_call_id"] == "functions.g:1"
    assert second["tool_calls"][1]["id"] == "functions.f:2"
    assert lost["tool_call_id"] == "lost"


def test_tools_that_a_template_does_not_show_are_listed_in_the_system_message() -> None:
    """DeepSeek R1's and V3's templates show calls, but no tools."""
    calls = "{{ m.content }}{% for call in m.tool_calls or [] %}{{ call.function.name }}{% endfor %}"
    hidden, shown = (
        ChatTemplate("{% for m in messages %}" + calls + "{% endfor %}" + end, {})
        for end in ("", "{{ tools | tojson }}")
    )
    assert shown.shows_tools and not hidden.shows_tools
    tool = {"type": "function", "function": {"name": "f", "description": "Adds."}}
    user = {"role": "user", "content": "hi"}
    system, kept = with_listed_tools([user], [tool])
    assert system["role"] == "system" and '{"name": "f", "description": "Adds."}' in system["content"]
    assert kept == user
    (joined,) = with_listed_tools([user], [tool], accepts_system=False)
    assert joined["role"] == "user" and "Adds." in joined["content"] and joined["content"].endswith("hi")


def test_tools_are_in_the_system_message_of_a_template_that_looks_there() -> None:
    source = (
        "{% for message in messages %}{% if message['role'] == 'system' and 'tools' in message %}"
        "{{ message['content'] + '<|tool|>' + message['tools'] + '<|/tool|>' }}"
        "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
    )
    template = ChatTemplate(source, {})
    user = {"role": "user", "content": "hi"}
    tool = {"type": "function", "function": {"name": "f"}}
    shown = template.render(with_own_tools([user], [tool], source), tools=[tool])
    assert shown == '<|tool|>[{"name": "f"}]<|/tool|>hi'
    briefed = with_own_tools([{"role": "system", "content": "Be brief."}, user], [tool], source)
    assert template.render(briefed) == 'Be brief.<|tool|>[{"name": "f"}]<|/tool|>hi'
    assert with_own_tools([user], None, source) == [user]
    assert with_own_tools([user], [tool], source + "{% if tools %}{% endif %}") == [user]


@pytest.mark.parametrize("content", ["hi", [{"type": "text", "text": "hi"}]])
def test_a_tool_prompt_stands_behind_the_last_message(content: Any) -> None:
    *_, last = add_tool_prompt([{"role": "user", "content": content}], "Use the tools.")
    text = last["content"] if isinstance(content, str) else "".join(part["text"] for part in last["content"])
    assert text == "hi\n---\nUse the tools."


CALLS: list[tuple[str, dict[str, Any]]] = [
    ("f", {"a": 1, "s": "two\nlines", "l": ["x", None], "o": {"k": True}, "n": 1.5}),
    ("g", {}),
]


def call_of(name: str, arguments: Any, call_id: str = "c1") -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_calls_are_written_as_templates_write_them_and_read_again(name: str) -> None:
    written = FORMATS[name].written(CALLS)
    assert re.sub(r"\s", "", written) == re.sub(r"\s", "", write(name, CALLS))
    pieces = parse(AnswerParser(None, FORMATS[name], [ToolSpec("f", {}), ToolSpec("g", None)]), written, 5)
    assert [piece.name for piece in pieces if isinstance(piece, CallStart)] == ["f", "g"]
    # A text of "1" and the number 1 look alike in tags without a schema; the rest comes back.
    first, *_ = (json.loads(piece.text) for piece in pieces if isinstance(piece, CallArguments))
    assert first == CALLS[0][1]


def test_calls_that_a_template_drops_are_text() -> None:
    form = FORMATS["lfm2"]
    calls = [call_of("f", '{"a": 1}'), call_of("g", "cut off", "c2"), call_of("g", {"b": "x"}, "c3")]
    question = {"role": "user", "content": "hi"}
    history: list[dict[str, Any]] = [
        question,
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "assistant", "content": "Let me see.", "tool_calls": calls[:1], "reasoning": "hm"},
        {"role": "assistant", "content": [{"type": "text", "text": "See."}], "tool_calls": calls[:1]},
    ]
    made = with_calls_in_text(history, form, lambda message: False)
    written = '<|tool_call_start|>[f(a=1), g(), g(b="x")]<|tool_call_end|>'
    one = "\n<|tool_call_start|>[f(a=1)]<|tool_call_end|>"
    assert made == [
        question,
        {"role": "assistant", "content": written},
        {"role": "assistant", "content": f"Let me see.{one}", "reasoning": "hm"},
        {"role": "assistant", "content": [{"type": "text", "text": "See."}, {"type": "text", "text": one}]},
    ]
    assert with_calls_in_text(history, form, lambda message: True) == history
    assert history[1]["tool_calls"] == calls  # the request's messages are unchanged


def test_several_calls_become_turns_of_one_call_and_its_result() -> None:
    f, g = call_of("f", "{}"), call_of("g", "{}", "c2")
    results = [{"role": "tool", "tool_call_id": each, "content": each} for each in ("c2", "c1", "lost")]
    one: dict[str, Any] = {"role": "assistant", "content": "One.", "tool_calls": [f]}
    history: list[dict[str, Any]] = [
        {"role": "assistant", "content": "See.", "reasoning": "hm", "tool_calls": [f, g]},
        *results,
        one,
    ]
    assert with_single_calls(history) == [
        {"role": "assistant", "content": "See.", "reasoning": "hm", "tool_calls": [f]},
        results[1],
        {"role": "assistant", "content": None, "tool_calls": [g]},
        results[0],
        results[2],
        one,
    ]


def test_a_history_with_thousands_of_calls_is_read_once() -> None:
    calls = [call_of("f", "{}", f"c{number}") for number in range(20_000)]
    results = [{"role": "tool", "tool_call_id": call["id"], "content": ""} for call in calls]
    history = [{"role": "assistant", "content": None, "tool_calls": calls}, *reversed(results)]
    turns = computed_within(1, lambda: with_single_calls(history))  # it took minutes
    assert turns[1::2] == results


DROPS = {  # what real templates drop: all calls, or those beside text
    "LFM2-8B-A1B": (True, True),
    "LFM2.5-Instruct": (True, True),
    "ibm-granite-granite-3.3-2B-Instruct": (True, True),
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B": (False, True),
    "Qwen-Qwen3-0.6B": (False, False),
    "Mistral-Small-3.2-24B-Instruct-2506": (False, False),
    "google-gemma-4-31B-it": (False, False),
}
SINGLE = ("meta-llama-Llama-3.1-8B-Instruct", "openai-gpt-oss-120b", "GigaChat3-10B-A1.8B")


@pytest.mark.parametrize("name", sorted({*DROPS, *SINGLE}))
def test_a_template_says_which_calls_it_shows(llama_cpp: Path, name: str) -> None:
    source = (llama_cpp / "models" / "templates" / f"{name}.jinja").read_text()
    template = ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"})
    shown = tuple(not template.shows_calls({"content": content}) for content in (None, "text"))
    assert shown == DROPS.get(name, (False, False))
    assert template.takes_several_calls == (name not in SINGLE)
