"""Calls written as tags, with one tag per argument and values that are plain text instead of JSON strings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
    alternatives,
    begun_text,
    free_name,
    marked_expression,
    plain_text,
)
from tgi_asgi.text.tools.plain_values import PlainTexts, Then
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
        wraps: Tags around calls that models omit, write twice, or write instead of the marker.
    """

    call: tuple[str, str, str]
    argument: tuple[str, str, str]
    quotes: tuple[str, str] = ("", "")
    quotes_all: bool = True
    wraps: tuple[str, ...] = ()

    def rules(self, tools: Sequence[ToolArguments], mark: Mark, *, is_parallel: bool) -> str:
        spell = partial(marked_expression, mark=mark, markers=self.markers)
        before, middle, _ = map(spell, self.call)
        more = f" ({spell(self.between)} {before} named)*" if is_parallel else ""
        names = [f"call_{index}" for index in range(len(tools))]
        lines = [
            f"calls: {spell(self.head)} {before} begun",
            f"begun: named{more} {spell(self.tail)}",
            alternatives("named", names),
        ]
        for name, tool in zip(names, tools, strict=True):
            lines.append(f"{name}: {literal(tool.name)} {middle} {name}_0")
        texts = self._texts(spell)
        for name, tool in zip(names, tools, strict=True):
            lines += self._arguments(name, tool, texts)
        return "\n".join(lines + texts.rules)

    @property
    def begun(self) -> str:
        return begun_text(self.head + self.call[0])

    def _texts(self, spell: Callable[[str], str]) -> PlainTexts:
        quote, end = self.quotes[1], self.argument[2]
        if not quote.isspace():
            return PlainTexts(quote + end, spell)
        return PlainTexts(end, spell, quote, (self.argument[0].strip(), self.call[2].strip()))

    def _arguments(self, rule: str, tool: ToolArguments, texts: PlainTexts) -> list[str]:
        """Return rules for a tool's arguments in order, some of which are optional, and the call's end.

        `<rule>_i` matches everything from argument number i on, `<rule>_open_i` the same after the first tag
        of an argument.
        """
        before, behind = texts.spell(self.argument[0]), texts.spell(self.call[2])
        listed, others = list(tool.each()), tool.others()
        end = len(listed)
        rules = [f"{rule}_{end}: {behind}"]
        opened = None
        if others is not None:
            opened, free = f"{rule}_open_{end}", f"FREE_{rule.upper()}"
            value = self._value(tool, others, texts, Then(f"{rule}_{end}", opened, may_end=True))
            rules = [
                f"{free}: {free_name(_NAME, [key for key, *_ in listed])}",
                f"{opened}: {free} {value}",
                f"{rule}_{end}: {behind} | {before} {opened}",
            ]
        may_end = True
        for index in reversed(range(end)):
            key, schema, is_required = listed[index]
            value = self._value(tool, schema, texts, Then(f"{rule}_{index + 1}", opened, may_end))
            own = f"{rule}_own_{index}"
            skipped = [] if is_required else [f"{rule}_{index + 1}"]
            rules.append(f"{own}: {literal(key)} {value}")
            rules.append(alternatives(f"{rule}_{index}", [f"{before} {own}", *skipped]))
            if texts.are_on_lines:
                skipped = [] if is_required or opened is None else [opened]
                opened = f"{rule}_open_{index}"
                rules.append(alternatives(opened, [own, *skipped]))
            may_end = may_end and not is_required
        return rules

    def _value(self, tool: ToolArguments, schema: Any, texts: PlainTexts, then: Then) -> str:
        """Return the expression of an argument's value after its name, and of what follows it."""
        (_, middle, behind), spell = self.argument, texts.spell
        forms = forms_of(schema, tool.resolve)
        is_named = "%t" in middle or not self.quotes_all
        values = []
        if forms.texts:
            value = texts.expression(forms, tool, then, is_named=is_named)
            values.append(f"{spell(middle.replace('%t', 'true') + self.quotes[0])} ({value})")
        if forms.others and (is_named or not forms.are_all_plain):
            begin, end = (self.quotes[0], texts.end) if self.quotes_all else ("", spell(behind))
            head, value = spell(middle.replace("%t", "false") + begin), tool.others_of(forms)
            values.append(f"{head} ({value}) {end} {then.rest}")
        return f"({' | '.join(values)})"

    def written_call(self, number: int, name: str, arguments: Mapping[str, Any]) -> str:
        before, middle, behind = map(plain_text, self.call)
        return f"{before}{name}{middle}{''.join(starmap(self._written, arguments.items()))}{behind}"

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
