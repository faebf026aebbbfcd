"""Shortened chat templates of the model families: a history's calls render in the format of answers.

Each keeps its family's peculiarities: how it writes arguments, and which ids and roles it accepts.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from tgi_asgi.text.chat.template import ChatTemplate
from tgi_asgi.text.tools import CallArguments, CallStart, ToolSpec, choose_format, with_fitting_ids
from tgi_asgi.text.tools.answer import AnswerParser

# ruff: noqa: E501, RUF001  # a line break would be part of the prompt; the bars are DeepSeek's own
TEMPLATES = {
    "hermes": """
{%- if tools %}<|im_start|>system
# Tools
<tools>
{%- for tool in tools %}
{{ tool | tojson }}
{%- endfor %}
</tools><|im_end|>
{% endif %}
{%- for message in messages %}
{%- if message.role == "assistant" and message.tool_calls %}<|im_start|>assistant
{%- if message.content %}
{{ message.content }}
{%- endif %}
{%- for tool_call in message.tool_calls %}
{%- if tool_call.function is defined %}{% set tool_call = tool_call.function %}{% endif %}
<tool_call>
{"name": "{{ tool_call.name }}", "arguments": {{ tool_call.arguments | tojson }}}
</tool_call>
{%- endfor %}<|im_end|>
{% elif message.role == "tool" %}<|im_start|>user
<tool_response>
{{ message.content }}
</tool_response><|im_end|>
{% else %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endif %}
{%- endfor %}""",
    "qwen3_coder": """
{%- if tools %}<tools>{% for tool in tools %}<function><name>{{ tool.function.name }}</name></function>{% endfor %}
</tools>
Answer with <function=name> and <parameter=name> inside <tool_call>.
{% endif %}
{%- for message in messages %}
{%- if message.tool_calls %}
{%- for call in message.tool_calls %}{% set call = call.function if call.function is defined else call %}
<tool_call>
<function={{ call.name }}>
{% for name, value in call.arguments | items %}<parameter={{ name }}>
{{ value | tojson | safe if value is mapping or (value is sequence and value is not string) else value | string }}
</parameter>
{% endfor %}</function>
</tool_call>
{%- endfor %}
{% elif message.role == "tool" %}<tool_response>{{ message.content }}</tool_response>
{% else %}{{ message.content }}
{% endif %}
{%- endfor %}""",
    "llama3_json": """
{%- for message in messages %}
{%- if 'tool_calls' in message %}
{%- if not message.tool_calls | length == 1 %}{{ raise_exception("This model only supports single tool-calls") }}{% endif %}
{%- set call = message.tool_calls[0].function %}<|start_header_id|>assistant<|end_header_id|>

{{ '{"name": "' + call.name + '", ' }}{{ '"parameters": ' }}{{ call.arguments | tojson }}{{ "}" }}<|eot_id|>
{%- elif message.role == "tool" or message.role == "ipython" %}<|start_header_id|>ipython<|end_header_id|>

{{ message.content | tojson if message.content is mapping or message.content is iterable and message.content is not string else message.content }}<|eot_id|>
{%- else %}<|start_header_id|>{{ message.role }}<|end_header_id|>

