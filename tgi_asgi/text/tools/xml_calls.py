"""Parser for calls written as tags."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tgi_asgi.text.surrogates import dumped
from tgi_asgi.text.tools.arguments import ToolSpec
from tgi_asgi.text.tools.base import Piece, num_held
from tgi_asgi.text.tools.call_reader import CallReader
from tgi_asgi.text.tools.literals import JsonStrings, as_json
from tgi_asgi.text.tools.odd_names import OddNames
from tgi_asgi.text.tools.value_forms import NULLS, Forms, forms_of

_FENCES = ("```xml", "```")
_MAX_NAME = 128
_MAX_HEAD = 1024  # characters of a call's head, which is read again at each of them
_MAX_FOLLOWING = 256  # arguments whose start ends a value that has no end, each of which is searched for
# An argument's name, which is read again at each of its characters. It neither begins nor ends with a blank;
# otherwise the regex would try every way to divide a run of blanks, and a run of a few hundred would hang the
# server.
_ARGUMENT_NAME = r'[^<>"\s](?:[^<>"\n]{0,1024}[^<>"\s])?'


@dataclass(frozen=True, slots=True)
class XmlTags:
    """The texts of a format, as the parser searches for them.

    Attributes:
        call: Texts before a call's name, after the name, and after the arguments.
        argument: The same for an argument's name and value. `%t` between the two is "true" if the value is
            text, otherwise "false".
        wraps: Optional texts around calls; the first opens them.
        quotes: Optional texts around a value that are not part of it.
    """

    call: tuple[str, str, str]
    argument: tuple[str, str, str]
    wraps: tuple[str, ...]
    quotes: tuple[str, str] = ("", "")

    @property
    def line(self) -> str:
        """The end of a line between a value and its end tag, which models may omit."""
        return self.quotes[1] if self.quotes[1].isspace() else ""

    def head(self) -> re.Pattern[str]:
        """Return a pattern for the start of a call; group 2, a tag that confirms it, is read again.

        Without that, a function's tag in prose would pass for a call, and what follows for its arguments.
        """
        before, middle, _ = self.call
        follows = "|".join(map(_loose, self._follows()))
        if middle.strip():
            return re.compile(rf"{re.escape(before)}([^<>\"\n]{{1,128}}?){_loose(middle)}\s*({follows})")
        return re.compile(rf"{re.escape(before)}([\w.-]{{1,128}})\s*({follows})")

    def _follows(self) -> list[str]:
        """Return the tags that may follow a call's head, as one must, without the blanks around them."""
        _, middle, behind = self.call
        ends = [wrap for wrap in self.wraps if middle.strip()]  # instead of its own end
        return [tag for each in (self.argument[0], behind, *ends) if (tag := each.strip())]

    def odd_names(self, names: Iterable[str]) -> OddNames:
        """Return those of a tool's arguments that are not written like other names."""
        before, middle, _ = self.argument
        return OddNames(names, _ARGUMENT_NAME, before=before, behind=re.split("%t|%n|\n", middle)[0])

    def head_argument(self, odd_names: Sequence[str]) -> re.Pattern[str]:
        """Return a pattern for the start of an argument: its name, and its type if there is one."""
        before, middle, _ = self.argument
        kind = "" if "%t" in middle else "()"
        value = _loose(middle).replace("%t", "(true|false)") + kind
        name = "|".join([*map(re.escape, odd_names), _ARGUMENT_NAME])
        return re.compile(rf"\s*{_loose(before)}\s*?({name})\s*{value}")

    def end(self) -> re.Pattern[str]:
        """Return a pattern for the end of a call: its own tag, or what follows if that is missing."""
        before, _, behind = self.call
        marks = {*self.wraps, before} - {behind, ""}
        missing = f"|(?={'|'.join(map(re.escape, marks))})" if marks else ""
        return re.compile(rf"\s*(?:{_loose(behind)}{missing})")

    def may_begin(self, text: str) -> bool:
        """Return whether a text may be the beginning of a call's head."""
        before, middle, _ = self.call
        if not text.startswith(before):
            return before.startswith(text)
        found = re.match(r"[\w.-]*" if not middle.strip() else r"[^<>\"\n]*", text[len(before) :])
        assert found is not None, "the pattern matches no characters, too"
        if len(found[0]) > _MAX_NAME or len(text) > _MAX_HEAD:
            return False
        rest, middle = text[len(before) + found.end() :].lstrip(), middle.strip()
        if not rest.startswith(middle):
            return middle.startswith(rest)
        rest = rest[len(middle) :].lstrip()
        return any(each.startswith(rest) for each in self._follows())


