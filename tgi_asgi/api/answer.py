"""What constrains the answer to a job, for one model, and how the answer is parsed while it is generated.

`AnswerForm` determines the constraint; `ChoiceReader` splits an answer into content, reasoning and tool
calls.
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any, Protocol

from tgi_asgi.api.call import Choices, Conversation, Job
from tgi_asgi.errors import InvalidRequest
from tgi_asgi.settings import Settings
from tgi_asgi.text.constrain.answer import ToolUse, answer_grammar
from tgi_asgi.text.constrain.harmony import harmony_grammar
from tgi_asgi.text.constrain.source import GrammarSource, literal
from tgi_asgi.text.stop_scope import ReasoningMarks
from tgi_asgi.text.tools import (
    CallStart,
    Content,
    Piece,
    Reasoning,
    ToolFormat,
    ToolSpec,
    channels_of,
    choose_format,
    harmony,
    recognised_format,
)
from tgi_asgi.text.tools.answer import AnswerParser
from tgi_asgi.text.tools.harmony import HarmonyParser
from tgi_asgi.text.tools.reasoning import ReasoningStyle, Wrapper, style_of, wrapper_of
from tgi_asgi.types import ReasoningBudget, TokenEvent

if TYPE_CHECKING:
    from tgi_asgi.api.context import Served


class AnswerForm:
    """A job's tools and constraint, combined with the model's template and the end of the prompt."""

    def __init__(self, job: Job, served: Served, settings: Settings, prompt_tail: str) -> None:
        self._job = job
        self._served = served
        self._is_allowed = not settings.disable_grammar_support
        template = served.chat_template.source if served.chat_template is not None else ""
        wanted_calls, wanted_style = _chosen(settings.tool_format), _chosen(settings.reasoning_format)
        is_chat = isinstance(job.prompt, Conversation)
        self._has_channels = is_chat and (wanted_calls or channels_of(template)) == harmony.NAME
        is_read = job.reads_reasoning and is_chat and not self._has_channels
        style = style_of(template, wanted_style) if is_read else None
        self._wrapper = wrapper_of(template) if is_read else None
        self._style = None if style is None or style.is_closed(prompt_tail) else style
        self._is_open = self._style is not None and self._style.is_open(prompt_tail)
        if self._has_channels:
            self._is_open = harmony.is_open(prompt_tail)
        self._format: ToolFormat | None = None
        self._is_parallel = False
        if job.tools is not None:
            known = served.chat_template.tool_source if served.chat_template is not None else ""
            wanted_calls = None if wanted_calls == harmony.NAME else wanted_calls
            self._format = choose_format(known, wanted_calls)
            # A model without a known tool format does not know when to stop calling either: forced to call
            # tools, it repeats calls until `max_tokens`.
            is_known = wanted_calls is not None or self._has_channels or recognised_format(known) is not None
            self._is_parallel = job.tools.is_parallel and (is_known or not job.tools.must_call)

    def grammar_source(self) -> GrammarSource:
        """Return the grammar of a constrained answer; takes milliseconds for large schemas.

        Raises:
            InvalidRequest: if grammars are disabled, or a schema is refused.
        """
        if not self._is_allowed:
            raise InvalidRequest("grammar is not supported")
        job, use = self._job, None
        content = job.constraint.make() if job.constraint is not None else None
        is_plain = self._style is None and self._wrapper is None and not self._has_channels
        if content is not None and job.tools is None and is_plain:
            return content
        if job.tools is not None and self._format is not None:
            use = ToolUse(self._format, job.tools.specs, job.tools.must_call, self._is_parallel)
        source = (
            harmony_grammar(content, use, self._mark, is_reasoning_open=self._is_open)
            if self._has_channels
            else answer_grammar(
                content,
                use,
                self._style,
                is_reasoning_open=self._is_open,
                mark=self._mark,
                wrapper=self._wrapper,
            )
        )
        assert source is not None, "an answer without tools and constraint has no grammar"
        return source

    def reading(self) -> Reading | None:
        """Return how to parse the answer, or None if it is plain text."""
        style, form, wrapper, tools = self._style, self._format, self._wrapper, self._job.tools
        if style is None and form is None and wrapper is None and not self._has_channels:
            return None
        special = self._served.special_ids
        markers = [
            *(style.all_markers if style else ()),
            *(wrapper.markers if wrapper else ()),
            *(form.markers if form else ()),
        ]
        if self._has_channels:
            markers = [*harmony.MARKERS]
        return Reading(
            style,
            form,
            is_reasoning_open=self._is_open,
            shows_reasoning=self._job.shows_reasoning,
            specs=tools.specs if tools is not None else (),
            marker_ids=frozenset(special[text] for text in markers if text in special),
            must_call=tools is not None and tools.must_call,
            wrapper=wrapper,
            has_channels=self._has_channels,
        )

    def reasoning_budget(self, num_tokens: int) -> ReasoningBudget | None:
        """Return the bound on the reasoning; None if the model has none, or its end is not a single token."""
        if self._has_channels:
            start, end, answer = harmony.REASONING
        elif self._style is not None:
            start, end, answer = self._style.start, self._style.end, ""
        else:
            return None
        encode = partial(self._served.tokenizer.encode, add_special_tokens=False)
        if len(encode(end)) != 1:
            return None
        end_ids, answer_ids = (*encode(end),), (*encode(answer),)
        if self._job.tools is None:  # else it may call a tool next
            end_ids, answer_ids = end_ids + answer_ids, ()
        return ReasoningBudget(num_tokens, (*encode(start),), end_ids, self._is_open, answer_ids)

    def reasoning_marks(self) -> ReasoningMarks | None:
        """Return how the answer marks reasoning, or None if it has none."""
        if self._has_channels:
            return ReasoningMarks("", "", is_open=self._is_open, has_channels=True)
        style = self._style
        return None if style is None else ReasoningMarks(style.start, style.end, is_open=self._is_open)

    def _mark(self, marker: str) -> str:
        token_id = self._served.special_ids.get(marker)
        return literal(marker) if token_id is None else f"<[{token_id}]>"


@dataclass(frozen=True, slots=True)
class Reading:
    """How to parse the choices of one answer."""

    style: ReasoningStyle | None = None
    tools: ToolFormat | None = None
    is_reasoning_open: bool = False
    shows_reasoning: bool = True
    specs: Sequence[ToolSpec] = ()  # tools that may be called
    marker_ids: frozenset[int] = frozenset()  # the format's markers that are special tokens
    must_call: bool = False
    wrapper: Wrapper | None = None
    has_channels: bool = False  # the whole answer is in harmony's format

    def parser(self) -> AnswerParser | HarmonyParser:
        """Return a parser for one choice."""
        if self.has_channels:
            return HarmonyParser(
                self.specs, is_reasoning_open=self.is_reasoning_open, must_call=self.must_call
            )
        return AnswerParser(
            self.style,
            self.tools,
            self.specs,
            is_reasoning_open=self.is_reasoning_open,
            must_call=self.must_call,
            wrapper=self.wrapper,
        )


class LogprobsTracker(Protocol):
    """Collects one choice's log-probabilities, in either endpoint's shape."""

    def push(self, event: TokenEvent) -> None: ...

    def take(self, *, is_whole: bool = False) -> dict[str, Any] | None: ...


class ChoiceReader:
    """Parses one choice: events in, pieces out; without a `reading` everything is content.

    Attributes:
        num_reasoning_tokens: Number of reasoning tokens so far.
        is_reasoning: Whether the text is inside the reasoning section.
    """

    def __init__(self, reading: Reading | None) -> None:
        self._reads_text = reading is None
        self._reading = reading = reading or Reading()
        self._parser = reading.parser()
        self._num_read = 0
        self._unshown: deque[tuple[int, int, TokenEvent]] = deque()  # with start and end of their text
        self.num_reasoning_tokens = 0

    @property
    def is_reasoning(self) -> bool:
        return self._parser.is_reasoning

    def push(self, events: Sequence[TokenEvent], tracker: LogprobsTracker | None = None) -> list[Piece]:
        """Parse new events; return their pieces, with neighbours of one kind merged.

        `tracker` receives only events of content: reasoning and calls have no log-probabilities.
        """
        if self._reads_text:
            if tracker is not None:
                for event in events:
                    tracker.push(event)
            text = "".join([event.text for event in events])
            return [Content(text)] if text else []
        pieces: list[Piece] = []
        for event in events:
            begun = self._num_read
            new = self._push(event)
            if tracker is not None:
                self._unshown.append((begun, self._num_read, event))
                self._show(new, tracker)
            pieces += new
        return list(_merged(pieces))

    def _show(self, pieces: Sequence[Piece], tracker: LogprobsTracker) -> None:
        """Pass the tokens of content to the tracker; drop those before it."""
        for piece in pieces:
            if isinstance(piece, Content):
                stop = piece.start + len(piece.text)
                while self._unshown and self._unshown[0][0] < stop:
                    _, end, event = self._unshown.popleft()
                    if end > piece.start or (not event.text and end == piece.start):
                        tracker.push(event)

    def _push(self, event: TokenEvent) -> list[Piece]:
        text, reading = event.text, self._reading
        was_reasoning = self._parser.is_reasoning
        self._num_read += len(text)
        pieces = self._parser.push(text) if text else []
        self.num_reasoning_tokens += was_reasoning or self._parser.is_reasoning
        if event.finish is not None:
            pieces += self._parser.finish()
        if not reading.shows_reasoning:
            pieces = [piece for piece in pieces if not isinstance(piece, Reasoning)]
        return pieces


def _chosen(name: str) -> str | None:
    """Return the format that the administrator chose, or None if the template decides."""
    return None if name == "auto" else name


def likeliest(choices: Choices, n: int = 1) -> list[int]:
    """Return the n choices with the highest mean log-probability, best first; if n is all, in given order."""

    def mean(index: int) -> float:
        values = [event.logprob for event in choices[index] if event.logprob is not None]
        return math.fsum(values) / len(values) if values else -math.inf

    every = list(range(len(choices)))
    return every if len(every) == n else sorted(every, key=mean, reverse=True)[:n]


def _merged(pieces: Sequence[Piece]) -> Iterator[Piece]:
    """Yield pieces with the texts of neighbours of one kind joined; each call's start stays alone."""
    for _, group in groupby(pieces, type):
        first, *others = group
        if isinstance(first, CallStart) or not others:
            yield first
            yield from others
        else:  # joined at once: 100,000 pieces, one after the other, take 12 s
            texts = [each.text for each in (first, *others) if not isinstance(each, CallStart)]
            yield dataclasses.replace(first, text="".join(texts))
