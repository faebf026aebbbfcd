"""Chats whose history has calls that the model's template refuses or drops, and calls with odd arguments."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from tests.support.asgi import request, send
from tests.support.scripted_engine import ScriptedEngine, say, scripted_app, toy_info
from tests.support.toy_tokenizer import ToyTokenizer
from tgi_asgi.text.chat.template import ChatTemplate
from tgi_asgi.text.constrain.grammar import Grammar
from tgi_asgi.text.tools import FORMATS

HI = {"role": "user", "content": "hi"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
MARK = "<|tool_call_start|>"
DROPPING = "{# <|tool_list_start|> #}{{ tools }}{% for m in messages %}{{ m.content }}\n{% endfor %}"
SINGLE = """{# <|python_tag|> #}{{ tools }}{% for m in messages %}{% if m.tool_calls %}
{%- if m.tool_calls | length != 1 %}{{ raise_exception("one call at once") }}{% endif %}
{{- m.tool_calls[0].function.arguments | tojson }}{% else %}{{ m.content }}{% endif %}
{% endfor %}"""
SHOWING = """{% for m in messages %}{{ m.content or "" }}{% for call in m.tool_calls or [] %}
{{- call.function.arguments | tojson }}{% endfor %}{% endfor %}"""


def called(*arguments: str) -> list[dict[str, Any]]:
    """Return an answer with a call for each of the arguments, and the results."""
    calls = [
        {"id": f"c{at}", "type": "function", "function": {"name": "f", "arguments": each}}
        for at, each in enumerate(arguments)
    ]
    results = [{"role": "tool", "tool_call_id": call["id"], "content": f"of {call['id']}"} for call in calls]
    return [HI, {"role": "assistant", "content": None, "tool_calls": calls}, *results]


async def prompt_of(template: str, messages: list[dict[str, Any]], **body: Any) -> tuple[str, list[int]]:
    """Return the prompt of a chat as text, and its special tokens."""
    engine = ScriptedEngine(say("ok"))
    engine.tokenizer = ToyTokenizer(marks=[MARK])
    info = toy_info(max_input_tokens=4095, max_total_tokens=4096)
    app = scripted_app(engine, info=info, chat_template=template)
    whole = {"messages": messages, "tools": [TOOL], **body}
    call = await send(app, request("POST", "/v1/chat/completions", whole))
    assert call.status == 200, call.json()
    ids = list(engine.requests[0].prompt_ids)
    text = engine.tokenizer.decode(ids, skip_special_tokens=False)
    return text, [token_id for token_id in ids if token_id in engine.tokenizer.special_ids]


@pytest.mark.parametrize("argument", ["x", MARK, "<|im_end|>", "\\u003c|im_end|>"])
async def test_a_call_that_the_template_drops_is_written_with_the_model_s_own_marks(argument: str) -> None:
    text, special = await prompt_of(DROPPING, called(f'{{"s": "{argument}"}}'))
    shown = argument.replace("\\u003c", "<")
    assert text.endswith(FORMATS["lfm2"].written([("f", {"s": shown})]) + "\nof c0\n")
    assert len(special) == 1  # a client's texts of marks are texts


async def test_several_calls_are_shown_one_by_one_where_the_template_refuses_them() -> None:
    text, _ = await prompt_of(SINGLE, called('{"a": 1}', '{"a": 2}'))
    assert text.endswith('{"a": 1}of c0{"a": 2}of c1')


@pytest.mark.parametrize("template", [SINGLE, SHOWING])
async def test_results_are_shown_in_the_order_of_their_calls(template: str) -> None:
    history = called('{"a": 1}', '{"a": 2}', '{"a": 3}')
    sent = [*history[:2], history[4], history[2], history[3]]
    assert await prompt_of(template, sent) == await prompt_of(template, history)


async def test_results_stay_in_their_order_if_one_names_no_call() -> None:
    history = called("{}", "{}")
    history[2]["tool_call_id"] = "other"
    text, _ = await prompt_of(SHOWING, history)
    assert text.endswith("of c0of c1")


@pytest.mark.parametrize(
    ("template", "is_parallel"), [(SINGLE, False), (SHOWING + "{# <tool_call> #}", True)]
)
async def test_only_one_call_is_allowed_where_the_history_could_not_show_several(
    template: str, is_parallel: bool
) -> None:
    engine = ScriptedEngine(say("ok"))
    info = toy_info(max_input_tokens=4095, max_total_tokens=4096)
    app = scripted_app(engine, info=info, chat_template=template)
    body = {"messages": [HI], "tools": [TOOL], "tool_choice": "required"}
    assert (await send(app, request("POST", "/v1/chat/completions", body))).status == 200
    grammar = engine.requests[0].grammar
    assert isinstance(grammar, Grammar) and grammar.source is not None
    assert (")*" in grammar.source.lark) == is_parallel


@pytest.mark.parametrize("has_tools", [True, False])
async def test_an_answer_is_read_as_the_template_that_made_its_prompt_says(has_tools: bool) -> None:
    """A model may have one template for requests with tools, and another for those without."""
    engine = ScriptedEngine(say("<think>", "hm", "</think>", "yes"))
    app = scripted_app(engine)
    template = ChatTemplate("{{ messages[0].content }}", {}, tool_use_source="{{ tools }}</think><tool_call>")
    assert app.context.served is not None
    app.context.served = dataclasses.replace(app.context.served, chat_template=template)
    body = {"messages": [HI], **({"tools": [TOOL]} if has_tools else {})}
    answer = (await send(app, request("POST", "/v1/chat/completions", body))).json()
    message = answer["choices"][0]["message"]
    assert message["content"] == ("yes" if has_tools else "<think>hm</think>yes")
    assert message.get("reasoning_content") == ("hm" if has_tools else None)


async def test_a_call_inside_the_reasoning_ends_it() -> None:
    """Qwen 3.5 sometimes calls a tool before it has written the end mark."""
    tokens = ["<think>", "I see.\n", "<tool_call>\n", '{"name": "f", "argu', 'ments": {}}\n', "</tool_call>"]
    template = "{{ messages[0].content }}{{ tools }}{# </think> <tool_call> #}"
    info = toy_info(max_input_tokens=4095, max_total_tokens=4096)
    app = scripted_app(ScriptedEngine(say(*tokens)), info=info, chat_template=template)
    body = {"messages": [HI], "tools": [TOOL]}
    answer = (await send(app, request("POST", "/v1/chat/completions", body))).json()
    message = answer["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("I see.", None)
    assert message["tool_calls"][0]["function"] == {"name": "f", "arguments": "{}"}


async def test_no_escape_in_a_call_s_arguments_becomes_a_special_token() -> None:
    text, special = await prompt_of(SHOWING, called('{"s": "\\u003c|im_end|>", "<|im_\\u0065nd|>": 1}'))
    assert text.count("<|im_end|>") == 2
    assert not special


async def test_calls_that_became_text_may_be_continued_where_models_reason() -> None:
    body = {"continue_final_message": True, "add_generation_prompt": False}
    text, _ = await prompt_of(DROPPING + "{# <think> </think> #}", called("{}")[:2], **body)
    assert text.endswith(FORMATS["lfm2"].written([("f", {})]))
