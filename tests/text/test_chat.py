"""Chat templates against transformers' renderer, and the rules that it does not have."""

from __future__ import annotations

import json
import re
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from tgi_asgi.errors import ModelLoadError, TemplateError
from tgi_asgi.text.chat.template import ChatTemplate, load_chat_template

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}

CHATML = """{% for message in messages %}{{ '<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""

LLAMA3 = """{{- bos_token }}
{%- if tools is not none %}
    {{- 'Tools:\\n' }}
    {%- for tool in tools %}{{- tool | tojson(indent=4) }}{{- '\\n' }}{%- endfor %}
{%- endif %}
{%- for message in messages %}
    {%- if message.tool_calls is defined and message.tool_calls %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
        {{- '{"name": "' + call.name + '", "parameters": ' }}{{- call.arguments | tojson }}{{- '}' }}
    {%- else %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim }}
    {%- endif %}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

MISTRAL = """{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] %}{%- set turns = messages[1:] %}
{%- else %}{%- set turns = messages %}{%- endif %}
{{- bos_token }}
{%- for message in turns %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {{- '[INST]' }}{% if loop.last and system is defined %}{{ system + '\\n\\n' }}{% endif %}
        {{- message['content'] + '[/INST]' }}
    {%- else %}
        {{- ' ' + message['content'] + eos_token }}
    {%- endif %}
{%- endfor %}
"""

QWEN = """{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n<tools>' }}
    {%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{%- endfor %}
    {{- '\\n</tools><|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(count=0) %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}
        {%- set ns.count = ns.count + 1 %}
        {{- '<|im_start|>user\\n<tool_response>' + message.content + '</tool_response><|im_end|>\\n' }}
        {%- continue %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}{% generation %}
        {%- set thought = message.reasoning_content %}
        {%- if thought %}{{- '<think>' + thought + '</think>' }}{% endif %}
        {%- if message.content %}{{- message.content }}{% endif %}
        {%- for call in message.tool_calls or [] %}
            {{- '<tool_call>' }}{{- call.function | tojson }}{{- '</tool_call>' }}
        {%- endfor %}
    {%- endgeneration %}{% else %}
        {%- if message.content is string %}{{- message.content }}
        {%- else %}{%- for part in message.content %}{{- part.text }}{%- endfor %}{%- endif %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and not enable_thinking %}{{- '<think></think>' }}{% endif %}
{%- endif %}
{{- '<!-- ' ~ ns.count ~ ' tool answers -->' if ns.count }}
"""

TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "mistral": MISTRAL, "qwen": QWEN}

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Wetter für <Ort> & 'Umgebung'",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "at": {"type": "string"}},
        },
    },
}
SYSTEM = {"role": "system", "content": "Be  brief.\n"}
USER = {"role": "user", "content": " Grüße 👋 <b>&amp;</b> {{ 7 * 7 }} "}
ASSISTANT = {"role": "assistant", "content": "Hello.  "}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}}
    ],
}
ANSWER = {"role": "tool", "tool_call_id": "c1", "content": '{"degrees": 3}'}
THINKING = {"role": "assistant", "content": "Yes.", "reasoning": "Let me see."}

