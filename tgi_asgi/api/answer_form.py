"""What constrains the answer to a job, for one model, and how the answer is parsed.

`life.py` makes one form for each job, once the prompt is known. Most models mark reasoning and calls in the
text of their answer (`MarkedForm`); gpt-oss writes messages in harmony's format (`HarmonyForm`).
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from tgi_asgi.api.answer import Reading
from tgi_asgi.api.job import Constraint, Conversation, Job, Text
from tgi_asgi.errors import InvalidRequest
from tgi_asgi.settings import Settings
from tgi_asgi.text.constrain.answer_grammar import ToolUse, answer_grammar
from tgi_asgi.text.constrain.compiler_errors import limited_checks
from tgi_asgi.text.constrain.harmony import harmony_grammar
from tgi_asgi.text.constrain.source import GrammarSource, after_a_space, literal
from tgi_asgi.text.stop_scope import HarmonyMarks, ReasoningMarks
from tgi_asgi.text.tools import ToolFormat, choose_format, harmony, recognised_format
from tgi_asgi.text.tools.answer import AnswerParser
from tgi_asgi.text.tools.arguments import ToolSpec, freed
from tgi_asgi.text.tools.harmony import HarmonyParser
from tgi_asgi.text.tools.reasoning import style_of, wrapper_of
from tgi_asgi.types import ReasoningBudget

if TYPE_CHECKING:
    from tgi_asgi.api.exchange import Exchange
    from tgi_asgi.api.served import Served
    from tgi_asgi.text.chat.template import ChatTemplate
    from tgi_asgi.text.constrain.compiler import GrammarCompiler
    from tgi_asgi.text.constrain.grammar import Grammar

logger = logging.getLogger(__name__)

_MAX_HEADER_CHARS = 1000


def answer_form(job: Job, served: Served, settings: Settings, prompt_tail: str) -> AnswerForm:
    """Return the form of a job's answer; `prompt_tail` is the end of the prompt."""
    wanted = _chosen(settings.tool_format)
    is_harmony = harmony.recognises(_source(job, served)) if wanted is None else wanted == harmony.NAME
    if is_harmony and isinstance(job.prompt, Conversation):
        return HarmonyForm(job, served, settings, prompt_tail)
    return MarkedForm(job, served, settings, prompt_tail)


class AnswerForm(ABC):
    """A job's tools and constraint, combined with the model's format and the end of the prompt.

    Attributes:
        drops_space: Whether the vocabulary writes a space before the answer's first word, which is not shown.
    """

    def __init__(self, job: Job, served: Served, settings: Settings) -> None:
        self._job = job
        self._served = served
        self._is_allowed = not settings.disable_grammar_support
        is_own_text = served.info.encoder_decoder is not None  # and does not continue the prompt's
        self.drops_space = is_own_text and served.tokenizer.drops_first_space
        self._specs = job.tools.specs if job.tools is not None else ()

    @property
    def may_free_tools(self) -> bool:
        """Whether there are tools whose arguments need not be enforced."""
        return any(not spec.is_strict for spec in self._specs)

    def grammar_source(self, *, frees_tools: bool = False) -> GrammarSource:
        """Return the grammar of a constrained answer; takes milliseconds for large schemas.

        Args:
            frees_tools: Whether tools that are not strict may have any arguments.

        Raises:
            InvalidRequest: if grammars are disabled, or a schema is refused.
        """
        if not self._is_allowed:
            raise InvalidRequest("grammar is not supported")
        content = self._job.constraint.make() if self._job.constraint is not None else None
        source = self._grammar(content, freed(self._specs) if frees_tools else self._specs)
        assert source is not None, "an answer without tools and constraint has no grammar"
        return after_a_space(source) if self.drops_space else source

    @abstractmethod
    def _grammar(self, content: GrammarSource | None, specs: Sequence[ToolSpec]) -> GrammarSource | None:
        """Return the answer's grammar; `content` is that of its text, and `specs` the job's tools."""

    @abstractmethod
    def reading(self) -> Reading | None:
        """Return how to parse the answer, or None if it is plain text."""

    @abstractmethod
    def reasoning_budget(self, num_tokens: int) -> ReasoningBudget | None:
        """Return the bound on the reasoning; None if the model has none, or its end is not a single token."""

    @abstractmethod
    def reasoning_marks(self) -> ReasoningMarks | HarmonyMarks | None:
        """Return how the answer marks reasoning, or None if it has none."""

    def _budget(
        self, num_tokens: int, start: str, end: str, answer: str, *, is_open: bool
    ) -> ReasoningBudget | None:
        """Return the bound on reasoning between two marks; `answer` is what then begins the answer."""
        encode = partial(self._served.tokenizer.encode, add_special_tokens=False)
        if len(encode(end)) != 1:
            return None
        end_ids, answer_ids = (*encode(end),), (*encode(answer),)
        if self._job.tools is None:  # else it may call a tool next
            end_ids, answer_ids = end_ids + answer_ids, ()
        return ReasoningBudget(num_tokens, (*encode(start),), end_ids, is_open, answer_ids)

    def _special_ids(self, markers: Iterable[str]) -> frozenset[int]:
        special = self._served.special_ids
        return frozenset(special[text] for text in markers if text in special)

    def _mark(self, marker: str) -> str:
        token_id = self._served.special_ids.get(marker)
        return literal(marker) if token_id is None else f"<[{token_id}]>"


