"""What the answer to a job may be, for one model: what constrains it, and how it is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tgi_asgi.api.call import Conversation, Job
from tgi_asgi.api.reader import Reading
from tgi_asgi.errors import InvalidRequest
from tgi_asgi.settings import Settings
from tgi_asgi.text.constrain.answer import ToolUse, answer_grammar
from tgi_asgi.text.constrain.source import GrammarSource, literal
from tgi_asgi.text.tools import ToolFormat, choose_format
from tgi_asgi.text.tools.reasoning import ReasoningStyle, style_of

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