CASES: list[tuple[str, list[dict[str, Any]], dict[str, Any]]] = [
    *[(name, [USER], {}) for name in TEMPLATES],
    *[(name, [SYSTEM, USER, ASSISTANT, USER], {}) for name in TEMPLATES],
    *[(name, [USER, ASSISTANT], {"add_generation_prompt": False}) for name in TEMPLATES],
    *[
        (name, [USER, ASSISTANT], {"continue_final_message": True, "add_generation_prompt": False})
        for name in ("chatml", "llama3", "qwen")
    ],
    ("llama3", [USER, CALL, ANSWER], {"tools": [TOOL, TOOL]}),
    ("qwen", [USER, CALL, ANSWER, ANSWER], {"tools": [TOOL]}),
    ("qwen", [USER, THINKING, USER], {"enable_thinking": False}),
    (
        "qwen",
        [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
        {},
    ),
]


@pytest.mark.parametrize(("name", "messages", "options"), CASES)
def test_renders_what_transformers_renders(
    name: str, messages: list[dict[str, Any]], options: dict[str, Any]
) -> None:
    options = {"add_generation_prompt": True, **options}
    # The annotation says a string, but it returns a pair: the texts, and the spans of the assistant's parts.
    rendered: Any = render_jinja_template([messages], chat_template=TEMPLATES[name], **{**SPECIAL, **options})
    expected, _ = rendered
    assert ChatTemplate(TEMPLATES[name], SPECIAL).render(messages, **options) == expected[0]


def test_the_messages_are_not_changed_and_string_arguments_become_objects() -> None:
    call = json.loads(json.dumps(CALL))
    call["tool_calls"][0]["function"]["arguments"] = '{"city": "Köln"}'
    messages = [USER, call]
    before = json.dumps(messages)
    template = ChatTemplate(QWEN, SPECIAL)
    assert template.render(messages) == template.render([USER, CALL])
    assert json.dumps(messages) == before


@pytest.mark.parametrize("refuses", [True, False])
def test_text_and_reasoning_before_a_call_are_joined_where_the_template_refuses_both(refuses: bool) -> None:
    source = (
        "{% for m in messages %}{% if m.tool_calls %}{% if m.content and m.thinking and refuses %}"
        "{{ raise_exception('not both') }}{% endif %}[{{ m.thinking }}|{{ m.content }}]"
        "{{ m.tool_calls[0].function.arguments | tojson }}{% endif %}{% endfor %}"
    ).replace("refuses", str(refuses).lower())
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    answer = {"role": "assistant", "content": "Let me see.", "reasoning_content": "hm", "tool_calls": [call]}
    rendered = ChatTemplate(source, {}).render([{"role": "user", "content": "hi"}, answer])
    assert rendered == ("[hm\n\nLet me see.|]{}" if refuses else "[hm|Let me see.]{}")


def test_absent_content_is_an_empty_string_where_the_template_adds_strings() -> None:
    text = ChatTemplate(CHATML, SPECIAL).render([USER, {"role": "assistant"}], add_generation_prompt=False)
    assert text.endswith("<|im_start|>assistant\n<|im_end|>\n")


@pytest.mark.parametrize(("name", "expected"), [("chatml", False), ("llama3", False), ("qwen", True)])
def test_knows_whether_the_template_reads_lists_of_parts(name: str, expected: bool) -> None:
    assert ("user" in ChatTemplate(TEMPLATES[name], SPECIAL).part_roles) is expected


def test_knows_the_roles_whose_parts_are_shown() -> None:
    """Each may be read in its own way: here the system's first part alone, a tool's result as a list."""
    shown = ChatTemplate(
        "{% for m in messages %}{% if m.content is string %}{{ m.content }}"
        "{% elif m.role == 'system' %}{{ m.content[0].text }}{% elif m.role == 'tool' %}{{ m.content }}"
        "{% else %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}"
        "{% for call in m.tool_calls %}{{ call.function.arguments }}{% endfor %}{% endfor %}",
        {},
    )
    assert shown.part_roles == {"user", "assistant", "developer"}


@pytest.mark.parametrize("arguments", [None, "", '{"city": "Par', "[1]", "null", 7])
def test_arguments_that_are_no_object_count_as_none(arguments: Any) -> None:
    """An answer that was cut comes back so; the conversation goes on."""
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": arguments}}
    messages: list[dict[str, Any]] = [USER, {"role": "assistant", "content": None, "tool_calls": [call]}]
    calls = "{% for m in messages %}{% for call in m.tool_calls or [] %}"
    as_object = calls + "{{ call.function.arguments | tojson }}{% endfor %}{% endfor %}"
    as_text = calls + "{{ call.function.name + call.function.arguments }}{% endfor %}{% endfor %}"
    assert ChatTemplate(as_object, {}).render(messages) == "{}"
    assert ChatTemplate(as_text, {}).render(messages) == "f{}"


def test_empty_content_beside_a_call_is_none_where_the_call_would_be_dropped() -> None:
    """As in the template of DeepSeek's R1-Distill."""
    source = (
        "{% for m in messages %}{% if m.content is none %}{{ m.tool_calls[0].function.arguments | tojson }}"
        "{% else %}[{{ m.content }}]{% endif %}{% endfor %}"
    )
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    rendered = ChatTemplate(source, {}).render([{"role": "assistant", "content": "", "tool_calls": [call]}])
    assert rendered == '{"a": 1}'


def test_the_content_of_an_earlier_call_is_a_text_where_the_template_cuts_it() -> None:
    """QwQ's reads only the content of earlier messages."""
    source = (
        "{% for m in messages %}{% if not loop.last and m.role == 'assistant' %}"
        "{{ m.content.split('x')[-1] }}{% endif %}{% for call in m.tool_calls or [] %}"
        "{{ call.function.arguments | tojson }}{% endfor %}{% endfor %}"
    )
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    answer = {"role": "assistant", "content": None, "tool_calls": [call]}
    assert ChatTemplate(source, {}).render([USER, answer, USER]) == '{"a": 1}'


@pytest.mark.parametrize("name", ["thinking", "reasoning_content", "reasoning"])
def test_reasoning_is_found_under_each_name(name: str) -> None:
    template = ChatTemplate("{{ messages[0]." + name + " }}", {})
    for given in ("thinking", "reasoning_content", "reasoning"):
        assert template.render([{"role": "assistant", "content": "a", given: "hm"}]) == "hm"


def test_mentions_variables_attributes_and_keys() -> None:
    template = ChatTemplate(QWEN, SPECIAL)
    assert all(template.mentions(name) for name in ("tools", "enable_thinking", "reasoning_content"))
    assert not ChatTemplate(CHATML, SPECIAL).mentions("tools")
    assert ChatTemplate(CHATML, SPECIAL, tool_use_source=QWEN).mentions("tools")


def test_a_template_may_write_the_date() -> None:
    """As those of Llama 3 do; a template that finds no such function writes one of years ago."""
    template = ChatTemplate("{{ strftime_now('%Y') if strftime_now is defined else '26 Jul 2024' }}", {})
    assert template.render([USER]) == str(datetime.now().year)


def test_a_tool_use_template_serves_requests_with_tools_only() -> None:
    template = ChatTemplate("plain", SPECIAL, tool_use_source="{{ tools | length }} tools")
    assert template.render([USER]) == "plain"
    assert template.render([USER], tools=[TOOL]) == "1 tools"


def test_the_exception_of_a_template_is_the_message() -> None:
    with pytest.raises(TemplateError, match=r"^roles must alternate$"):
        ChatTemplate(MISTRAL, SPECIAL).render([{"role": "critic", "content": "Bad."}, USER])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ messages.__class__.__mro__ }}", "attribute '__class__' of 'list' object is unsafe"),
        ("{{ ''.__class__.__mro__ }}", "attribute '__class__' of 'str' object is unsafe"),
        ("{{ range.__globals__.open }}", "'__globals__' of 'function' object is unsafe"),
        ("{{ messages.append(1) }}", "attribute 'append' of 'list' object is unsafe"),
        ("{{ namespace(__class__=1) }}", "cannot start with an underscore: '__class__'"),
        ("{% set n = namespace(a=1) %}{% set n.__x = 1 %}", "cannot start with an underscore: '__x'"),
        ("{{ missing.attribute }}", "'missing' is undefined"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages + 'text' }}", "can only concatenate list"),
        ("{{ {}['x'].y }}", "has no attribute 'x'"),
        ("{% for i in range(1000000000) %}{% endfor %}", "at most 10000 numbers"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion depth"),
        ("{{ messages | tojson(indent=missing) }}", "'missing' is undefined"),
    ],
)
def test_what_a_template_must_not_do_is_a_template_error(source: str, message: str) -> None:
    with pytest.raises(TemplateError, match=re.escape(message)):
        ChatTemplate(source, SPECIAL).render([USER])