class MarkedForm(AnswerForm):
    """An answer of text, in which markers may enclose reasoning, calls and the text itself."""

    def __init__(self, job: Job, served: Served, settings: Settings, prompt_tail: str) -> None:
        super().__init__(job, served, settings)
        template = served.chat_template
        is_read = job.reads_reasoning and isinstance(job.prompt, Conversation)
        source = _source(job, served)
        style = style_of(source, _chosen(settings.reasoning_format)) if is_read else None
        self._wrapper = wrapper_of(source) if is_read else None
        self._style = None if style is None or style.is_closed(prompt_tail) else style
        self._is_open = self._style is not None and (
            self._style.is_open(prompt_tail) or self._style.is_unfinished(_begun(job.prompt))
        )
        self._use: ToolUse | None = None
        if job.tools is not None:
            form, is_known = tool_format(template, settings)
            # A model without a known tool format does not know when to stop calling either: forced to call
            # tools, it repeats calls until `max_tokens`.
            is_parallel = job.tools.is_parallel and (is_known or not job.tools.must_call)
            if template is not None and not template.takes_several_calls:
                is_parallel = False  # the model was not trained to, and the history could not show them
            self._use = ToolUse(form, job.tools.specs, job.tools.must_call, is_parallel)

    def _grammar(self, content: GrammarSource | None, specs: Sequence[ToolSpec]) -> GrammarSource | None:
        if self._use is None and self._style is None and self._wrapper is None:
            return content
        return answer_grammar(
            content,
            replace(self._use, specs=specs) if self._use is not None else None,
            self._style,
            is_reasoning_open=self._is_open,
            mark=self._mark,
            wrapper=self._wrapper,
        )

    def reading(self) -> Reading | None:
        style, use, wrapper = self._style, self._use, self._wrapper
        if style is None and use is None and wrapper is None:
            return None
        markers = [
            *(style.all_markers if style else ()),
            *(wrapper.markers if wrapper else ()),
            *(use.format.markers if use else ()),
        ]
        parser = partial(
            AnswerParser,
            style,
            use.format if use else None,
            use.specs if use else (),
            is_reasoning_open=self._is_open,
            must_call=use is not None and use.must_call,
            wrapper=wrapper,
            early=use.format.leaves_reasoning(self._mark) if use else None,
        )
        return Reading(parser, self._special_ids(markers), self._job.shows_reasoning)

    def reasoning_budget(self, num_tokens: int) -> ReasoningBudget | None:
        style = self._style
        if style is None:
            return None
        budget = self._budget(num_tokens, style.start, style.end, "", is_open=self._is_open)
        if budget is None or self._use is None or self._use.format.leaves_reasoning(self._mark) is None:
            return budget
        ids = self._served.tokenizer.encode(self._use.format.marker, add_special_tokens=False)
        return replace(budget, call_id=ids[0]) if len(ids) == 1 else budget

    def reasoning_marks(self) -> ReasoningMarks | None:
        style = self._style
        return None if style is None else ReasoningMarks(style.start, style.end, is_open=self._is_open)