def _loose(text: str) -> str:
    """Return a pattern of tags with any blanks between them."""
    return r"\s*".join(map(re.escape, re.split(r"\s*\n\s*|(?<=>)(?=<)", text.strip())))


class XmlCallParser(CallReader):
    """A parser that emits text values as they are written, others once they are complete."""

    def __init__(self, tools: Sequence[ToolSpec], tags: XmlTags) -> None:
        super().__init__()
        self._specs = {tool.name: tool for tool in tools}
        self._tags = tags
        self._marks = (*tags.wraps, *_FENCES)
        self._head = tags.head()

    def _read_head(self, pieces: list[Piece]) -> str:
        text = self._held.lstrip()
        # If only the marker precedes a name, any word in the text after a call might pass for one.
        is_open = bool(self._tags.call[0] or self._skipped) or not self._has_called
        found = self._head.fullmatch(text) if is_open else None
        if found and found[1] in self._specs:
            self._begin_call(found[1], XmlArguments(self._tags, self._specs[found[1]]), pieces)
            return found[2]
        if any(mark.startswith(text) and mark != text for mark in self._marks):
            return ""  # the longer of two marks may follow
        mark = max((mark for mark in self._marks if text.startswith(mark)), key=len, default=None)
        if mark is not None and not found:
            may_be_text = mark == self._marks[0] or not self._has_called or bool(self._skipped)
            return self._skip(len(self._held) - len(text) + len(mark), may_be_text=may_be_text)
        may_begin = is_open and self._tags.may_begin(text)
        if found or not (may_begin or any(mark.startswith(text) for mark in self._marks)):
            self._give_up()
        return ""


class XmlArguments:
    """The arguments of one call, `<a>1</a><b>...</b></call>`, turned into a JSON object.

    Args:
        spec: Its tool, whose schema decides whether a value is text or JSON.

    Attributes:
        have_ended: Whether the call's last character has been read.
    """

    def __init__(self, tags: XmlTags, spec: ToolSpec) -> None:
        self.have_ended = False
        self._tags, self._spec, self._listed = tags, spec, spec.arguments
        self._odd_names = tags.odd_names(spec.arguments.names)
        self._argument, self._end = tags.head_argument(self._odd_names.longest_first), tags.end()
        self._buffer = ""
        self._num_arguments = 0
        self._out: list[str] = []
        self._value_end: _ValueEnd | None = None  # of the value that is being read
        self._forms = Forms()  # of this value
        self._kind = ""  # its type, if given: "true" for text
        self._is_text: bool | None = None  # None: not yet known whether it is null

    def push(self, text: str) -> tuple[str, str]:
        """Return the JSON that is certain now, and what follows the call."""
        while text and not self.have_ended:
            if self._value_end is not None:
                self._buffer += text
                text = ""
                if self._read_value(self._value_end):  # what follows the value is still to be read
                    text, self._buffer = self._buffer, ""
            else:  # one character at a time, so that the output does not depend on how the text was cut
                self._buffer += text[0]
                text = text[1:]
                self._read_tag()
        written, self._out = "".join(self._out), []
        return written, self._buffer + text if self.have_ended else ""

    def _read_tag(self) -> None:
        """Look for the next argument's start, or the call's end."""
        self._buffer = self._buffer.lstrip()  # otherwise a run of blanks is read again at each of them
        if self._odd_names.may_begin(self._buffer):
            return
        found = self._argument.match(self._buffer)
        end = self._end.match(self._buffer) if not found else None
        if found:
            self._begin_argument(found)
        elif end:
            self._cut(end.end())
            self._out.append("}" if self._num_arguments else "{}")
            self.have_ended = True

    def _begin_argument(self, found: re.Match[str]) -> None:
        """Process an argument's start, unless it is not yet known whether its value is quoted."""
        quote = self._tags.quotes[0]
        rest = self._buffer[found.end() :]
        is_quoted = quote != "" and rest.startswith(quote)
        if quote and not is_quoted and quote.startswith(rest):
            return
        self._cut(found.end() + (len(quote) if is_quoted else 0))
        self._kind = found[2]
        self._forms = forms_of(self._listed.schema(found[1]), self._spec.resolve)
        if is_quoted and not quote.isspace():
            self._kind = "true"
        is_undecided = not self._kind and self._forms.may_be_null
        is_text = self._kind == "true" or not (self._kind or self._forms.others)
        self._is_text = None if is_undecided else is_text
        self._value_end = _ValueEnd(self._tags, self._listed.names, self._tags.quotes[1] if is_quoted else "")
        head = f"{', ' if self._num_arguments else '{'}{dumped(found[1])}: "
        self._num_arguments += 1
        self._out.append(head + ('"' if self._is_text else ""))

    def _read_value(self, value_end: _ValueEnd) -> bool:
        """Read the available part of a value; return True once it has ended."""
        found = value_end.find(self._buffer, is_json=self._is_text is False)
        known = self._buffer[: found[0] if found else value_end.num_known]
        if self._is_text is None and not any(each.startswith(known.strip()) for each in NULLS):
            self._is_text = True
            self._out.append('"')
        if found is None:
            if self._is_text and known:
                self._out.append(dumped(known)[1:-1])
                self._cut(len(known))
                value_end.drop_known()
            return False
        self._cut(found[1])
        self._out.append(dumped(known)[1:] if self._is_text else self._json(known))
        self._value_end = None
        return True

    def _json(self, value: str) -> str:
        return self._forms.read_json(value) if self._kind else self._forms.read(value)

    def _cut(self, size: int) -> None:
        self._buffer = self._buffer[size:]


