"""Calls written as tags, with one tag per argument and values that are plain text instead of JSON strings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import starmap
from typing import Any

from tgi_asgi.text.constrain.source import literal
from tgi_asgi.text.surrogates import dumped
from tgi_asgi.text.tools.arguments import ToolArguments, ToolSpec
from tgi_asgi.text.tools.base import (
    CallParser,
    Mark,
    ToolFormat,
    WrittenCall,
    alternatives,
    begun_text,
    free_name,
    marked_expression,
    plain_text,
)
from tgi_asgi.text.tools.plain_values import PlainTexts
from tgi_asgi.text.tools.value_forms import forms_of
from tgi_asgi.text.tools.xml_calls import XmlCallParser, XmlTags

_NAME = r'[^<>"\s]([^<>"\n]{0,126}[^<>"\s])?'  # of an argument that is not listed, as the parser reads it


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
        before, middle, behind = map(spell, self.call)
        more = f" ({spell(self.between)} {before} named)*" if is_parallel else ""
        names = [f"call_{index}" for index in range(len(tools))]
        lines = [
            f"calls: {spell(self.head)} {before} begun",
            f"begun: named{more} {spell(self.tail)}",
            alternatives("named", names),
        ]
        end = self.argument[2] if self._ends_line else self.quotes[1] + self.argument[2]
        texts = PlainTexts(end, spell, self.quotes[1] if self._ends_line else "")
        for index, (name, tool) in enumerate(zip(names, tools, strict=True)):
            listed = list(tool.each())
            arguments = [
                self._argument(tool, literal(key), schema, is_required, texts)
                for key, schema, is_required in listed
            ]
            if (others := tool.others()) is not None:
                lines.append(f"FREE_{index}: {free_name(_NAME, [key for key, *_ in listed])}")
                arguments.append(f"({self._argument(tool, f'FREE_{index}', others, True, texts)})*")
            lines.append(f"{name}: {literal(tool.name)} {middle} {' '.join(arguments)} {behind}")
        return "\n".join(lines + texts.rules)

    @property
    def begun(self) -> str:
        return begun_text(self.head + self.call[0])

    @property
    def _ends_line(self) -> bool:
        """Whether values are on lines of their own, of which models may omit the end."""
        return self.quotes[1].isspace()

    def _argument(
        self, tool: ToolArguments, key: str, schema: Any, is_required: bool, texts: PlainTexts
    ) -> str:
        (before, middle, behind), spell = self.argument, texts.spell
        forms = forms_of(schema, tool.definition)
        values = []
        if forms.texts:
            value = texts.expression(forms, tool, is_named="%t" in middle or not self.quotes_all)
            values.append(f"{spell(middle.replace('%t', 'true') + self.quotes[0])} ({value})")
        if forms.others:
            begin, end = self.quotes if self.quotes_all else ("", "")
            head, value = spell(middle.replace("%t", "false") + begin), tool.others_of(forms)
            values.append(f"{head} ({value}) {spell(end + behind)}")
        written = f"{spell(before)} {key} ({' | '.join(values)})"
        return written if is_required else f"({written})?"

    def written(self, calls: Sequence[WrittenCall]) -> str:
        before, middle, behind = map(plain_text, self.call)
        texts = (
            f"{before}{name}{middle}{''.join(starmap(self._written, arguments.items()))}{behind}"
            for name, arguments in calls
        )
        head, between, tail = map(plain_text, (self.head, self.between, self.tail))
        return self.marker + head + between.join(texts) + tail

    def _written(self, key: str, value: Any) -> str:
        before, middle, behind = (
            text.replace("%t", dumped(isinstance(value, str))) for text in map(plain_text, self.argument)
        )
        begin, end = self.quotes if self.quotes_all or isinstance(value, str) else ("", "")
        text = value if isinstance(value, str) else dumped(value)
        return f"{before}{key}{middle}{begin}{text}{end}{behind}"

    def parser(self, tools: Sequence[ToolSpec]) -> CallParser:
        wraps = self.wraps or (self.marker,)
        call, argument = (_bare(texts) for texts in (self.call, self.argument))
        return XmlCallParser(tools, XmlTags(call, argument, wraps, self.quotes))


def _bare(texts: tuple[str, str, str]) -> tuple[str, str, str]:
    """Return a format's texts without the blanks that its templates write."""
    before, middle, behind = (text.replace("%n", "").strip() for text in texts)
    return before, middle, behind