@pytest.mark.parametrize("name", ["''.__class__", "range.__globals__", "messages.append"])
def test_what_a_template_must_not_see_is_undefined(name: str) -> None:
    template = ChatTemplate("{{ " + name + " }}|{{ " + name + " is defined }}", SPECIAL)
    assert template.render([USER]) == "|False"


def test_endless_output_is_stopped() -> None:
    source = "{% for i in range(10000) %}{{ messages[0].content }}{% endfor %}"
    with pytest.raises(TemplateError, match="wrote more than"):
        ChatTemplate(source, SPECIAL).render([{"role": "user", "content": "x" * 100_000}])


@pytest.mark.parametrize(
    "source", ["{% if %}", "{{ unclosed", "{% unknown_tag %}", "{{ x | no_such_filter }}"]
)
def test_a_template_that_does_not_compile_says_so(source: str) -> None:
    with pytest.raises(TemplateError, match="does not compile"):
        ChatTemplate(source, SPECIAL)


def test_a_final_message_that_the_template_drops_cannot_be_continued() -> None:
    with pytest.raises(TemplateError, match="drops or changes the final message"):
        ChatTemplate("{{ messages[0].content }}", SPECIAL).render(
            [USER, ASSISTANT], add_generation_prompt=False, continue_final_message=True
        )


