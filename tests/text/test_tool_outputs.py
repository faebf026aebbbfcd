"""Real outputs of models at the position of a call, from other servers' issue trackers.

If an output can be a call, it becomes one; otherwise it stays text. Nothing is lost, and the result does not
depend on how the text was cut into pieces.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.tool_calls import TWO_CALLS, parse
from tgi_asgi.text.tools import FORMATS, CallArguments, CallStart, Content, Piece, Reasoning, ToolSpec
from tgi_asgi.text.tools.answer import AnswerParser
from tgi_asgi.text.tools.reasoning import STYLES

# ruff: noqa: RUF001, E501  # the bars are DeepSeek's own; each output is on one line
PROPERTIES = {"a": {"type": "integer"}, "s": {"type": "string"}, "o": {"type": "object"}}
SPECS = [ToolSpec("f", {"properties": PROPERTIES}), ToolSpec("g", None), ToolSpec("math.add", None)]
F = ("f", {"a": 1})
G: tuple[str, Any] = ("g", {})
BEGIN, END, SEP = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"
CALLS, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"

# format: [(output, the expected result: texts and calls)]
OUTPUTS: dict[str, list[tuple[str, list[Any]]]] = {
    "hermes": [
        ('<tool_call>{"name":"f","arguments":{"a":1}}</tool_call>', [F]),
        ('<tool_call>\n{ "name" : "f" , "arguments" : { "a" : 1 } }\n', [F]),
        ('<tool_call>\n{"name": "f", "parameters": {"a": 1}}\n</tool_call>', [F]),
        ('<tool_call>\n{"name": "f", "arguments": "{\\"a\\": 1}"}\n</tool_call>', [F]),
        ('<tool_call>\n{"name": "g", "arguments": ""}\n</tool_call>', [G]),
        ('<tool_call>\n{"name": "g", "arguments": null}\n</tool_call>', [G]),
        ('<tool_call>\n{"name": "g"}\n</tool_call>', [G]),
        ('See\n<tool_call>\n{"name": "g"}\n</tool_call>\n\n ok bye', ["See", G, " ok bye"]),
        ('<tool_call>\n{"name": "g"}\n</tool_call>\n\nok bye \n', [G, "ok bye \n"]),
        ('See <tool_call>\n{"name": "g"}\n</tool_call>\n\n<tool_call>\n{"name": "g"}\n</tool_call>\n', ["See", G, G]),
        ('<tool_call>\n{"arguments": {"s": "\\ud83d"}, "name": "f"}\n</tool_call>', [("f", {"s": "\ud83d"})]),
        ('<tool_call>\n{"arguments": {"a": 1}, "name": "f"}\n</tool_call>', [F]),
        ('<tool_call>\n{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}\n</tool_call>', [F]),
        ("<tool_call>\n{'name': 'f', 'arguments': {'a': 1, 's': None}}\n</tool_call>", [("f", {"a": 1, "s": None})]),
        ('<tool_call>\n{"arguments": {"a": 1,}, "name": "f",}\n</tool_call>', [F]),
        ('<tool_call>\n```json\n{"name": "f", "arguments": {"a": 1}}\n```\n</tool_call>', [F]),
        ('<tool_call>\n[{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]\n</tool_call>', [F, G]),
        ('<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n{"name": "g", "arguments": {}}\n</tool_call>', [F, G]),
        ('<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n<tool_call>\n{"name": "g", "arguments": {}}', [F, G]),
        ('<tool_call>\n{"name": "f", "arguments": {"a": 1}}}\n</tool_call>', [F]),
        ('<tool_call>\n{"name": "f", "arguments": {"a": 1}\n</tool_call>', [F]),
        ('<tool_call>\n{"name": "f", "arguments": {"s": "</tool_call>"}}\n</tool_call>', [("f", {"s": "</tool_call>"})]),
        ('Sure.\n\n<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>\n\nDone. <b>', ["Sure.", G, "\nDone. <b>"]),
        ('```\n<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>\n```', ["```", G]),
        ('<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>\nNow:\n<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>', [G, "Now:", F]),
        ('<tool_call>\n{"name": "no", "arguments": {"a": 1}}\n</tool_call>', ['<tool_call>\n{"name": "no", "arguments": {"a": 1}}\n</tool_call>']),
        ('<tool_call>\n{"name": "no", "arguments": {}}\n</tool_call>\n<tool_call>\n{"name": "g"}\n</tool_call>', ['<tool_call>\n{"name": "no", "arguments": {}}\n</tool_call>', G]),
        ("a  <tool_call> is a marker  ", ["a  <tool_call> is a marker  "]),
        ('<tool_call>\n{"name": "g"}\n</tool_call>\na <tool_call> is a marker', [G, "a <tool_call> is a marker"]),
        ('<tool_call>\n{"name": "f"', ['<tool_call>\n{"name": "f"']),
        ("<tool_call>\n{f(a=1)}\n</tool_call>", ["<tool_call>\n{f(a=1)}\n</tool_call>"]),
        ("<tool_call></tool_call>", ["<tool_call></tool_call>"]),
        ('<tool_call>\n{"name": "math.add", "arguments": {}}\n</tool_call>', [("math.add", {})]),
    ],
    "llama3_json": [
        (' {"name": "f", "parameters": {"a": 1}} ', [F]),
        ('{"name": "f", "arguments": {"a": 1}}', [F]),
        ('{"name": "f", "parameters": {"a": 1}}; {"name": "g", "parameters": {}}', [F, G]),
        ('{"name": "f", "parameters": {"a": 1}}\n{"name": "g", "parameters": {}}', [F, G]),
        ('{"name": "f", "parameters": {"a": 1}}\n\nThis calls f.', [F, "This calls f."]),
        ('{"name": "no", "parameters": {"a": 1}}', ['{"name": "no", "parameters": {"a": 1}}']),
        ('{"name": "Ada"}', ['{"name": "Ada"}']),
    ],
    "mistral": [
        ('[TOOL_CALLS][{"name": "f", "arguments": {"a": 1}, "id": "abcdefghi"}]', [F]),
        ('[TOOL_CALLS] {"name": "f", "arguments": {"a": 1}}', [F]),
        ('[TOOL_CALLS] [{"name": "f", "arguments": "{\\"a\\": 1}"}]', [F]),
        ('[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}][TOOL_CALLS] [{"name": "g", "arguments": {}}]', [F, G]),
        ('{x [TOOL_CALLS] [{"arguments": {"a": 1}, "name": "f"}]\nDone', ["{x", F, "\nDone"]),
        ("[TOOL_CALLS] [1, 2]", ["[TOOL_CALLS] [1, 2]"]),
        ("[TOOL_CALLS] none", ["[TOOL_CALLS] none"]),
    ],
    "mistral_args": [
        ('[TOOL_CALLS]f[ARGS]{"a": 1}', [F]),
        ('[TOOL_CALLS]f{"a": 1}', [F]),
        ('[TOOL_CALLS]f[CALL_ID]abc123def[ARGS]{"a": 1}', [F]),
        ('[TOOL_CALLS] f [ARGS] {"a": 1}[TOOL_CALLS]g[ARGS]{}', [F, G]),
        ('[TOOL_CALLS][{"name": "f", "arguments": {"a": 1}}]', [F]),
        ('[TOOL_CALLS]f[ARGS]{"a": 1}\n\nLet me see.', [F, "Let me see."]),
        ('[TOOL_CALLS]no[ARGS]{"a": 1}', ['[TOOL_CALLS]no[ARGS]{"a": 1}']),
    ],
    "granite": [
        ('<|tool_call|>[{"name": "f", "arguments": {"a": 1}}]', [F]),
        ('<tool_call>[{"name": "f", "arguments": {"a": 1}}]', [F]),
        ("<tool_call>{'name': 'f', 'arguments': {'a': b'x'}}", ["<tool_call>{'name': 'f', 'arguments': {'a': b'x'}}"]),
        ('<|tool_call|>{"name": "f", "arguments": {"a": 1}}}}', [F]),
        ('<tool_call>{"arguments": {"a": 1e999}, "name": "f"}', ['<tool_call>{"arguments": {"a": 1e999}, "name": "f"}']),
        ('<|tool_call|> [{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]</tool_call>', [F, G]),
        ("<|tool_call|>[]", ["<|tool_call|>[]"]),
    ],
    "deepseek_v3": [
        (f'{CALLS}{BEGIN}function{SEP}f\n```json\n{{"a": 1}}\n```{END}{CALLS_END}', [F]),
        (f'{CALLS}{BEGIN}function{SEP}f\n{{"a": 1}}\n{END}', [F]),
        (f'{CALLS}{BEGIN}f{SEP}{{"a": 1}}{END}{BEGIN}g{SEP}{{}}{END}{CALLS_END}', [F, G]),
        (f'{CALLS}{BEGIN}function{SEP}f\n```json\n{{"a": 1}}\n```{END}{CALLS_END}\nDone.', [F, "Done."]),
        (f"{CALLS}{BEGIN}function{SEP}no\n```json\n{{}}\n```{END}", [f"{CALLS}{BEGIN}function{SEP}no\n```json\n{{}}\n```{END}"]),
        (f"{CALLS}{CALLS_END}", [f"{CALLS}{CALLS_END}"]),
    ],
    "deepseek_v31": [
        (f'{CALLS}{BEGIN}function{SEP}f\n```json\n{{"a": 1}}\n```{END}{CALLS_END}', [F]),
        (f'{CALLS}{BEGIN}f{SEP}\n{{"a": 1}}', [F]),
        (f"a {CALLS} b", [f"a {CALLS} b"]),
    ],
    "qwen3_coder": [
        ("<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>", [F]),
        ("I look.\n\n<function=f>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>", ["I look.", F]),
        ("<tool_call><function=f><parameter=a>1</parameter></function></tool_call>", [F]),
        ("<function=f><parameter=a>NaN</parameter><parameter=o>{'a': Infinity}</parameter></function>", [("f", {"a": "NaN", "o": "{'a': Infinity}"})]),
        ("<tool_call>\n<function=f>\n<parameter=s>\nx\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>", [("f", {"s": "x", "a": 1})]),
        ("<tool_call>\n<function=f>\n<parameter=s>\nx\n</function>\n</tool_call>", [("f", {"s": "x"})]),
        ("Write <function=f> before the parameters. That is all.", ["Write <function=f> before the parameters. That is all."]),
        ('<function=f>{"a": 1}</function>', ['<function=f>{"a": 1}</function>']),
        ("a <function=f>", ["a <function=f>"]),
        ("<tool_call>\n<function=g>\n</tool_call>", [G]),
        ("<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n</tool_call>", [F]),
        ("<tool_call>\n<function=f>\n<parameter=s>\n<parameter=x>\n</fun\n</parameter>\n</function>\n</tool_call>", [("f", {"s": "<parameter=x>\n</fun"})]),
        ("<tool_call>\n<function=f>\n<parameter=o>\n{'k': [True]}\n</parameter>\n</function>\n</tool_call>", [("f", {"o": {"k": [True]}})]),
        ("<function=f>\n<parameter=a>\n1\n</parameter>\n</function>\n<function=g>\n</function>\nDone", [F, G, "Done"]),
        ("<tool_call>\n<function=no>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>", ["<tool_call>\n<function=no>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>"]),
        ("<tool_call>\n```xml\n<function=g>\n</function>\n```\n</tool_call>", [G]),
        ("<tool_call>\n```\n<function=g>\n</function>\n```\n</tool_call>\nDone", [G, "Done"]),
        ("<tool_call>\n```x", ["<tool_call>\n```x"]),
        ("<tool_call>\n<func", ["<tool_call>\n<func"]),
        ("a <function is", ["a <function is"]),
    ],
    "pythonic": [
        ("[f(a=1)]", [F]),
        (" [ f( a = 1 ), g() ] ", [F, G]),
        ("[f(a=1)]\nDone.", [F, "Done."]),
        ("[f(a=1), g(", [F, ("g", None)]),
        ("[math.add(), f(s='it\\'s', o={'k': None})]", [("math.add", {}), ("f", {"s": "it's", "o": {"k": None}})]),
        ('[f("x, y", a=1, **{"b": 2})]', [F]),
        ("""[f(a=' ' "b" , s='')]""", [("f", {"a": " b", "s": ""})]),
        (r'''[f(a="""x "y" z""", s=r'\d')]''', [("f", {"a": 'x "y" z', "s": r"\d"})]),
        ('[f(a="the "best" one", s="5" tall")]', [("f", {"a": 'the "best" one', "s": '5" tall'})]),
        (r"[f(s='\x41\033[0m\N{DIGIT ONE}\d\/\xg\U00110000')]", [("f", {"s": "A\033[0m1" r"\d\/\xg\U00110000"})]),
        ("[f(s='a\\\nb\n', a=\"\\/\\'\\t\")]", [("f", {"s": "ab\n", "a": "/'\t"})]),
        (r"[f(s='\ud83d\ude42', a=['\ud83d'])]", [("f", {"s": "🙂", "a": ["\ud83d"]})]),
        ("[no(a=1)]", ["[no(a=1)]"]),
        ("[1, 2]", ["[1, 2]"]),
    ],
    "gemma4": [
        # A client may name arguments so that the names contain the format's quotes.
        ('<|tool_call>call:f{<|"|>:1,s:<|"|>:1}<|"|>}<tool_call|>', [("f", {'<|"|>': 1, "s": ":1}"})]),
        ('<|tool_call>call:f{s:<|"|>x,y<|"|>,a:1}<tool_call|>', [("f", {"s": "x,y", "a": 1})]),
        ('<|tool_call>call:f{x{1}:1,"a" : 1 , o:{}, l:[ ]}<tool_call|>', [("f", {"x{1}": 1, "a": 1, "o": {}, "l": []})]),
        ('<|tool_call>call:f{l:[1,[2,{a:<|"|>]}<|"|>}}<tool_call|>', [("f", {"l": [1, [2, {"a": "]}"}]]})]),
        ("<|tool_call>call:f{a:1],b:{},c}<tool_call|>", [("f", {"a": 1, "b": {}})]),
        (r'<|tool_call>call:f{s:"a\"},:é",b:[None, 1.50]}<tool_call|>', [("f", {"s": 'a"},:é', "b": [None, 1.5]})]),
        (r'<|tool_call>call:f{s:"a\d",b:5",c:"6}<tool_call|>x', [("f", {"s": r"a\d", "b": '5"', "c": '"6'}), "x"]),
        ("<|tool_call>call:f{<tool_call|>}<tool_call|>Done.", [("f", {}), "Done."]),
    ],
}  # fmt: skip
CASES = [(name, text, wanted) for name, outputs in OUTPUTS.items() for text, wanted in outputs]


def texts_and_calls(pieces: list[Piece]) -> list[Any]:
    """Return texts and calls; the arguments of an incomplete call are None."""
    result: list[Any] = []
    for piece in pieces:
        if isinstance(piece, CallStart):
            result.append((piece.name, None))
        elif isinstance(piece, CallArguments):
            result[-1] = (result[-1][0], json.loads(piece.text.encode()))
        else:
            result.append(piece.text)
    return result


@pytest.mark.parametrize(("name", "text", "wanted"), CASES)
def test_what_models_write_is_read_however_it_is_cut(name: str, text: str, wanted: list[Any]) -> None:
    for size in range(1, len(text) + 1):
        assert texts_and_calls(parse(AnswerParser(None, FORMATS[name], SPECS), text, size)) == wanted, size


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_calls_follow_reasoning_and_are_none_within_it(name: str) -> None:
    text = f"<think>{TWO_CALLS[name]}</think>\n\n{TWO_CALLS[name]}"
    for size in (1, 7, len(text)):
        reasoning, *rest = parse(AnswerParser(STYLES[0], FORMATS[name], SPECS), text, size)
        assert reasoning == Reasoning(TWO_CALLS[name])
        assert texts_and_calls(rest) == [("f", {"a": 1, "s": '}"<'}), G]


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_a_cut_answer_loses_no_text_and_ends_no_call(name: str) -> None:
    text = TWO_CALLS[name]
    for end in range(len(text)):
        pieces = parse(AnswerParser(None, FORMATS[name], SPECS), text[:end], 3)
        calls = [piece for piece in pieces if isinstance(piece, CallStart)]
        assert len(calls) <= text[:end].count("f") + text[:end].count("g")
        if not calls:
            assert "".join(piece.text for piece in pieces if isinstance(piece, Content)) == text[:end]


FRAGMENTS = ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|tool_call|>", "<function=f>", "</function>",
    "<parameter=a>", "</parameter>", CALLS, BEGIN, END, SEP, CALLS_END, "```json", "```", '{"name": "f", "arguments": ',
    '{"a": 1}', "{'a': 1}", "}", "]", "[", "f", "(", ")", "a=1", ", ", "\n", " ", "text", '"', "\\", "é"]  # fmt: skip


@given(st.lists(st.sampled_from(FRAGMENTS) | st.integers(0, 5), max_size=14), st.integers(1, 40))
@settings(max_examples=60)
def test_no_junk_fails_and_no_cut_changes_what_is_read(fragments: list[str | int], size: int) -> None:
    """A number stands for one of a format's own markers. All formats get the same junk, for it takes long to make."""
    for name, form in FORMATS.items():
        own = form.markers or (form.marker, "f")
        text = "".join(own[each % len(own)] if isinstance(each, int) else each for each in fragments)
        whole = parse(AnswerParser(None, form, SPECS), text, max(1, len(text)))
        assert parse(AnswerParser(None, form, SPECS), text, size) == whole, name
        if not any(isinstance(piece, CallStart) for piece in whole):
            assert "".join(piece.text for piece in whole if isinstance(piece, Content)) == text, name


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_each_piece_of_content_says_where_it_stands(name: str) -> None:
    text = f"{TWO_CALLS[name]}\n\nDone, said f."
    parser = AnswerParser(None, FORMATS[name], SPECS)
    pieces = [
        piece for at in range(0, len(text), 5) for piece in parser.push(text[at : at + 5])
    ] + parser.finish()
    contents = [piece for piece in pieces if isinstance(piece, Content)]
    assert "".join(piece.text for piece in contents) == "Done, said f."
    assert all(text.startswith(piece.text, piece.start) for piece in contents)
