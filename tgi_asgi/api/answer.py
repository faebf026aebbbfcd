"""What the answer to a job may be, for one model, and how it is read while it is generated.

`AnswerForm` says what constrains it; `ChoiceReader` takes it apart into content, reasoning and tool calls.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from tgi_asgi.api.call import Conversation, Job
from tgi_asgi.errors import InvalidRequest
from tgi_asgi.settings import Settings
from tgi_asgi.text.constrain.answer import ToolUse, answer_grammar
from tgi_asgi.text.constrain.source import GrammarSource, literal
from tgi_asgi.text.tools import CallStart, Content, Piece, Reasoning, ToolFormat, ToolSpec, choose_format
from tgi_asgi.text.tools.reasoning import ReasoningStyle, style_of
from tgi_asgi.text.tools.reply import ReplyParser
from tgi_asgi.types import TokenEvent

if TYPE_CHECKING:
    from tgi_asgi.api.context import Served


@dataclass(frozen=True, slots=True)
class AnswerForm:
    """A job's tools and constraint, seen with the model's template and the end of the prompt."""

    job: Job
    served: Served
    settings: Settings
    special_ids: Mapping[str, int]  # by text
    prompt_tail: str

    @property
    def is_constrained(self) -> bool:
        """Whether there is a grammar."""
        return self.job.tools is not None or self.job.constraint is not None

    def grammar_source(self) -> GrammarSource | None:
        """Return the grammar of the whole answer, or None; milliseconds for large schemas.

        Raises:
            InvalidRequest: grammars are switched off, or a schema is refused.
        """
        job = self.job
        if not self.is_constrained:
            return None
        if self.settings.disable_grammar_support:
            raise InvalidRequest("grammar is not supported")
        content = job.constraint.make() if job.constraint is not None else None
        style = self._style()
        if content is not None and job.tools is None and style is None:
            return content
        use = None
        if job.tools is not None:
            tools = job.tools
            use = ToolUse(self._format(), tools.specs, tools.must_call, tools.is_parallel)
        is_open = style is not None and style.is_open(self.prompt_tail)
        return answer_grammar(content, use, style, is_reasoning_open=is_open, mark=self._mark)

    def reading(self) -> Reading | None:
        """Return how the answer is read, or None where it is text and nothing else."""
        job, style = self.job, self._style()
        tools = self._format() if job.tools is not None else None
        if style is None and tools is None:
            return None
        special = self.special_ids
        return Reading(
            style,
            tools,
            is_reasoning_open=style is not None and style.is_open(self.prompt_tail),
            shows_reasoning=job.shows_reasoning,
            specs=job.tools.specs if job.tools is not None else (),
            special_ids=self.served.tokenizer.special_ids if job.skip_special_tokens else frozenset(),
            kept=frozenset(special[text] for text in self._markers(style, tools) if text in special),
            must_call=job.tools is not None and job.tools.must_call,
        )

    def _style(self) -> ReasoningStyle | None:
        template = self.served.chat_template
        if template is None or not isinstance(self.job.prompt, Conversation) or not self.job.reads_reasoning:
            return None
        style = style_of(template.source)
        return None if style is None or style.is_closed(self.prompt_tail) else style

    def _format(self) -> ToolFormat:
        template = self.served.chat_template
        return choose_format(template.source if template is not None else "", self.settings.tool_format)

    def _markers(self, style: ReasoningStyle | None, tools: ToolFormat | None) -> Iterator[str]:
        if style is not None:
            yield from (style.start, style.end)
        if tools is not None:
            yield from tools.markers

    def _mark(self, marker: str) -> str:
        token_id = self.special_ids.get(marker)
        return literal(marker) if token_id is None else f"<[{token_id}]>"


@dataclass(frozen=True, slots=True)
class Reading:
    """How the choices of one answer are to be read."""

    style: ReasoningStyle | None = None
    tools: ToolFormat | None = None
    is_reasoning_open: bool = False
    shows_reasoning: bool = True
    specs: Sequence[ToolSpec] = ()  # the tools that may be called
    special_ids: frozenset[int] = frozenset()  # their text is shown by the engine, and dropped unless kept
    kept: frozenset[int] = frozenset()  # the markers among them
    must_call: bool = False


class LogprobsTracker(Protocol):
    """One choice's log-probabilities, in either endpoint's shape."""

    def push(self, event: TokenEvent) -> None: ...

    def take(self) -> dict[str, Any] | None: ...


class ChoiceReader:
    """One choice: its events in, pieces out; without a `reading` all of it is content.

    Attributes:
        num_reasoning_tokens: so far.
        is_reasoning: the text is inside the reasoning section.
    """

    def __init__(self, reading: Reading | None) -> None:
        self._reads_text = reading is None
        self._reading = reading = reading or Reading()
        self._parser = ReplyParser(
            reading.style,
            reading.tools,
            reading.specs,
            is_reasoning_open=reading.is_reasoning_open,
            must_call=reading.must_call,
        )
        self._num_read = 0
        self._unshown: deque[tuple[int, int, TokenEvent]] = deque()  # with where their text starts and ends
        self.num_reasoning_tokens = 0

    @property
    def is_reasoning(self) -> bool:
        return self._parser.is_reasoning

    def push(self, events: Sequence[TokenEvent], tracker: LogprobsTracker | None = None) -> list[Piece]:
        """Take new events; return what they tell, neighbours of a kind as one piece.

        `tracker` gets the events that are not of reasoning or calls: those have no log-probabilities.
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
        return _merged(pieces)

    def _show(self, pieces: Sequence[Piece], tracker: LogprobsTracker) -> None:
        """Give the tracker the tokens that content is made of; forget those before it."""
        for piece in pieces:
            if isinstance(piece, Content):
                stop = piece.start + len(piece.text)
                while self._unshown and self._unshown[0][0] < stop:
                    _, end, event = self._unshown.popleft()
                    if end > piece.start or (not event.text and end == piece.start):
                        tracker.push(event)

    def _push(self, event: TokenEvent) -> list[Piece]:
        text = event.text
        reading = self._reading
        if event.token_id in reading.special_ids and event.token_id not in reading.kept:
            text = text.removesuffix(event.data.decode("utf-8", "replace"))
        was_reasoning = self._parser.is_reasoning
        self._num_read += len(text)
        pieces = self._parser.push(text) if text else []
        self.num_reasoning_tokens += was_reasoning or self._parser.is_reasoning
        if event.finish is not None:
            pieces += self._parser.finish()
        if not reading.shows_reasoning:
            pieces = [piece for piece in pieces if not isinstance(piece, Reasoning)]
        return pieces


def _merged(pieces: Sequence[Piece]) -> list[Piece]:
    result: list[Piece] = []
    for piece in pieces:
        last = result[-1] if result else None
        if isinstance(piece, CallStart) or isinstance(last, CallStart) or type(last) is not type(piece):
            result.append(piece)
        else:
            result[-1] = dataclasses.replace(last, text=last.text + piece.text)
    return result
