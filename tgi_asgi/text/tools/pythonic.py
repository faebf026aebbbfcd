"""Calls written as Python: Llama 3.2 and 4, OLMo 3, LFM2."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from tgi_asgi.text.constrain.source import literal
from tgi_asgi.text.tools.arguments import ToolArguments, ToolSpec
from tgi_asgi.text.tools.base import (
    CallArguments,
    CallParser,
    CallStart,
    Mark,
    Piece,
    ToolFormat,
    alternatives,
    marked_expression,
)
from tgi_asgi.text.tools.literals import Nesting, as_json

_HEAD = re.compile(r"\[\s*[\w.-]*")
_CALL = re.compile(r"\[\s*[\w.-]+\(")
_BEFORE = re.compile(r"[\s\[,]*([\w.-]+)\(")
_IN_BEFORE = re.compile(r"[\s\[,]*[\w.-]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class PythonicFormat(ToolFormat):
    """`[f(a=1, b="x"), g()]`: values are JSON or Python literals.

    Attributes:
        head, between, tail: Texts before, between and after calls, starting after the marker.
        closers: Texts that models write after the calls.
    """

    head: str = "["
    between: str = ", "
    tail: str = "]"
    closers: tuple[str, ...] = ("]",)

    def begins(self, text: str, names: Collection[str]) -> bool | None:
        if self.marker:
            return False
        if _CALL.match(text):
            return True
        return None if _HEAD.fullmatch(text) else False

    def rules(self, tools: Sequence[ToolArguments], mark: Mark, *, is_parallel: bool) -> str:
        head, between, tail = (
            marked_expression(each, mark, self.markers) for each in (self.head, self.between, self.tail)
        )
        more = f" ({between} call)*" if is_parallel else ""
        rules = [f"calls: {head} call{more} {tail}"]
        names = [f"call_{index}" for index in range(len(tools))]
        rules.append(alternatives("call", names))
        for name, tool in zip(names, tools, strict=True):
            rules.append(f'{name}: {literal(tool.name + "(")} {name}_first_0 ")"')
            keys = ((literal(f"{key}="), tool.value(value), needed) for key, value, needed in tool.each())
            rules.extend(argument_rules(name, keys, ", "))
        return "\n".join(rules)

    def parser(self, tools: Sequence[ToolSpec]) -> CallParser:
        return _PythonicParser(tools, self.closers)


def argument_rules(rule: str, keys: Iterable[tuple[str, str, bool]], comma: str) -> list[str]:
    """Return rules for arguments in order, some of which are optional.

    `<rule>_first_0` matches all arguments. `<rule>_first_i` matches those from number i on if none came
    before, `<rule>_more_i` if one did.

    Args:
        keys: For each argument, the expressions of its beginning and of its value, and whether it is
            required.
        comma: Separator between arguments.
    """
    rules = []
    end = 0
    for index, (head, value, is_required) in enumerate(keys):
        end = index + 1
        keyword = f"{head} {value} {rule}_more_{end}"
        for place, before in (("first", ""), ("more", f"{literal(comma)} ")):
            skipped = "" if is_required else f" | {rule}_{place}_{end}"
            rules.append(f"{rule}_{place}_{index}: {before}{keyword}{skipped}")
    return [*rules, f'{rule}_first_{end}: ""', f'{rule}_more_{end}: ""']


class _PythonicParser:
    """A parser that emits a call's arguments once the call is complete."""

    def __init__(self, tools: Sequence[ToolSpec], closers: Sequence[str]) -> None:
        self.rest: str | None = None
        self._closers = closers
        self._names = {tool.name for tool in tools}
        self._buffer = ""
        self._name: str | None = None  # of the call whose arguments are being read
        self._has_called = False
        self._nesting = Nesting()

    def push(self, text: str) -> list[Piece]:
        """Return the pieces in the next part of the text."""
        pieces: list[Piece] = []
        for at, character in enumerate(text):
            self._buffer += character
            if self._name is not None:
                if self._nesting.push(character) < 0:
                    pieces.append(CallArguments(_to_json(self._buffer[:-1])))
                    self._buffer, self._name = "", None
            elif found := _BEFORE.fullmatch(self._buffer):
                if found[1] in self._names:
                    pieces.append(CallStart(found[1]))
                    self._buffer, self._name, self._nesting = "", found[1], Nesting()
                    self._has_called = True
                elif found[1] is not None:
                    self._give_up(text[at + 1 :])
            elif self._has_called and any(each.startswith(self._buffer.strip()) for each in self._closers):
                if self._buffer.strip() in self._closers:
                    self._buffer = ""
            elif not _IN_BEFORE.fullmatch(self._buffer):
                self._give_up(text[at + 1 :])
            if self.rest is not None:
                break
        return pieces

    def finish(self) -> str:
        """Return the text that resembled a call but is none; nothing of a call that has begun."""
        if self._name is not None:
            return ""
        return self._buffer.strip(" ,\n") if self._has_called else self._buffer

    def _give_up(self, text: str) -> None:
        self.rest = (self._buffer.lstrip(" ,\n") if self._has_called else self._buffer) + text
        self._buffer = ""


def _to_json(arguments: str) -> str:
    """Turn `a=1, b=[true, None]` into a JSON object; JSON values are kept as written."""
    nesting, values, start = Nesting(), [], 0
    text = f"{arguments},"
    for index, character in enumerate(text):
        if nesting.push(character) == 0 and character == ",":
            name, equals, value = text[start:index].partition("=")
            if equals:
                values.append(f"{json.dumps(name.strip(), ensure_ascii=False)}: {_json_value(value.strip())}")
            start = index + 1
    return "{" + ", ".join(values) + "}"


def _json_value(text: str) -> str:
    """Return a value as JSON; a value that is neither JSON nor Python becomes a string."""
    written = as_json(text)
    return json.dumps(text, ensure_ascii=False) if written is None else written
