"""The grammar of values of tag formats: texts without quotes, which end before a mark, and JSON."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tgi_asgi.text.constrain.plain import ANY, escaped, without
from tgi_asgi.text.constrain.source import literal
from tgi_asgi.text.tools.arguments import ToolArguments
from tgi_asgi.text.tools.literals import as_json
from tgi_asgi.text.tools.value_forms import Forms


class PlainTexts:
    """The expressions of one grammar's texts, each with the mark after it, and the rules that they need.

    Args:
        end: Mark after a text.
        spell: Writes a mark as an expression.
        line: What templates write between a text and the mark, and models may omit.
    """

    def __init__(self, end: str, spell: Callable[[str], str], line: str = "") -> None:
        self.spell, self._end, self._line = spell, end, line
        before, token, after = spell(end).partition("<[")
        # If the mark has a special token, the grammar cannot separate a text from what precedes the token.
        self._before = before.strip() if token else literal(end)
        self._after = token + after
        self._names: dict[str, str] = {}  # of rules, without their names

    @property
    def rules(self) -> list[str]:
        """The rules that the expressions so far need."""
        return [name + rule for rule, name in self._names.items()]

    def expression(self, forms: Forms, tool: ToolArguments, *, is_named: bool) -> str:
        """Return the expression of a value that is a text.

        Args:
            is_named: Whether something beside the value says that it is a text.
        """
        not_first = "" if is_named else forms.not_first()
        return " | ".join(self._text(schema, not_first, tool) for schema in forms.texts)

    def _text(self, schema: Mapping[str, Any], not_first: str, tool: ToolArguments) -> str:
        if "enum" in schema:
            tool.leave_out(schema.keys() - {"enum", "type"})
            texts = (_quoted(text) if not_first else text for text in schema["enum"])
            return f"({' | '.join(map(literal, texts))}) {self.spell(self._line + self._end)}"
        regexes = tool.text_rules(schema) if schema.keys() - {"type"} else []
        blank = f"|{escaped(self._line)}" if self._line else ""  # an empty text before its end of line
        any_text = f"/([^{not_first}]{ANY}{blank})?/" if not_first else f"/{ANY}/"
        if regexes:
            unended = [] if self._after else [without(self._end)]
            every = " & ".join([*regexes, *unended, *([any_text] if not_first else [])])
            rule = " ".join([f": ({every})", *([literal(self._line)] if self._line else []), self._before])
        else:
            rule = f": {any_text}" if self._after else f"[lazy]: {any_text} {self._before}"
        known = f"{'text' if rule.startswith('[') else 'TEXT'}_{len(self._names)}"
        return f"{self._names.setdefault(rule, known)} {self._after}".strip()


def _quoted(text: str) -> str:
    """Return one of several texts as it is, or in quotes if it would be read as another value."""
    return text if as_json(text.strip()) is None else literal(text)
