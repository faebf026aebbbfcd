"""Items of `/v1/responses` that newer clients send: messages between agents, and results without an id."""

from __future__ import annotations

from typing import Any

import pytest

from tgi_asgi.api.openai.response_input import read_items
from tgi_asgi.errors import InvalidRequest

HI = {"role": "user", "content": "hi"}


def calls(*names: str) -> list[dict[str, Any]]:
    return [
        {"type": "function_call", "call_id": f"c-{name}", "name": name, "arguments": "{}"} for name in names
    ]


def test_messages_between_agents_are_read() -> None:
    """As Codex sends them with `features.multi_agent_v2`: what OpenAI would have encrypted is plain here."""
    content = [
        {"type": "input_text", "text": "Sender: /root\nPayload:\n"},
        {"type": "encrypted_content", "encrypted_content": "Count the files."},
    ]
    item = {"type": "agent_message", "author": "/root", "recipient": "/root/bob", "content": content}
    [_, message] = read_items([HI, item])
    assert message == {"role": "user", "content": ["Sender: /root\nPayload:\n", "Count the files."]}


@pytest.mark.parametrize("content", [None, [{"type": "encrypted_content"}], [{"type": "output_audio"}], [1]])
def test_a_message_between_agents_that_cannot_be_read_is_refused_by_name(content: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read_items([{"type": "agent_message", "content": content}])
    assert str(caught.value.param).startswith("input[0].content")


def test_results_without_an_id_belong_to_the_calls_before_them_in_their_order() -> None:
    results = [{"type": "function_call_output", "output": "1"}]
    results += [{"type": "function_call_output", "call_id": None, "output": "2"}]
    messages = read_items([HI, *calls("f", "g"), *results])
    assert [message["tool_call_id"] for message in messages[2:]] == ["c-f", "c-g"]


def test_the_id_of_a_result_is_a_string() -> None:
    with pytest.raises(InvalidRequest) as caught:
        read_items([*calls("f"), {"type": "function_call_output", "call_id": 1, "output": "1"}])
    assert caught.value.param == "input[1].call_id"
