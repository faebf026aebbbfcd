"""Tool calls as each format's templates write them, as test inputs independent of the table of formats.

    write("hermes", [("f", {"a": 1}), ("g", {})])

`tests/text/test_model_templates.py` compares these texts with the output of real models' templates.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

# ruff: noqa: RUF001  # the bars are DeepSeek's own

Call = tuple[str, dict[str, Any]]
Writer = Callable[[Sequence[Call]], str]


def dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def named(call: Call, key: str = "arguments") -> str:
    return f'{{"name": "{call[0]}", "{key}": {dump(call[1])}}}'


def joined(before: str, calls: Sequence[str], between: str, behind: str) -> str:
    return before + between.join(calls) + behind


def listed(begin: str, end: str) -> Writer:
    return lambda calls: joined(f"{begin}[", [named(call) for call in calls], ", ", f"]{end}")


def each(before: str, middle: str, behind: str, between: str = "", head: str = "", tail: str = "") -> Writer:
    """Return a writer of calls with their name before a JSON object; `#` stands for the call's number."""

    def write(calls: Sequence[Call]) -> str:
        texts = [
            f"{before}{name}{middle}{{}}{behind}".replace("#", str(index)).replace("{}", dump(arguments), 1)
            for index, (name, arguments) in enumerate(calls)
        ]
        return joined(head, texts, between, tail)

    return write


def plain(value: Any) -> str:
    return value if isinstance(value, str) else dump(value)


def tags(
    call: tuple[str, str, str],
    argument: tuple[str, str, str],
    between: str,
    head: str = "",
    tail: str = "",
    value: Callable[[Any], str] = plain,
) -> Writer:
    def write(calls: Sequence[Call]) -> str:
        texts = []
        for name, arguments in calls:
            parts = []
            for key, given in arguments.items():
                middle = argument[1].replace("%t", dump(isinstance(given, str)))
                parts.append(f"{argument[0]}{key}{middle}{value(given)}{argument[2]}")
            texts.append(f"{call[0]}{name}{call[1]}{''.join(parts)}{call[2]}")
        return joined(head, texts, between, tail)

    return write


def pythonic(begin: str, between: str, end: str, value: Callable[[Any], str] = dump) -> Writer:
    def write(calls: Sequence[Call]) -> str:
        texts = [
            f"{name}({', '.join(f'{key}={value(given)}' for key, given in arguments.items())})"
            for name, arguments in calls
        ]
        return joined(begin, texts, between, end)

    return write


def gemma(begin: str, end: str, quote: str) -> Writer:
    def value(given: Any) -> str:
        if isinstance(given, str):
            return f"{quote}{given}{quote}"
        if isinstance(given, list):
            return f"[{','.join(map(value, given))}]"
        if isinstance(given, dict):
            return f"{{{','.join(f'{key}:{value(item)}' for key, item in given.items())}}}"
        return dump(given)

    return lambda calls: "".join(f"{begin}call:{name}{value(arguments)}{end}" for name, arguments in calls)


def cdata(value: Any) -> str:
    return f"<![CDATA[{value}]]>" if isinstance(value, str) else dump(value)


def dsml(block: str) -> Writer:
    return tags(
        ('<｜DSML｜invoke name="', '">', "\n</｜DSML｜invoke>"),
        ('\n<｜DSML｜parameter name="', '" string="%t">', "</｜DSML｜parameter>"),
        "\n", f"<｜DSML｜{block}>\n", f"\n</｜DSML｜{block}>",
    )  # fmt: skip


