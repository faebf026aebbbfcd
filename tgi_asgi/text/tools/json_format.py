"""Calls whose arguments are a JSON object, with any text around it; most families' format."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from tgi_asgi.text.constrain.plain_strings import escaped
from tgi_asgi.text.constrain.source import literal
from tgi_asgi.text.surrogates import dumped
from tgi_asgi.text.tools.arguments import ToolArguments, ToolSpec
from tgi_asgi.text.tools.base import (
    CallParser,
    Mark,
    ToolFormat,
    alternatives,
    bare_rules,
    begun_text,
    marked_expression,
    plain_text,
)
from tgi_asgi.text.tools.json_calls import NAMED, JsonCallParser

OBJECT = ('{"name": "', '", "arguments": ', "}")
PARAMETERS = ('{"name": "', '", "parameters": ', "}")


@dataclass(frozen=True, slots=True, kw_only=True)
class JsonFormat(ToolFormat):
    """A sequence of calls: `head`, a call, `between`, a call, ..., `tail`.

    Attributes:
        call: Texts before a call's name, between name and arguments, and after the arguments.
        inner: Texts that models write before each call, after the marker.
        closers: Texts that models write after a call, or after the last one.
        object_head: Beginning of a call that is an object: group 1 is the name, group 2 the start of the
            arguments.
        name_head: Beginning of a call that is not an object, if there are such calls.
    """

    call: tuple[str, str, str] = OBJECT
    inner: tuple[str, ...] = ()
    closers: tuple[str, ...] = ()
    object_head: re.Pattern[str] = NAMED
    name_head: re.Pattern[str] | None = None

    def rules(self, tools: Sequence[ToolArguments], mark: Mark, *, is_parallel: bool) -> str:
        spell = partial(marked_expression, mark=mark, markers=self.markers)
        before, middle, behind = map(spell, self.call)
        named = [f"{literal(tool.name)} {middle} {tool.whole()} {behind}" for tool in tools]
        more = f" ({spell(self.between)} {before} named)*" if is_parallel else ""
        return "\n".join(
            [
                f"calls: {spell(self.head)} {before} begun",
                f"begun: named{more} {spell(self.tail)}",
                alternatives("named", named),
            ]
        )

    @property
    def begun(self) -> str:
        return begun_text(self.head + self.call[0])

    def written_call(self, number: int, name: str, arguments: Mapping[str, Any]) -> str:
        before, middle, behind = (plain_text(text, number) for text in self.call)
        return f"{before}{name}{middle}{dumped(arguments)}{behind}"

    def parser(self, tools: Sequence[ToolSpec]) -> CallParser:
        return JsonCallParser(
            tools,
            openers=[each for each in (self.marker, *self.openers, *self.inner) if each],
            closers=self.closers,
            head=self.name_head,
            object_head=self.object_head,
            is_bare=not self.marker,
        )


# Text before and after the name that distinguishes a call from other JSON, without blanks.
_OPENING = '{"name":"'
_ARGUMENTS = (',"parameters":{', ',"arguments":{')


@dataclass(frozen=True, slots=True, kw_only=True)
class BareJsonFormat(JsonFormat):
    """Calls without a marker: an answer that begins with a call is calls, as a list if `head` is "[".

    Any other JSON is text, also an object whose `name` is that of no tool.
    """

    def openings(self, names: Iterable[str]) -> list[str]:
        return [self._opening(name) for name in names]

    def _opening(self, name: str) -> str:
        return "".join(rf"\s*{escaped(lexeme)}" for lexeme in _lexemes(f'{self.head}{self.call[0]}{name}"'))

    def rules_beside_text(self, tools: Sequence[ToolArguments], *, is_parallel: bool) -> str:
        openings = self.openings(tool.name for tool in tools)
        return bare_rules(self, *self._parts(tools, literal), is_parallel=is_parallel, openings=openings)

    def rules_beside_json(self, tools: Sequence[ToolArguments], mark: Mark, *, is_parallel: bool) -> str:
        return bare_rules(self, *self._parts(tools, _compact), is_parallel=is_parallel)

    def _parts(
        self, tools: Sequence[ToolArguments], spell: Callable[[str], str]
    ) -> tuple[str, list[str], list[str]]:
        """Return the expressions of what precedes all calls, of each tool's name, and of the rest."""
        before, middle, behind = self.call
        begun = [spell(f'{before}{tool.name}"') for tool in tools]
        rests = [f"{spell(middle[1:])} {tool.whole()} {literal(behind)}" for tool in tools]
        return spell(self.head) if self.head else "", begun, rests

    def begins(self, text: str, names: Collection[str]) -> bool | None:
        squeezed = "".join(text.split())
        opening = self.head + _OPENING
        if not squeezed.startswith(opening):
            return None if opening.startswith(squeezed) else False
        name, quote, rest = squeezed[len(opening) :].partition('"')
        if not quote:
            return None if any(each.startswith(name) for each in names) else False
        if name in names and any(head.startswith(rest) and head != rest for head in _ARGUMENTS):
            return None
        return name in names and rest.startswith(_ARGUMENTS)


def _lexemes(text: str) -> list[str]:
    """Return the lexemes of a part of a JSON text."""
    return re.findall(r'"[^"]*"|[^"\s]', text)


def _compact(text: str) -> str:
    """Return a part of a JSON text as an expression of the same lexemes as other JSON, without blanks."""
    return " ".join(map(literal, _lexemes(text)))


@dataclass(frozen=True, slots=True, kw_only=True)
class BareNameFormat(JsonFormat):
    """Calls without a marker that begin with their name: an answer that begins with a tool's is one."""

    def openings(self, names: Iterable[str]) -> list[str]:
        return [] if self.marker else [escaped(name + self.call[1]) for name in names]

    def rules_beside_text(self, tools: Sequence[ToolArguments], *, is_parallel: bool) -> str:
        begun = [literal(tool.name + self.call[1]) for tool in tools]
        rests = [tool.whole() for tool in tools]
        openings = self.openings(tool.name for tool in tools)
        return bare_rules(self, "", begun, rests, is_parallel=is_parallel, openings=openings)

    @property
    def may_begin(self) -> bool:
        return True

    def begins(self, text: str, names: Collection[str]) -> bool | None:
        middle = self.call[1]
        for name in names:
            opening = f"{name}{middle}{{"
            if text.startswith(opening):
                return True
            if opening.startswith(text):
                return None
        return False
