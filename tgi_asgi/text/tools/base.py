"""The interface of a family's tool-call format: the grammar of calls, and their parser.

A `ToolFormat` is one row of `formats.py`; formats that write calls alike share a class.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from tgi_asgi.text.constrain.plain_strings import escaped
from tgi_asgi.text.constrain.source import literal
from tgi_asgi.text.tools.arguments import ToolArguments, ToolSpec


@dataclass(frozen=True, slots=True)
class Content:
    """A piece of the answer's text; `start` is its offset in everything read so far, markers included."""

    text: str
    start: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class Reasoning:
    """A piece of the model's reasoning before the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """The beginning of a call; pieces of its arguments follow, until the next call."""

    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """A piece of the current call's arguments, which together are a JSON object."""

    text: str


Piece = Content | Reasoning | CallStart | CallArguments


WrittenCall = tuple[str, Mapping[str, Any]]  # a name and the arguments
Mark = Callable[[str], str]  # turns a marker into a grammar expression: a special token, or its text


class CallParser(Protocol):
    """A parser of calls as models write them, starting after the marker.

    Models omit end markers, add blanks and fences, write several calls in one section, call unknown tools,
    and continue with text. Everything that is not a call of a known tool is returned as text.

    Attributes:
        rest: The text after the calls, once it is known; all text read if there is no call.
    """

    rest: str | None

    def push(self, text: str) -> list[Piece]:
        """Return the pieces in the next part of the text; must not be called once there is a `rest`."""

    def finish(self) -> str:
        """Return the text that looked like the start of a call but is none, at the end of the answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolFormat(ABC):
    """One family's way to write calls.

    Attributes:
        name: Name for administrators; vLLM's name if it has one.
        families: Models that write this format, for the documentation.
        shows: Groups of texts; a chat template of this format contains all texts of at least one group.
        lacks: Texts that none of its templates contain, to exclude formats that share the texts in `shows`.
        marker: Text that opens the first call, or "" if a call begins the whole answer.
        head, between, tail: Texts before, between and after calls, starting after the marker.
        openers: Alternative texts that some models write instead; the parser reads them, too.
        markers: Every text of the format for which some tokenizers have a single token.
    """

    name: str
    families: str
    shows: tuple[tuple[str, ...], ...]
    lacks: tuple[str, ...] = ()
    marker: str = ""
    head: str = ""
    between: str = ""
    tail: str = ""
    openers: tuple[str, ...] = ()
    markers: tuple[str, ...] = ()

    @property
    def may_begin(self) -> bool:
        """Whether an answer may begin with a call that has no marker, as decided by `begins`."""
        return not self.marker

    @property
    def begun(self) -> str:
        """What is between the marker and the first name, if `rules` has a rule `begun`; otherwise ""."""
        return ""

    def leaves_reasoning(self, mark: Mark) -> str | None:
        """Return what must follow a marker inside reasoning for it to be a call, without blanks.

        Models of several families call tools before they have ended their reasoning. A marker that is a
        special token is never part of the thoughts, so nothing need follow. Another one may be, unless a
        call's beginning follows. None: no marker is a call there.
        """
        if not self.marker:
            return None
        expression = marked_expression(self.marker, mark, self.markers)
        if re.fullmatch(r"<\[\d+\]>", expression):
            return ""
        is_text = "<[" not in marked_expression(self.marker + self.begun, mark, self.markers)
        return "".join(self.begun.split()) or None if is_text else None

    def recognises(self, template: str) -> bool:
        """Return whether a chat template's source shows that its model was trained on this format."""
        is_shown = any(all(text in template for text in group) for group in self.shows)
        return is_shown and not any(text in template for text in self.lacks)

    def begins(self, text: str, names: Collection[str]) -> bool | None:
        """Return whether an answer with this beginning is a call without a marker; None: not known yet."""
        return False

    @abstractmethod
    def rules(self, tools: Sequence[ToolArguments], mark: Mark, *, is_parallel: bool) -> str:
        """Return grammar rules, in which `calls` is everything after the marker.

        In some formats, `begun` is what follows the text `self.begun` after it.
        """

    def openings(self, names: Iterable[str]) -> list[str]:
        """Return a regex for each tool of how its calls begin, and no text; [] if a marker opens calls."""
        return []

    def rules_beside_text(self, tools: Sequence[ToolArguments], *, is_parallel: bool) -> str:
        """Return `rules` for answers that may also be any text that begins with none of `openings`.

        Each opening is one lexeme: the compiler's lexer never backtracks, and would take a shorter one for
        the beginning of a text.
        """
        raise NotImplementedError

    def rules_beside_json(self, tools: Sequence[ToolArguments], mark: Mark, *, is_parallel: bool) -> str:
        """Return `rules` for answers that may be compact JSON instead."""
        return self.rules(tools, mark, is_parallel=is_parallel)

    def written(self, calls: Sequence[WrittenCall]) -> str:
        """Return calls as its templates write them, from the marker on."""
        texts = [self.written_call(number, *call) for number, call in enumerate(calls)]
        head, between, tail = map(plain_text, (self.head, self.between, self.tail))
        return self.marker + head + between.join(texts) + tail

    @abstractmethod
    def written_call(self, number: int, name: str, arguments: Mapping[str, Any]) -> str:
        """Return one of the calls, as its templates write it."""

    @abstractmethod
    def parser(self, tools: Sequence[ToolSpec]) -> CallParser:
        """Return a parser for one answer's calls; `tools` give the types of values not written as JSON."""


