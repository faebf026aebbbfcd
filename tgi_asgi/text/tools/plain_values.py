"""The grammar of values of tag formats: texts without quotes, which end before a mark, and JSON."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tgi_asgi.text.constrain.plain_strings import ANY, escaped, without
from tgi_asgi.text.constrain.source import literal
from tgi_asgi.text.surrogates import dumped
from tgi_asgi.text.tools.arguments import ToolArguments
from tgi_asgi.text.tools.value_forms import Forms

_BLANK = r" \t\r\n"
_BLANKS = f"[{_BLANK}]*"


@dataclass(frozen=True, slots=True)
class Then:
    """What follows a value.

    Attributes:
        rest: Rule of the arguments that follow, and the call's end.
        opened: The same after the first tag of an argument; None if none may follow.
        may_end: Whether no argument need follow.
    """

    rest: str
    opened: str | None
    may_end: bool


class PlainTexts:
    """The expressions of one grammar's texts, each with what follows it, and the rules that they need.

    A text ends at the first mark after it. If marks have lines of their own, a mark within a line may be part
    of the text, such as a file in XML, and ends it only if another argument or the call's end follows.

    Args:
        end: Mark after a text.
        spell: Writes a mark as an expression.
        line: What is between a text and the mark, if marks have lines of their own.
        following: The tags of another argument and of the call's end.
    """

    def __init__(
        self, end: str, spell: Callable[[str], str], line: str = "", following: tuple[str, str] = ("", "")
    ) -> None:
        self.spell, self._end, self._line, self._following = spell, end, line, following
        before, token, after = spell(end).partition("<[")
        # If the mark has a special token, the grammar cannot separate a text from what precedes the token.
        self._before = before.strip() if token else literal(end)
        self._after = token + after
        self._names: dict[str, str] = {}  # of rules, without their names

    @property
    def are_on_lines(self) -> bool:
        """Whether marks have lines of their own."""
        return self._line != ""

    @property
    def end(self) -> str:
        """The mark after a value that cannot be mistaken for it, with an optional line break before it."""
        line = f"{literal(self._line)}? " if self._line else ""
        return line + self.spell(self._end)

    @property
    def rules(self) -> list[str]:
        """The rules that the expressions so far need."""
        return [name + rule for rule, name in self._names.items()]

    def expression(self, forms: Forms, tool: ToolArguments, then: Then, *, is_named: bool) -> str:
        """Return the expression of a value that is a text, and of what follows it.

        Args:
            is_named: Whether something beside the value says that it is a text.
        """
        not_first = "" if is_named else forms.not_first()
        any_text = f"{_BLANKS}([^{_BLANK}{not_first}]{ANY})?" if not_first else ANY
        found = []
        for schema in forms.texts:
            if "enum" in schema:
                tool.leave_out(schema.keys() - {"enum", "type"})
                texts = schema["enum"] if is_named else [_told_apart(text, forms) for text in schema["enum"]]
                found.append(f"({' | '.join(map(literal, texts))}) {self.end} {then.rest}")
            else:
                regexes = tool.text_rules(schema) if schema.keys() - {"type"} else []
                if regexes and not_first:
                    regexes.append(f"/{any_text}/")
                found.append(self._text(regexes, any_text, then))
        return " | ".join(found)

    def _text(self, regexes: list[str], any_text: str, then: Then) -> str:
        """Return the expression of a text that matches all of these; if there are none, of any text."""
        if not regexes and self.are_on_lines:
            return self._on_lines(any_text, then)
        if regexes:
            unended = [] if self._after else [without(self._end)]
            every = " & ".join([*regexes, *unended])
            line = [literal(self._line)] if self._line else []
            name = self._named(" ".join([f": ({every})", *line, self._before]))
        else:
            name = self._named(f": /{any_text}/" if self._after else f"[lazy]: /{any_text}/ {self._before}")
        return f"{name} {self._after} {then.rest}"

    def _on_lines(self, any_text: str, then: Then) -> str:
        """Return the expression of any text on lines of its own, whose last line break may be missing."""
        line, end = escaped(self._line), escaped(self._end)
        following, closing = map(escaped, self._following)
        found = [f"{self._named(f'[lazy]: /({any_text}{line})?{end}/')} {then.rest}"]
        if then.opened is not None:
            found.append(f"{self._named(f'[lazy]: /{any_text}{end}({line})?{following}/')} {then.opened}")
        if then.may_end:
            found.append(self._named(f"[lazy]: /{any_text}{end}({line})?{closing}/"))
        return " | ".join(found)

    def _named(self, rule: str) -> str:
        kind = "text" if rule.startswith("[") else "TEXT"
        return self._names.setdefault(rule, f"{kind}_{len(self._names)}")


def _told_apart(text: str, forms: Forms) -> str:
    """Return one of several texts as it is, or in quotes if it would be read as another value."""
    return text if forms.may_be_null or forms.read(text) == dumped(text) else dumped(text)