class HarmonyForm(AnswerForm):
    """An answer in harmony's format, in which reasoning, calls and text are messages."""

    def __init__(self, job: Job, served: Served, settings: Settings, prompt_tail: str) -> None:
        super().__init__(job, served, settings)
        self._is_open = harmony.is_open(prompt_tail)
        self._has_tools = job.tools is not None
        self._must_call = job.tools is not None and job.tools.must_call

    def _grammar(self, content: GrammarSource | None, specs: Sequence[ToolSpec]) -> GrammarSource | None:
        return harmony_grammar(
            content, specs if self._has_tools else None, self._mark, must_call=self._must_call,
            is_reasoning_open=self._is_open,
        )  # fmt: skip

    def reading(self) -> Reading:
        parser = partial(
            HarmonyParser, self._specs, is_reasoning_open=self._is_open, must_call=self._must_call
        )
        return Reading(parser, self._special_ids(harmony.MARKERS), self._job.shows_reasoning)

    def reasoning_budget(self, num_tokens: int) -> ReasoningBudget | None:
        return self._budget(num_tokens, *harmony.REASONING, is_open=self._is_open)

    def reasoning_marks(self) -> HarmonyMarks:
        return HarmonyMarks(self._is_open)


async def compile_grammar(
    exchange: Exchange, compiler: GrammarCompiler, job: Job, form: AnswerForm
) -> Grammar:
    """Compile a job's grammar; schema keywords that are not enforced go into a header of the response.

    Raises:
        InvalidRequest: if the constraint or a tool is refused; the error names which.
    """
    constraint = job.constraint
    if constraint is not None and constraint.grammar is not None and isinstance(job.prompt, Text):
        return constraint.grammar
    grammar, ignored = await exchange.context.grammar_threads.run_for(
        exchange.tenant, _compile, compiler, job, form
    )
    if constraint is not None:
        constraint.grammar = grammar
    if ignored:
        _report(exchange, ignored)
    return grammar


def _compile(compiler: GrammarCompiler, job: Job, form: AnswerForm) -> tuple[Grammar, Sequence[str]]:
    """Return the grammar, and the schema keywords that it does not enforce.

    Hundreds of tools may be too large for one grammar. Those that are not strict may then have any arguments:
    their names are still enforced.
    """
    for frees_tools in (False, True) if form.may_free_tools else (False,):
        try:
            with limited_checks():
                source = form.grammar_source(frees_tools=frees_tools)
            return compiler.compile(source), source.ignored
        except InvalidRequest as error:
            refusal = error
    raise _with_field(refusal, compiler, job)


def _with_field(error: InvalidRequest, compiler: GrammarCompiler, job: Job) -> InvalidRequest:
    """Return a refusal that names the client's field: that of the constraint, or the tools."""
    if error.param is not None or error.field is not None:
        return error
    constraint = job.constraint
    if constraint is None or (job.tools is not None and _compiles(constraint, compiler)):
        return InvalidRequest(f"`{{field}}`: {error.message}", field=("tools",))
    return InvalidRequest(constraint.prefix + error.message, param=constraint.param)


def _compiles(constraint: Constraint, compiler: GrammarCompiler) -> bool:
    """Return whether a constraint is accepted without the tools, which are then to blame."""
    try:
        compiler.compile(constraint.make())
    except InvalidRequest:
        return False
    return True


def _report(exchange: Exchange, ignored: Sequence[str]) -> None:
    names = ",".join(ignored)[:_MAX_HEADER_CHARS].encode("unicode_escape")
    logger.info("request %s: schema keywords ignored: %s", exchange.request_id, names.decode())
    header = (b"x-tgi-ignored-keywords", names)
    if header not in exchange.response_headers:  # another prompt of the call may have added it
        exchange.response_headers.append(header)


def tool_format(template: ChatTemplate | None, settings: Settings) -> tuple[ToolFormat, bool]:
    """Return a model's format of calls, and whether it is known: chosen, or shown by the template."""
    source = template.tool_source if template is not None else ""
    wanted = _chosen(settings.tool_format)
    wanted = None if wanted == harmony.NAME else wanted
    return choose_format(source, wanted), wanted is not None or recognised_format(source) is not None


def _source(job: Job, served: Served) -> str:
    """Return the source of the chat template that renders a job's prompt."""
    template = served.chat_template
    if template is None:
        return ""
    has_tools = isinstance(job.prompt, Conversation) and job.prompt.tools
    return template.tool_source if has_tools else template.source


def _begun(prompt: Conversation | Text) -> str:
    """Return the text of the answer that a prompt asks to continue."""
    if not isinstance(prompt, Conversation) or not prompt.is_continued:
        return ""
    content = prompt.messages[-1].get("content") or ""  # None beside calls
    return content if isinstance(content, str) else "".join(part for part in content if isinstance(part, str))


def _chosen(name: str) -> str | None:
    """Return the format that the administrator chose, or None if the template decides."""
    return None if name == "auto" else name
