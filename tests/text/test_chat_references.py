"""Chat templates of many models, from llama.cpp and transformers, against transformers' renderer.

A template that fails on clients' messages, or writes "None", gets messages that it accepts and is listed
here; transformers' rendering of those is the expected one.
"""

from __future__ import annotations

import ast
import copy
import importlib.util
import json
import re
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from transformers.utils import chat_template_utils

from tests.support.template_names import REPEATED
from tgi_asgi.errors import TemplateError
from tgi_asgi.text.chat import sandbox
from tgi_asgi.text.chat.template import ChatTemplate

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
# Modules of llama-cpp-python and of transformers that contain templates as strings.
PACKAGE_MODULES = ("llama_cpp/llama_chat_format.py",)
TRANSFORMERS_MODULES = (
    "llama4.processing_llama4",
    "qwen2_audio.processing_qwen2_audio",
    "smolvlm.processing_smolvlm",
)
# These concatenate a call's arguments with text, so they must get JSON.
TAKES_TEXT = {"deepseek-ai-DeepSeek-R1-Distill-Llama-8B", "meetkai-functionary-medium-v3.2"}
# These drop calls beside an empty content, so they get None.
NEEDS_NONE = {"deepseek-ai-DeepSeek-R1-Distill-Llama-8B"}
# These write "None" or "null" for the missing content of a message with calls, or fail on it, so they get "".
# Templates without support for calls get the same.
TAKES_NO_NONE = {
    "Bielik-11B-v3.0-Instruct",
    "GLM-4.6",
    "GLM-4.7-Flash",
    "LFM2.5-8B-A1B",
    "MiniMax-M2",
    "Qwen-QwQ-32B",
    "Qwen-Qwen3-0.6B",
    "mistralai-Ministral-3-14B-Reasoning-2512",
    "openai-gpt-oss-120b",
    "processing_llama4.chat_template",
    "unsloth-mistral-Devstral-Small-2507",
}
# These refuse a system message or drop it; the user's first message gets its text.
TAKES_NO_SYSTEM = {
    "google-gemma-2-2b-it",
    "llama_chat_format.Llama3VisionAlphaChatHandler",
    "llama_chat_format.MISTRAL_INSTRUCT_CHAT_TEMPLATE",
    "llama_chat_format.MIXTRAL_INSTRUCT_CHAT_TEMPLATE",
    "llama_chat_format.MoondreamChatHandler",
}
# This shows it in the user's message that comes last, so not before the result of a tool.
HIDES_SYSTEM = {"mistralai-Mistral-Nemo-Instruct-2407"}


