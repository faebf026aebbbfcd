"""Grammar of calls written as Python: Llama 3.2 and 4, OLMo 3, LFM2."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
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
    argument_rules,
    bare_rules,
    free_name,
    marked_expression,
)
from tgi_asgi.text.tools.pythonic_calls import PythonicCallParser

# Bounded, because all of an answer's beginning is matched again after each token.
_HEAD = re.compile(r"\[\s{0,64}[\w.-]{0,128}")
_CALL = re.compile(r"\[\s{0,64}[\w.-]{1,128}\(")
_NAME = "[a-zA-Z_][a-zA-Z0-9_]{0,126}"  # of an argument that is not listed


@dataclass(frozen=True, slots=True, kw_only=True)
class PythonicFormat(ToolFormat):
    """`[f(a=1, b="x"), g()]`: values are JSON or Python literals.

    Attributes:
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
        begun, rests, arguments = self._parts(tools)
        calls = [f"{each} {rest}" for each, rest in zip(begun, rests, strict=True)]
        return "\n".join([f"calls: {head} call{more} {tail}", alternatives("call", calls), *arguments])

    def openings(self, names: Iterable[str]) -> list[str]:
        return [] if self.marker else [rf"\s*\[\s*{escaped(name)}\(" for name in names]

    def rules_beside_text(self, tools: Sequence[ToolArguments], *, is_parallel: bool) -> str:
        begun, rests, arguments = self._parts(tools)
        openings = self.openings(tool.name for tool in tools)
        calls = bare_rules(self, self.head, begun, rests, is_parallel=is_parallel, openings=openings)
        return "\n".join([calls, *arguments])

    @staticmethod
    def _parts(tools: Sequence[ToolArguments]) -> tuple[list[str], list[str], list[str]]:
        """Return each tool's name as an expression, what follows it, and the rules of arguments."""
        begun = [literal(f"{tool.name}(") for tool in tools]
        rests = [f'arguments_{index}_first_0 ")"' for index in range(len(tools))]
        rules = []
        for index, tool in enumerate(tools):
            listed = list(tool.each())
            keys = [(literal(f"{key}="), tool.value(value), needed) for key, value, needed in listed]
            free = None
            if (others := tool.others()) is not None:
                free = f'FREE_{index} "=" {tool.value(others)}'
                rules.append(f"FREE_{index}: {free_name(_NAME, [key for key, *_ in listed])}")
            rules += argument_rules(f"arguments_{index}", keys, ", ", free)
        return begun, rests, rules

    def written_call(self, number: int, name: str, arguments: Mapping[str, Any]) -> str:
        return f"{name}({', '.join(f'{key}={dumped(value)}' for key, value in arguments.items())})"

    def parser(self, tools: Sequence[ToolSpec]) -> CallParser:
        return PythonicCallParser(tools, self.closers)
