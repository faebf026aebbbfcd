"""What the answer to a chat may be, for one model: its markers, what constrains it, how it is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tgi_asgi.http.openai_constraints import Constraint
from tgi_asgi.http.openai_reply import ReplyPlan
from tgi_asgi.http.openai_schema import ChatRequest
from tgi_asgi.http.openai_tools import ToolPlan
from tgi_asgi.settings import Settings
from tgi_asgi.text.constrain.answer import ToolUse, answer_grammar
from tgi_asgi.text.constrain.source import GrammarSource, literal
from tgi_asgi.text.tools.reasoning import ReasoningStyle, style_of
from tgi_asgi.text.tools import ToolFormat, choose_format

if TYPE_CHECKING:
    from tgi_asgi.http.context import Served


@dataclass(frozen=True, slots=True)
class AnswerPlan:
    """A chat request's tools and constraint, seen with the model's template and the end of the prompt."""

    request: ChatRequest
    tools: ToolPlan | None
    constraint: Constraint | None
    served: Served
    settings: Settings
    special_ids: Mapping[str, int]  # by text
    prompt_tail: str

    @property
    def is_constrained(self) -> bool:
        """Whether there is a grammar."""
        return self.tools is not None or self.constraint is not None

    @property
    def param(self) -> str:
        """The field that a refused grammar comes from."""
        return "tools" if self.tools is not None else self.constraint.param if self.constraint else ""

    def grammar_source(self) -> GrammarSource | None:
        """Return the grammar of the whole answer, or None; milliseconds for large schemas.

        Raises:
            InvalidRequest: a schema is too large.
        """
        content = self.constraint.source() if self.constraint is not None else None
        style = self._style()
        use = None
        if self.tools is not None:
            use = ToolUse(self._format(), self.tools.specs, self.tools.must_call, self.tools.is_parallel)
        return answer_grammar(
            content,
            use,
            style,
            is_reasoning_open=style is not None and style.is_open(self.prompt_tail),
            mark=self._mark,
        )

    def reply_plan(self) -> ReplyPlan | None:
        """Return how the answer is read, or None where it is text and nothing else."""
        style = self._style()
        tools = self._format() if self.tools is not None else None
        if style is None and tools is None:
            return None
        request = self.request
        special = self.special_ids
        kept = frozenset(special[text] for text in self._markers(style, tools) if text in special)
        shows_all = request.skip_special_tokens is False
        return ReplyPlan(
            style,
            tools,
            is_reasoning_open=style is not None and style.is_open(self.prompt_tail),
            is_named=self.tools is not None and self.tools.is_named,
            shows_reasoning=request.include_reasoning is not False,
            is_compat=self.settings.tgi_compat,
            specs=self.tools.specs if self.tools is not None else (),
            special_ids=frozenset() if shows_all else self.served.tokenizer.special_ids,
            kept=kept,
            must_call=self.tools is not None and self.tools.must_call,
        )

    def _style(self) -> ReasoningStyle | None:
        template = self.served.chat_template
        style = style_of(template.source) if template is not None else None
        is_off = self.request.separate_reasoning is False
        return None if style is None or is_off or style.is_closed(self.prompt_tail) else style

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