DS_BEGIN, DS_END, DS_SEP = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"
DS_CALLS, DS_CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
WRITERS: dict[str, Writer] = {
    "hermes": lambda calls: "\n".join(f"<tool_call>\n{named(call)}\n</tool_call>" for call in calls),
    "mistral": listed("[TOOL_CALLS] ", ""),
    "mistral_args": each("[TOOL_CALLS]", "[ARGS]", ""),
    "mistral_ids": each("[TOOL_CALLS]", "[CALL_ID]call0000#[ARGS]", ""),
    "llama3_json": lambda calls: "; ".join(named(call, "parameters") for call in calls),
    "pythonic": pythonic("[", ", ", "]"),
    "olmo3": pythonic("<function_calls>", "\n", "</function_calls>"),
    "lfm2": pythonic("<|tool_call_start|>[", ", ", "]<|tool_call_end|>"),
    "granite": listed("<|tool_call|>", ""),
    "granite-20b-fc": lambda calls: "\n".join(f"<function_call> {named(call)}" for call in calls),
    "phi4_mini": listed("<|tool_call|>", "<|/tool_call|>"),
    "phi4_mini_json": listed("functools", ""),
    "nemotron": listed("<TOOLCALL>", "</TOOLCALL>"),
    "hunyuan_a13b": listed("<tool_calls>", "</tool_calls>"),
    "minimax_m1": lambda calls: joined(
        "<tool_calls>\n", [named(call) for call in calls], "\n", "\n</tool_calls>"
    ),
    "internlm": lambda calls: "".join(
        f"<|action_start|><|plugin|>\n{named(call)}<|action_end|>" for call in calls
    ),
    "xlam": listed("", ""),
    "cohere_command3": each(
        '{"tool_call_id": "#", "tool_name": "', '", "parameters": ', "}",
        ",\n    ", "<|START_ACTION|>[\n    ", "\n]<|END_ACTION|>",
    ),
    "cohere_command_r": each(
        '{\n        "tool_name": "', '",\n        "parameters": ', "\n    }",
        ",\n    ", "Action:\n```json\n[\n    ", "\n]\n```",
    ),
    "apertus": each('{"', '": ', "}", ", ", "<|tools_prefix|>[", "]<|tools_suffix|>"),
    "gigachat3": lambda calls: "".join(f"<|function_call|>{named(call)}" for call in calls),
    "deepseek_v3": each(
        f"{DS_BEGIN}function{DS_SEP}", "\n```json\n", f"\n```{DS_END}", "\n", DS_CALLS, DS_CALLS_END
    ),
    "deepseek_v31": each(DS_BEGIN, DS_SEP, DS_END, "", DS_CALLS, DS_CALLS_END),
    "kimi_k2": each(
        "<|tool_call_begin|>functions.", ":#<|tool_call_argument_begin|>", "<|tool_call_end|>", "",
        "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>",
    ),
    "solar_open": each(
        "<|tool_call:begin|>call0000#<|tool_call:name|>", "<|tool_call:args|>", "<|tool_call:end|>", "",
        "<|tool_calls|>",
    ),
    "functionary_v3.1": each("<function=", ">", "</function>"),
    "functionary_v3.2": each(">>>", "\n", ""),
    "glm4": each("", "\n", "", "\n"),
    "glm45": tags(
        ("<tool_call>", "", "\n</tool_call>"),
        ("\n<arg_key>", "</arg_key>\n<arg_value>", "</arg_value>"), "\n",
    ),
    "hy_v3": tags(
        ("<tool_call:opensource>", "<tool_sep:opensource>", "\n</tool_call:opensource>"),
        (
            "\n<arg_key:opensource>", "</arg_key:opensource>\n<arg_value:opensource>",
            "</arg_value:opensource>",
        ),
        "\n", "<tool_calls:opensource>\n", "\n</tool_calls:opensource>",
    ),
    "qwen3_coder": tags(
        ("<tool_call>\n<function=", ">", "\n</function>\n</tool_call>"),
        ("\n<parameter=", ">\n", "\n</parameter>"), "\n",
    ),
    "seed_oss": tags(
        ("<seed:tool_call>\n<function=", ">", "\n</function>\n</seed:tool_call>"),
        ("\n<parameter=", ">", "</parameter>"), "\n",
    ),
    "minimax_m2": tags(
        ('<invoke name="', '">', "\n</invoke>"), ('\n<parameter name="', '">', "</parameter>"), "\n",
        "<minimax:tool_call>\n", "\n</minimax:tool_call>",
    ),
    "deepseek_v32": dsml("function_calls"),
    "deepseek_v4": dsml("tool_calls"),
    "minicpm5": tags(
        ('<function name="', '">', "</function>"), ('<param name="', '">', "</param>"), "\n", value=cdata
    ),
    "gemma4": gemma("<|tool_call>", "<tool_call|>", '<|"|>'),
    "functiongemma": gemma("<start_function_call>", "<end_function_call>", "<escape>"),
}  # fmt: skip


def write(name: str, calls: Sequence[Call]) -> str:
    """Return calls as the format's templates write them."""
    return WRITERS[name](calls)