{% if tools and loop.first %}Respond in the format {"name": function name, "parameters": dictionary of arguments}.
{% for tool in tools %}{{ tool | tojson(indent=4) }}
{% endfor %}{% endif %}{{ message.content | trim }}<|eot_id|>
{%- endif %}
{%- endfor %}""",
    "mistral": """
{%- for message in messages %}
{%- if message.role == "user" %}{% if tools and loop.first %}[AVAILABLE_TOOLS] [
{%- for tool in tools %}{{ tool | tojson }}{% endfor %}][/AVAILABLE_TOOLS]{% endif %}[INST] {{ message.content }}[/INST]
{%- elif message.tool_calls is defined and message.tool_calls is not none %}[TOOL_CALLS] [
{%- for tool_call in message.tool_calls %}{% set out = tool_call.function | tojson %}{{ out[:-1] }}
{%- if not tool_call.id is defined or tool_call.id | length != 9 %}
{{- raise_exception("Tool call IDs should be alphanumeric strings with length 9!") }}
{%- endif %}{{ ', "id": "' + tool_call.id + '"}' }}{{ ", " if not loop.last else "]" }}
{%- endfor %}</s>
{%- elif message.role == "tool" %}
{%- if not message.tool_call_id is defined or message.tool_call_id | length != 9 %}
{{- raise_exception("Tool call IDs should be alphanumeric strings with length 9!") }}
{%- endif %}[TOOL_RESULTS] {"content": {{ message.content }}, "call_id": "{{ message.tool_call_id }}"}[/TOOL_RESULTS]
{%- else %} {{ message.content }}</s>{% endif %}
{%- endfor %}""",
    "mistral_args": """
{%- for message in messages %}
{%- if message.role == "user" %}{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}[INST]{{ message.content }}[/INST]
{%- elif message.tool_calls %}
{%- for call in message.tool_calls %}[TOOL_CALLS]{{ call.function.name }}[ARGS]
{%- if call.function.arguments is not string %}{{ call.function.arguments | tojson }}{% else %}{{ call.function.arguments }}{% endif %}
{%- endfor %}</s>
{%- elif message.role == "tool" %}[TOOL_RESULTS]{{ message.content }}[/TOOL_RESULTS]
{%- else %}{{ message.content }}</s>{% endif %}
{%- endfor %}""",
    "granite": """
{%- if tools %}<|start_of_role|>available_tools<|end_of_role|>
{%- for tool in tools %}{{ tool | tojson(indent=4) }}{% endfor %}<|end_of_text|>
Respond only with <|tool_call|> followed by a JSON list of tools used.
{% endif %}
{%- for message in messages %}<|start_of_role|>{{ message.role }}<|end_of_role|>
{%- if message.tool_calls %}<|tool_call|>[
{%- for call in message.tool_calls %}{{ {"name": call.function.name, "arguments": call.function.arguments} | tojson }}
{%- if not loop.last %}, {% endif %}{% endfor %}]
{%- else %}{{ message.content }}{% endif %}<|end_of_text|>
{% endfor %}""",
    "deepseek_v3": """
{%- for message in messages %}
{%- if message['role'] == 'user' %}<｜User｜>{{ message['content'] }}
{%- elif message['role'] == 'assistant' and message['content'] is none %}
{%- for tool in message['tool_calls'] %}
{%- if loop.first %}<｜Assistant｜><｜tool▁calls▁begin｜>{% else %}{{ '\\n' }}{% endif %}
{{- '<｜tool▁call▁begin｜>' + tool['type'] + '<｜tool▁sep｜>' + tool['function']['name'] + '\\n' + '```json' + '\\n' + tool['function']['arguments'] + '\\n' + '```' + '<｜tool▁call▁end｜>' }}
{%- endfor %}<｜tool▁calls▁end｜><｜end▁of▁sentence｜>
{%- elif message['role'] == 'tool' %}<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>{{ message['content'] }}<｜tool▁output▁end｜><｜tool▁outputs▁end｜>
{%- elif message['role'] == 'assistant' %}<｜Assistant｜>{{ message['content'].split('</think>')[-1] }}<｜end▁of▁sentence｜>
{%- endif %}
{%- endfor %}""",
    "deepseek_v31": """
{%- for message in messages %}
{%- if message['role'] == 'user' %}<｜User｜>{{ message['content'] }}
{%- elif message['role'] == 'assistant' and message['tool_calls'] is defined and message['tool_calls'] is not none %}<｜Assistant｜></think><｜tool▁calls▁begin｜>
{%- for tool in message['tool_calls'] %}
{{- '<｜tool▁call▁begin｜>' + tool['function']['name'] + '<｜tool▁sep｜>' + tool['function']['arguments'] + '<｜tool▁call▁end｜>' }}
{%- endfor %}<｜tool▁calls▁end｜><｜end▁of▁sentence｜>
{%- elif message['role'] == 'tool' %}<｜tool▁output▁begin｜>{{ message['content'] }}<｜tool▁output▁end｜>
{%- else %}{{ message['content'] }}{% endif %}
{%- endfor %}""",
    "pythonic": """
{%- if tools %}Answer with [func_name1(params_name1=params_value1, params_name2=params_value2...), func_name2(params)]
{% for tool in tools %}{{ tool | tojson(indent=4) }}{% endfor %}{% endif %}
{%- for message in messages %}<|start_header_id|>{{ message.role }}<|end_header_id|>
{%- if message.tool_calls %}[
{%- for call in message.tool_calls %}{{ call.function.name }}(
{%- for name, value in call.function.arguments.items() %}{{ name }}={{ value | tojson }}{{ ", " if not loop.last }}{% endfor -%}
){{ ", " if not loop.last }}{% endfor %}]
{%- else %}{{ message.content }}{% endif %}<|eot|>
{%- endfor %}""",
}
ARGUMENTS = {"city": 'Paris, "9e"', "days": 3, "units": ["C", "F"]}
PARAMETERS = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "units": {"type": "array", "items": {"type": "string"}},
    },
}
TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "Forecast", "parameters": PARAMETERS},
}


def render(name: str, num_calls: int) -> str:
    template = ChatTemplate(TEMPLATES[name], {"bos_token": "<s>", "eos_token": "</s>"})
    ids = [f"call_{index:024x}" for index in range(num_calls)]
    function = {"name": "weather", "arguments": json.dumps(ARGUMENTS)}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "Which weather will there be?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": call_id, "type": "function", "function": function} for call_id in ids],
        },
        *({"role": "tool", "tool_call_id": call_id, "content": "20 degrees"} for call_id in ids),
    ]
    return template.render(
        with_fitting_ids(messages, template.source), tools=[TOOL], add_generation_prompt=True
    )


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_a_template_shows_its_format(name: str) -> None:
    assert choose_format(TEMPLATES[name]).name == name


@pytest.mark.parametrize("num_calls", [1, 2])
@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_calls_of_the_history_are_written_as_answers_are_read(name: str, num_calls: int) -> None:
    if name == "llama3_json" and num_calls > 1:
        return  # its template accepts only one
    text = render(name, num_calls)
    form = choose_format(TEMPLATES[name])
    answer = text[text.index("Which weather") :]
    if not form.marker:
        answer = answer[answer.index(form.written([("weather", {})])[:8]) :]
    answer = answer[: answer.index("20 degrees")]
    parser = AnswerParser(None, form, [ToolSpec("weather", PARAMETERS)])
    pieces = parser.push(answer) + parser.finish()
    assert [piece for piece in pieces if isinstance(piece, CallStart)] == [CallStart("weather")] * num_calls
    written = "".join(piece.text for piece in pieces if isinstance(piece, CallArguments))
    decoder, at, found = json.JSONDecoder(), 0, []
    while at < len(written):
        value, at = decoder.raw_decode(written, at)
        found.append(value)
    assert found == [ARGUMENTS] * num_calls
    assert text.count("20 degrees") == num_calls