def _write_config(path: Path, template: object) -> Path:
    path.write_text(json.dumps({"chat_template": template}), encoding="utf-8")
    return path


def test_sources_in_their_order(tmp_path: Path) -> None:
    def render(**extra: Any) -> str | None:
        template = load_chat_template({}, directory=tmp_path, metadata=metadata, **extra)
        return None if template is None else template.render([USER])

    metadata: dict[str, Any] = {"general.description": "a file without a template", "general.version": 3}
    assert render() is None
    metadata["tokenizer.chat_template"] = "from gguf"
    assert render() == "from gguf"
    _write_config(tmp_path / "tokenizer_config.json", "from config")
    assert render() == "from config"
    for name in ("chat_template.json", "processor_config.json"):  # of older vision models
        _write_config(tmp_path / name, f"from {name}")
        assert render() == f"from {name}"
    (tmp_path / "chat_template.jinja").write_text("from file")
    assert render() == "from file"
    override = _write_config(tmp_path / "other.json", "from override")
    assert render(override=override) == "from override"


def test_named_templates_of_a_config_and_of_a_gguf_file(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "with tools"}]
    _write_config(tmp_path / "tokenizer_config.json", named)
    metadata = {"tokenizer.chat_template": "plain", "tokenizer.chat_template.tool_use": "with tools"}
    for template in (load_chat_template({}, directory=tmp_path), load_chat_template({}, metadata=metadata)):
        assert template is not None
        assert (template.render([USER]), template.render([USER], tools=[TOOL])) == ("plain", "with tools")


@pytest.mark.parametrize("has_object", [True, False])
def test_a_template_for_tools_beside_the_config_s(tmp_path: Path, has_object: bool) -> None:
    _write_config(tmp_path / "tokenizer_config.json", {"default": "plain"} if has_object else "plain")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("with tools")
    template = load_chat_template({}, directory=tmp_path)
    assert template is not None
    assert (template.render([USER]), template.render([USER], tools=[TOOL])) == ("plain", "with tools")


def test_an_override_without_a_template_is_refused(tmp_path: Path) -> None:
    for text in ("[]", "5", "null", "[" * 100_000):
        (tmp_path / "other.json").write_text(text)
        with pytest.raises(ModelLoadError, match=r"other\.json: .*JSON"):
            load_chat_template({}, override=tmp_path / "other.json")
    with pytest.raises(ModelLoadError, match="has no chat_template"):
        load_chat_template({}, override=_write_config(tmp_path / "config.json", None))
    with pytest.raises(ModelLoadError, match="Cannot read"):
        load_chat_template({}, override=tmp_path / "absent.jinja")