def tool(name: str, description: str, **properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": list(properties)[:1]}
    return {
        "type": "function",
        "function": {"name": name, "description": description, "parameters": parameters},
    }


def call(number: int, name: str, **arguments: Any) -> dict[str, Any]:
    return {"id": f"call0000{number}", "type": "function", "function": {"name": name, "arguments": arguments}}


def result(number: int, name: str, content: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": f"call0000{number}", "name": name, "content": content}


TOOLS = [
    tool(
        "weather",
        "The <weather> in a city, 'é' & all",
        city={"type": "string", "description": "Its name"},
        unit={"type": "string", "enum": ["C", "F"]},
    ),
    tool("add", "", numbers={"type": "array", "items": {"type": "number"}}),
]
SYSTEM = {"role": "system", "content": "Be brief.\n"}
USER = {"role": "user", "content": ' What\'s <1> & "é"? '}
ASSISTANT = {"role": "assistant", "content": "One."}
THEN = {"role": "user", "content": "And then?"}
CALL = {"role": "assistant", "content": "", "tool_calls": [call(1, "weather", city="Köln", unit="C")]}
BARE_CALL = {**CALL, "content": None}
CALLS = {
    "role": "assistant",
    "content": "Let me see.",
    "tool_calls": [
        call(1, "weather", city="K"),
        call(2, "add", numbers=[1, 2.5], deep={"a": None, "b": True}),
    ],
}
RESULT = result(1, "weather", '{"degrees": 21}')
PARTS = [{"type": "text", "text": "Hello"}, {"type": "text", "text": "World"}]

TWO_USERS = "turns that do not alternate"  # joined for templates that refuse them
JOINED = [{"role": "user", "content": f"{USER['content']}\n\n{THEN['content']}"}]

CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "turns": ([SYSTEM, USER, ASSISTANT, THEN], {}),
    "turns without a prompt": ([SYSTEM, USER, ASSISTANT], {"add_generation_prompt": False}),
    TWO_USERS: ([USER, THEN], {}),
    "an unknown role": ([USER, {"role": "critic", "content": "Bad."}], {}),
    "a developer": ([{"role": "developer", "content": "Be brief."}, USER], {}),
    "parts": ([{"role": "user", "content": PARTS}], {}),
    "an answer to go on with": (
        [USER, {"role": "assistant", "content": "One, two, "}],
        {"continue_final_message": True, "add_generation_prompt": False},
    ),
    "documents": ([USER], {"documents": [{"title": "Title", "text": "Text"}]}),
    "no tools": ([USER], {"tools": []}),
    "tools": ([SYSTEM, USER], {"tools": TOOLS}),
    "tools without a system": ([USER], {"tools": TOOLS}),
    "a call": ([SYSTEM, USER, CALL, RESULT], {"tools": TOOLS}),
    "a call without content": ([SYSTEM, USER, BARE_CALL, RESULT], {"tools": TOOLS}),
    "two calls": ([USER, CALLS, RESULT, result(2, "add", "3.5"), ASSISTANT, THEN], {"tools": TOOLS}),
    "reasoning": ([USER, {**ASSISTANT, "reasoning_content": "Hm."}, THEN], {}),
    "reasoning by another name": (
        [USER, {**ASSISTANT, "reasoning": "Hm."}],
        {"add_generation_prompt": False},
    ),
    "reasoning and a call": ([USER, {**CALL, "reasoning_content": "Hm."}, RESULT], {"tools": TOOLS}),
    "thinking off": ([SYSTEM, USER], {"enable_thinking": False}),
    "thinking on": ([SYSTEM, USER], {"enable_thinking": True, "reasoning_effort": "high"}),
}


class _Clock(datetime):
    @classmethod
    def now(cls, tz: Any = None) -> _Clock:
        return cls(2025, 2, 3, 4, 5)


@pytest.fixture(scope="module", params=["different", pytest.param("repeated", marks=pytest.mark.models)])
def sources(request: pytest.FixtureRequest, llama_cpp: Path, llama_cpp_package: Path) -> dict[str, str]:
    """Return the templates by name: those that hardly differ from another one, or the rest."""
    paths = sorted((llama_cpp / "models" / "templates").glob("*.jinja"))
    assert len(paths) > 60
    found = {path.stem: path.read_text() for path in paths}
    modules = [llama_cpp_package / name for name in PACKAGE_MODULES]
    for name in TRANSFORMERS_MODULES:
        spec = importlib.util.find_spec(f"transformers.models.{name}")
        assert spec is not None and spec.origin is not None
        modules.append(Path(spec.origin))
    for path in modules:
        carried = templates_of_module(path)
        assert carried, path
        found |= carried
    is_repeated = request.param == "repeated"
    return {name: source for name, source in found.items() if (name in REPEATED) == is_repeated}


def templates_of_module(path: Path) -> dict[str, str]:
    """Return a module's strings that are templates, by their class, function or variable."""
    result = {}
    for statement in ast.parse(path.read_text()).body:
        owner = statement.targets[0] if isinstance(statement, ast.Assign) else statement
        name = getattr(owner, "name", None) or getattr(owner, "id", "")
        for node in ast.walk(statement):
            if (
                isinstance(node, ast.Constant)
                and "{%" in str(node.value)
                and "for message in " in str(node.value)
            ):
                result[f"{path.stem}.{name}"] = str(node.value)
    return result


@pytest.fixture(scope="module")
def templates(sources: dict[str, str]) -> dict[str, ChatTemplate]:
    return {name: ChatTemplate(source, SPECIAL) for name, source in sources.items()}


def with_text_arguments(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages with the arguments of calls as JSON, as OpenAI's clients send them."""
    messages = copy.deepcopy(messages)
    for message in messages:
        for entry in message.get("tool_calls", ()):
            arguments = entry["function"]["arguments"]
            entry["function"]["arguments"] = json.dumps(arguments, ensure_ascii=False)
    return messages


def moved_into_user(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return messages with the instructions at the front moved into the user's message that follows."""
    if messages[0]["role"] != "system":
        return messages
    system, user, *others = messages
    return [{**user, "content": f"{system['content']}\n\n{user['content']}"}, *others]


def adapted_messages(messages: list[dict[str, Any]], name: str, source: str) -> list[dict[str, Any]]:
    """Return the messages in the form that this template accepts."""
    if name in TAKES_NO_SYSTEM or (name in HIDES_SYSTEM and messages[-1]["role"] != "user"):
        messages = moved_into_user(messages)
    if name in TAKES_TEXT:
        messages = with_text_arguments(messages)
    messages = [
        {**message, "reasoning": message["reasoning_content"]} if "reasoning_content" in message else message
        for message in messages
    ]
    if name in NEEDS_NONE:
        messages = [
            {**message, "content": message["content"] or None} if "tool_calls" in message else message
            for message in messages
        ]
    if name in TAKES_NO_NONE or "tool_calls" not in source:
        messages = [{**message, "content": message["content"] or ""} for message in messages]
    return messages


def reference_render(source: str, messages: list[dict[str, Any]], options: dict[str, Any]) -> tuple[str, str]:
    """Render with transformers; return ("text", the prompt) or ("refused", the reason)."""
    try:
        # The annotation says a string, but it returns a pair: the texts, and the spans of the assistant's
        # parts.
        rendered: Any = chat_template_utils.render_jinja_template(
            [messages], chat_template=source, **{**options, **SPECIAL}
        )
    except Exception as error:  # a template may raise anything
        return "refused", reason(error)
    return "text", rendered[0][0]


def native_render(
    template: ChatTemplate, messages: list[dict[str, Any]], options: dict[str, Any]
) -> tuple[str, str]:
    """Render with `ChatTemplate`; return the same kind of pair. Only a `TemplateError` may be raised."""
    try:
        return "text", template.render(messages, **options)
    except TemplateError as error:
        return "refused", reason(error)


def reason(error: Exception) -> str:
    """Return an error's reason; unify the renderers' messages for what cannot be continued."""
    return re.sub(r"^continue_final_message(?s:.*)", "cannot be continued", str(error))


@pytest.mark.parametrize("title", CONVERSATIONS)
def test_every_template_gives_the_prompt_or_the_refusal_that_it_gives_in_transformers(
    title: str,
    sources: dict[str, str],
    templates: dict[str, ChatTemplate],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(chat_template_utils, "datetime", _Clock)
    monkeypatch.setattr(sandbox, "datetime", _Clock)
    messages, options = CONVERSATIONS[title]
    options = {"add_generation_prompt": True, **options}
    as_text = with_text_arguments(messages)
    forms = [messages] if as_text == messages else [messages, as_text]
    different = {}
    for name, source in sources.items():
        expected = reference_render(source, adapted_messages(messages, name, source), options)
        if title == TWO_USERS and expected[0] == "refused":
            expected = reference_render(source, JOINED, options)
        for sent in forms:
            got = native_render(templates[name], sent, options)
            if got != expected:
                different[name] = (got, expected)
    assert different == {}


SUNNY = result(1, "weather", "sunny")
AGENTS: dict[str, list[dict[str, Any]]] = {
    "several messages of one role": [SYSTEM, USER, THEN, ASSISTANT, {**ASSISTANT, "content": "Two."}, THEN],
    "an answer first": [SYSTEM, ASSISTANT, THEN],
    "a reminder after a result": [SYSTEM, USER, CALL, SUNNY, THEN],
    "a call that was interrupted": [SYSTEM, USER, CALL, THEN],
    "an empty answer": [SYSTEM, USER, {**ASSISTANT, "content": ""}, THEN],
    "a result at the end": [SYSTEM, USER, THEN, CALL, SUNNY],
    "nothing but instructions": [SYSTEM],
}
SIMPLE: dict[bool, list[dict[str, Any]]] = {
    False: [THEN],
    True: [USER, CALL, SUNNY],
}  # by whether there are calls


@pytest.mark.parametrize("title", AGENTS)
def test_every_template_shows_all_that_agents_send(title: str, templates: dict[str, ChatTemplate]) -> None:
    """Those that refuse simple conversations, or show no results (which are spelled out), do not count."""
    messages = AGENTS[title]
    simple = SIMPLE[CALL in messages]
    num_shown, lost = 0, {}
    for name, template in templates.items():
        if simple[-1]["content"] in native_render(template, simple, {})[1]:
            kind, text = native_render(template, messages, {})
            contents = {message["content"].strip() for message in messages}
            missing = {content for content in contents if content not in text}
            if kind == "refused" or missing:
                lost[name] = missing or text
            num_shown += 1
    assert lost == {} and num_shown > 4


def test_no_template_is_listed_without_need(sources: dict[str, str]) -> None:
    messages, options = CONVERSATIONS["a call without content"]
    texts = {
        name: (
            reference_render(source, messages, options),
            reference_render(source, adapted_messages(messages, name, source), options),
        )
        for name, source in sources.items()
    }
    needed = {
        name for name, (plain, fitted) in texts.items() if plain != fitted and "tool_calls" in sources[name]
    }
    assert needed == sources.keys() & (TAKES_NO_NONE | TAKES_TEXT | HIDES_SYSTEM)