class _ValueEnd:
    """The search for the end of a value: its own end, or the tags that follow it if that is missing.

    A value that is not text stays buffered until it ends, and a tool with many arguments has many ends: each
    part is searched once, and only if it contains an end's first character.

    Args:
        names: The tool's arguments, any of which may follow.
        quote: Text between the value and its end tag.

    Attributes:
        num_known: How many characters of the text, at its beginning, are part of the value.
    """

    def __init__(self, tags: XmlTags, names: Sequence[str], quote: str) -> None:
        behind, (before, middle, end) = tags.call[2], tags.argument
        tag = middle.partition("%t")[0]
        line = "\n" if quote != "]]>" else ""
        wraps = [wrap for wrap in tags.wraps if wrap not in (behind, "")]
        follows = [f"{line}{before}{name}{tag}" for name in names[:_MAX_FOLLOWING]]
        follows += [f"{line}{behind}{blank}{wrap}" for blank in ("", "\n") for wrap in wraps]
        self._tags = tags
        self._own = {quote + end} if quote.strip() else {tags.line + end, end}
        self._ends = {*self._own, *follows}
        self._first_of_ends = {each[0] for each in self._ends}
        self._has_begun = False  # whether some of the value is no longer in the text
        self._strings = JsonStrings()  # of the value, if it is JSON
        self._skipped: tuple[int, str] | None = None  # an end in one of them
        self.num_known = 0

    def find(self, text: str, *, is_json: bool) -> tuple[int, int] | None:
        """Return where the value, with which the text begins, ends, and where the text goes on after it."""
        found = self._find_behind_json(text) if is_json else self._find_behind_text(text)
        if found is None:
            return None
        at, end = found
        return at, at + (len(end) if end in self._own else 0)

    def drop_known(self) -> None:
        """Note that the known characters have been removed from the text."""
        self.num_known, self._has_begun = 0, True

    def _find_behind_text(self, text: str) -> tuple[int, str] | None:
        while (found := self._next(text)) is not None:
            at, end = found
            is_within_line = self._tags.line != "" and end == self._tags.argument[2]
            if not is_within_line or not (at or self._has_begun):
                return found
            is_structure = self._is_followed(text, at + len(end))
            if is_structure:
                return found
            if is_structure is None:
                self.num_known = at
                return None
            self.num_known = at + 1
        return None

    def _find_behind_json(self, text: str) -> tuple[int, str] | None:
        while (found := self._next(text)) is not None:
            at, _ = found
            value = text[:at].strip()
            if not self._strings.are_open(text, at):
                is_torn = self._skipped is not None and as_json(value) is None  # its quotes do not match
                return self._skipped if is_torn else found
            if value[-1] in "]}" and as_json(value) is not None:  # Python's quotes look like an open string
                return found
            if self._skipped is None:
                self._skipped = found
                self._ends.add(self._tags.call[2])
                self._first_of_ends.add(self._tags.call[2][0])
            self.num_known = at + 1
        return None

    def _next(self, text: str) -> tuple[int, str] | None:
        """Return the first possible end after the known characters, and where it is."""
        new = text[self.num_known :]
        ends = () if self._first_of_ends.isdisjoint(new) else self._ends
        found = [(at + self.num_known, end) for end in ends if (at := new.find(end)) >= 0]
        if not found:
            self.num_known += len(new) - max((num_held(new, end) for end in ends), default=0)
        return min(found, default=None)

    def _is_followed(self, text: str, at: int) -> bool | None:
        """Return whether another argument or the call's end begins at a place; None: not known yet.

        Otherwise an end tag within a line is part of the text, such as a file in XML.
        """
        rest = text[at:].removeprefix(self._tags.line)  # as the grammar says
        tags = (self._tags.argument[0], self._tags.call[2], *self._tags.wraps)
        if any(rest.startswith(tag) for tag in tags):
            return True
        return None if any(tag.startswith(rest) for tag in tags) else False
