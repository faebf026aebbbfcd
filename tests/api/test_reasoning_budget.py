"""Budgets of reasoning on the wire: each API's field, the administrator's default, and what has none."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from tests.support.client import client_of
from tests.support.scripted_engine import CHATML, ScriptedEngine, scripted_app
from tests.support.toy_tokenizer import ToyTokenizer
from tgi_asgi.settings import Settings
from tgi_asgi.types import ReasoningBudget

THINKING = CHATML + "{# <think> </think> #}"
CHANNELS = CHATML + "{# <|channel|>analysis<|message|> #}"
CHAT, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/messages", "/v1/responses"
HI = [{"role": "user", "content": "hi"}]
TOOLS = [{"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}]


async def budget_of(
    path: str = CHAT,
    *,
    template: str = THINKING,
    marks: tuple[str, ...] = ("<think>", "</think>"),
    settings: Settings | None = None,
    **body: Any,
) -> tuple[ReasoningBudget | None, ScriptedEngine]:
    engine = ScriptedEngine()
    engine.tokenizer = ToyTokenizer(marks=marks)
    app = scripted_app(engine, settings, chat_template=template)
    async with client_of(app) as client:
        main = {"input": HI} if path == RESPONSES else {"messages": HI, "max_tokens": 9}
        answer = await client.post(path, json={**main, **body})
    assert answer.status_code == 200, answer.text
    return engine.requests[0].reasoning_budget, engine


@pytest.mark.parametrize("path", [CHAT, RESPONSES])
@pytest.mark.parametrize(
    "name",
    ["thinking_token_budget", "reasoning_budget_tokens", "thinking_budget_tokens", "thinking_budget"],
)
async def test_a_chat_or_response_bounds_its_reasoning(name: str, path: str) -> None:
    given, engine = await budget_of(path, **{name: 5})  # type: ignore[arg-type]
    start, end = engine.tokenizer.id_of(b"<think>"), engine.tokenizer.id_of(b"</think>")
    assert given == ReasoningBudget(5, (start,), (end,), is_open=False)


async def test_a_switch_of_thinking_may_bound_it() -> None:
    given, _ = await budget_of(thinking={"type": "enabled", "budget_tokens": 5})
    assert given is not None and given.num_tokens == 5
    given, _ = await budget_of(thinking={"type": "enabled", "budget_tokens": 5}, thinking_budget=7)
    assert given is not None and given.num_tokens == 7


async def test_a_call_ends_the_section_of_a_chat_with_tools() -> None:
    marks = ("<think>", "</think>", "<tool_call>")
    given, engine = await budget_of(marks=marks, tools=TOOLS, thinking_token_budget=5)
    assert given is not None and given.call_id == engine.tokenizer.id_of(b"<tool_call>")


async def test_a_prompt_that_opens_the_section_is_inside_it() -> None:
    given, _ = await budget_of(template=THINKING + "<think>\n", thinking_token_budget=0)
    assert given is not None and given.is_open and given.num_tokens == 0


async def test_claude_codes_budget_is_kept() -> None:
    given, _ = await budget_of(MESSAGES, thinking={"type": "enabled", "budget_tokens": 2000})
    assert given is not None and given.num_tokens == 2000
    assert (await budget_of(MESSAGES, thinking={"type": "adaptive"}))[0] is None


@pytest.mark.parametrize("path", [CHAT, MESSAGES])
async def test_the_administrators_budget_is_the_default(path: str) -> None:
    settings = Settings(reasoning_budget=7)
    given, _ = await budget_of(path, settings=settings)
    assert given is not None and given.num_tokens == 7
    own = (
        {"thinking_token_budget": 9}
        if path == CHAT
        else {"thinking": {"type": "enabled", "budget_tokens": 9}}
    )
    given, _ = await budget_of(path, settings=settings, **own)
    assert given is not None and given.num_tokens == 9


async def test_minus_one_is_without_bound() -> None:
    given, _ = await budget_of(settings=Settings(reasoning_budget=7), thinking_token_budget=-1)
    assert given is None
    assert (await budget_of(settings=Settings(reasoning_budget=-1)))[0] is None  # llama.cpp's default


@pytest.mark.parametrize(
    "without", [{"template": CHATML}, {"marks": ()}, {"template": THINKING + "<think></think>"}]
)
async def test_without_reasoning_or_a_single_token_at_its_end_there_is_no_bound(without: Any) -> None:
    assert (await budget_of(thinking_token_budget=5, **without))[0] is None


@pytest.mark.parametrize("has_tools", [False, True])
async def test_gpt_oss_goes_on_with_its_answer_or_may_first_call_a_tool(has_tools: bool) -> None:
    marks = ("<|channel|>", "<|message|>", "<|end|>", "<|start|>")
    tools: Any = {"tools": TOOLS} if has_tools else {}
    given, engine = await budget_of(template=CHANNELS, marks=marks, thinking_token_budget=5, **tools)
    assert given is not None
    decode = partial(engine.tokenizer.decode, skip_special_tokens=False)
    answer = "<|start|>assistant<|channel|>final<|message|>"
    assert decode(given.start_ids) == "<|channel|>analysis<|message|>"
    assert decode(given.end_ids) == "<|end|>" + ("" if has_tools else answer)
    assert decode(given.answer_ids) == (answer if has_tools else "")


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT, {"thinking_token_budget": -2}, "thinking_token_budget"),
        (CHAT, {"thinking_budget": 1.5}, "thinking_budget"),
        (MESSAGES, {"thinking": {"type": "enabled", "budget_tokens": -1}}, "thinking.budget_tokens"),
        (MESSAGES, {"thinking": {"type": "enabled", "budget_tokens": True}}, "thinking.budget_tokens"),
    ],
)
async def test_a_budget_that_is_none_is_refused(path: str, body: dict[str, Any], param: str) -> None:
    async with client_of(scripted_app(ScriptedEngine())) as client:
        answer = await client.post(path, json={"messages": HI, "max_tokens": 9, **body})
    assert answer.status_code == 400 and param in answer.json()["error"]["message"]