def alternatives(rule: str, expressions: Sequence[str]) -> str:
    """Return a rule with several alternatives."""
    return f"{rule}: " + " | ".join(expressions)


def bare_rules(
    form: ToolFormat,
    head: str,
    begun: Sequence[str],
    rests: Sequence[str],
    *,
    is_parallel: bool,
    openings: Sequence[str] = (),
) -> str:
    """Return rules of calls that no marker opens.

    Args:
        head: Expression of what precedes the first call.
        begun: For each tool, the expression of its calls up to the name.
        rests: The expressions of what follows.
        openings: Regexes of the first call up to the name, instead of `head` and `begun`.
    """
    numbered = [(f"rest_{index}", rest) for index, rest in enumerate(rests)]
    first = "opened" if openings else f"{head} call".strip()
    more = f" ({literal(form.between)} call)*" if is_parallel else ""
    tail = f" {literal(form.tail)}" if form.tail else ""
    calls = [f"{each} {name}" for each, (name, _) in zip(begun, numbered, strict=True)]
    rules = [f"calls: {first}{more}{tail}", alternatives("call", calls)]
    rules += [f"{name}: {rest}" for name, rest in numbered]
    if openings:
        rules.append(
            alternatives("opened", [f"OPENING_{index} rest_{index}" for index in range(len(openings))])
        )
        rules += [f"OPENING_{index}: /{opening}/" for index, opening in enumerate(openings)]
    return "\n".join(rules)


def free_name(pattern: str, listed: Iterable[str]) -> str:
    """Return a regex of the names of arguments that are not among those listed."""
    names = "|".join(map(escaped, listed))
    return f"/{pattern}/" + (f" & ~/({names})/" if names else "")


def argument_rules(
    rule: str, keys: Iterable[tuple[str, str, bool]], comma: str, free: str | None = None
) -> list[str]:
    """Return rules for arguments in order, some of which are optional.

    `<rule>_first_0` matches all arguments. `<rule>_first_i` matches those from number i on if none came
    before, `<rule>_more_i` if one did.

    Args:
        keys: For each argument, the expressions of its beginning and of its value, and whether it is
            required.
        comma: Separator between arguments.
        free: Expression of an argument that is not listed, if there may be such after the others.
    """
    rules = []
    end = 0
    for index, (head, value, is_required) in enumerate(keys):
        end = index + 1
        keyword = f"{head} {value} {rule}_more_{end}"
        for place, before in (("first", ""), ("more", f"{literal(comma)} ")):
            skipped = "" if is_required else f" | {rule}_{place}_{end}"
            rules.append(f"{rule}_{place}_{index}: {before}{keyword}{skipped}")
    if free is None:
        return [*rules, f'{rule}_first_{end}: ""', f'{rule}_more_{end}: ""']
    more = f"({literal(comma)} {rule}_free)*"
    return [
        *rules,
        f"{rule}_free: {free}",
        f"{rule}_first_{end}: ({rule}_free {more})?",
        f"{rule}_more_{end}: {more}",
    ]


_PLACEHOLDERS = {"%d": "/[0-9]+/", "%s": "/[a-zA-Z0-9]{9}/", "%_": '" "?', "%n": r'"\n"?'}


def marked_expression(text: str, mark: Mark, markers: Sequence[str]) -> str:
    """Return a text as an expression of a grammar, with its markers as `mark` writes them.

    Its placeholders are `%d` for a number, `%s` for an id, `%_` and `%n` for an optional blank and newline.
    """
    known = sorted(markers, key=len, reverse=True)
    expressions: list[str] = []
    plain = ""
    for part in re.split("|".join(["(%[ds_n]", r"\n", *map(re.escape, known)]) + ")", text):
        expression = _PLACEHOLDERS.get(part)
        if part == "\n":
            # A lexeme of its own: the compiler's lexer never backtracks, and could not tell "\n" before a
            # further call from "\n</calls>" otherwise.
            expression = literal(part)
        elif part in known and mark(part) != literal(part):
            expression = mark(part)
        if expression is None:
            plain += part
            continue
        expressions += [literal(plain), expression] if plain else [expression]
        plain = ""
    if plain or not expressions:
        expressions.append(literal(plain))
    return " ".join(expressions)


def plain_text(text: str, number: int = 0) -> str:
    """Return a format's text as templates write it; its placeholders are those of `marked_expression`.

    `number` is the call's: the first of an answer is 0.
    """
    found = {"%d": str(number), "%s": f"call{number:05}", "%_": " ", "%n": "\n"}
    return re.sub("%[ds_n]", lambda placeholder: found[placeholder[0]], text)


def begun_text(text: str) -> str:
    """Return a format's text as templates write it, stripped; "" if it contains an id or a number."""
    return "" if "%d" in text or "%s" in text else plain_text(text).strip()


def num_held(text: str, marker: str) -> int:
    """Return how many characters at the end of a text may begin a marker, which is not empty."""
    first, size = marker[0], len(text)
    at = text.find(first, max(size - len(marker) + 1, 0))
    while at >= 0 and not marker.startswith(text[at:]):
        at = text.find(first, at + 1)
    return size - at if at >= 0 else 0
