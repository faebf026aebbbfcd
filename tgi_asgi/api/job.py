"""One prompt of a client's request and how to answer it, independent of the API.

Fields in errors (`errors.Field`) are called "prompt", "max_tokens", "min_tokens", "tools", "tool_choice";
each dialect spells them as its clients do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from tgi_asgi.api.limits import Overflow
from tgi_asgi.api.prompt_images import Images
from tgi_asgi.errors import Field
from tgi_asgi.text.chat.message import ChatMessage, ChatTool
from tgi_asgi.text.constrain.source import GrammarSource, source_of
from tgi_asgi.types import SamplingParams

if TYPE_CHECKING:
    from tgi_asgi.text.constrain.grammar import Grammar
    from tgi_asgi.text.tools import ToolSpec


@dataclass(slots=True)
class Conversation:
    """A chat in the form that chat templates expect.

    Attributes:
        messages: A list as `content` has plain texts, and `{"type": "image"}` for each of the images.
        offers_tools: Whether the tools may be called; templates also receive tools that may not.
        variables: Additional variables of the template.
        is_continued: Whether the last message is left open for the model to continue.
        adds_turn: Whether the prompt ends by opening the assistant's turn.
        adds_special_tokens: Whether the tokenizer adds its own to what the template writes; None: as
            `transformers` does for the model.
        echoes: Whether the answer starts with the text of the continued message.
        tool_prompt: TGI's text to add after the last message if there are tools.
    """

    messages: list[ChatMessage]
    tools: list[ChatTool] | None = None
    offers_tools: bool = True
    variables: Mapping[str, Any] = field(default_factory=dict)
    is_continued: bool = False
    adds_turn: bool = True
    adds_special_tokens: bool | None = None
    echoes: bool = False
    tool_prompt: str | None = None
    images: Images | None = None


@dataclass(slots=True)
class Text:
    """A prompt that is not a chat: text, or checked token ids.

    Attributes:
        content: The text, with the model's placeholder for each of the images; or the ids.
        needs_text: Whether its text is needed in addition to its tokens, even if it came as ids.
        may_be_empty: Whether an empty text stands for the beginning of a document, instead of being refused.
        suffix: The text after the one that the model fills in; only of a prompt that is text, for a model
            that can (`Served.fill`).
    """

    content: str | list[int]
    adds_special_tokens: bool = True
    needs_text: bool = False
    echoes: bool = False
    shows_special_tokens: bool = False
    may_be_empty: bool = False
    suffix: str = ""
    field: Field = ("prompt",)
    images: Images | None = None


@dataclass(slots=True)
class Constraint:
    """A constraint on an answer's text, and the client's name of the field that asked for it.

    Attributes:
        make: Returns the grammar's source; takes milliseconds for large schemas.
        prefix: Start of the message if the grammar is refused.
        grammar: The compiled grammar, shared by the prompts of one call.
    """

    param: str
    make: Callable[[], GrammarSource]
    prefix: str = ""
    grammar: Grammar | None = None

    @classmethod
    def of(cls, param: str, kind: str, value: Any, *, is_strict: bool = False) -> Constraint:
        """Return a constraint of a kind that `source_of` supports, for the field that asked for it."""
        return cls(param, partial(source_of, kind, value, is_strict=is_strict), f"`{param}`: ")


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """The functions that the model may call; absent if it may call none."""

    specs: Sequence[ToolSpec]
    must_call: bool = False
    is_named: bool = False  # the client chose the function; OpenAI then reports finish_reason "stop"
    is_parallel: bool = True


@dataclass(slots=True, kw_only=True)
class Job:
    """One prompt and how to answer it; each of its choices is a sequence in the engine.

    Attributes:
        check: Further validation, done once there is a permit (TGI's order).
        where: Its path in the call, prepended to the field of a refusal: `instances[2]`.
        max_tokens: Number that the client asked for; None: `default_max_tokens`, or the rest of the context.
        keep_tokens: Number of tokens to keep at the prompt's end, or those that fit the context; None: all.
        reads_reasoning: Whether a reasoning section is separated from the content.
        reasoning_budget: Maximum number of tokens of reasoning; "default": that of the settings.
        adapter: Name of its adapter, if the API has a field for it (`adapter_id`).
    """

    prompt: Conversation | Text
    sampling: SamplingParams
    n: int = 1
    check: Callable[[], None] | None = None
    where: str = ""
    max_tokens: int | None = None
    default_max_tokens: int | None = None
    overflow: Overflow = Overflow.REFUSED
    keep_tokens: int | Literal["fitting"] | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: frozenset[int] = frozenset()
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True
    constraint: Constraint | None = None
    tools: ToolChoice | None = None
    reads_reasoning: bool = True
    shows_reasoning: bool = True
    reasoning_budget: int | Literal["any", "default"] = "default"
    priority: int = 0
    cache_salt: str | None = None
    prompt_logprobs: int | None = None
    seeds: tuple[int, ...] = ()
    adapter: str | None = None
