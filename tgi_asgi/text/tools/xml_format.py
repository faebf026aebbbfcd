"""Calls written as tags, with one tag per argument and values that are plain text instead of JSON strings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from tgi_asgi.text.constrain.source import literal
from tgi_asgi.text.tools.arguments import ToolArguments, ToolSpec
from tgi_asgi.text.tools.base import CallParser, Mark, ToolFormat, alternatives, marked_expression
from tgi_asgi.text.tools.xml_calls import XmlCallParser, XmlTags, choices, is_text

_ANY = r"/(.|\n)*/"


@dataclass(frozen=True, slots=True, kw_only=True)
class XmlFormat(ToolFormat):
    """Calls as tags. Each text is written as templates do; the parser ignores blanks between tags.

    Attributes:
        call: Texts before a call's name, after the name, and after the arguments.
        argument: Texts before an argument's name, before its value, and after the value; `%t` is "true" if
            the value is text, otherwise "false".
        quotes: Texts around a value that is text, or around every value.
        quotes_all: Whether `quotes` go around every value.
        head, between, tail: Texts before, between and after calls, starting after the marker.
        wraps: Tags around calls that models omit, write twice, or write instead of the marker.
    """

    call: tuple[str, str, str]
    argument: tuple[str, str, str]
    quotes: tuple[str, str] = ("", "")
    quotes_all: bool = True
    head: str = ""
    between: str = ""
    tail: str = ""
    wraps: tuple[str, ...] = ()

    def rules(self, tools: Sequence[ToolArguments], mark: Mark, *, is_parallel: bool) -> str:
        spell = partial(marked_expression, mark=mark, markers=self.markers)
        more = f" ({spell(self.between)} call)*" if is_parallel else ""
        names = [f"call_{index}" for index in range(len(tools))]
        lines = [f"calls: {spell(self.head)} call{more} {spell(self.tail)}", alternatives("call", names)]
        for name, tool in zip(names, tools, strict=True):
            arguments = [self._argument(tool, *each, spell) for each in tool.each()]
            before, middle, behind = self.call
            lines.append(
                f"{name}: {spell(before + tool.name + middle)} {' '.join(arguments)} {spell(behind)}"
            )
        if any("text_value" in line for line in lines):
            lines += self._text_value(spell)
        return "\n".join(lines)

    def _argument(
        self, tool: ToolArguments, key: str, schema: Any, is_required: bool, spell: Callable[[str], str]
    ) -> str:
        before, middle, behind = self.argument
        is_string = is_text(schema)
        begin, end = self.quotes if is_string or self.quotes_all else ("", "")
        kind = "true" if is_string or choices(schema) else "false"
        value = "text_value" if is_string else f"({_value(schema, tool)}) {spell(end + behind)}"
        written = f"{spell(before)} {literal(key)} {spell(middle.replace('%t', kind) + begin)} {value}"
        return written if is_required else f"({written})?"

    def _text_value(self, spell: Callable[[str], str]) -> list[str]:
        """Return the rules of a text value, which ends at a special token, or else at the first end text."""
        end = self.quotes[1] + self.argument[2]
        if "<[" not in spell(end):
            return [f"text_value[lazy]: {_ANY} {literal(end)}"]
        # The text before the token belongs to the value, too: the grammar cannot separate the two.
        return [f"text_value: TEXT_VALUE {spell(end)[spell(end).index('<[') :]}", f"TEXT_VALUE: {_ANY}"]

    def parser(self, tools: Sequence[ToolSpec]) -> CallParser:
        wraps = self.wraps or (self.marker,)
        call, argument = (_bare(texts) for texts in (self.call, self.argument))
        return XmlCallParser(tools, XmlTags(call, argument, wraps, self.quotes))


def _bare(texts: tuple[str, str, str]) -> tuple[str, str, str]:
    """Return a format's texts without the blanks that its templates write."""
    before, middle, behind = (text.replace("%n", "").strip() for text in texts)
    return before, middle, behind


def _value(schema: Any, tool: ToolArguments) -> str:
    texts = choices(schema)
    return " | ".join(map(literal, texts)) if texts else tool.value(schema)
