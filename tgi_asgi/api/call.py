"""A client's request, independent of the API: a dialect makes a `Call` from a body, and `life.py` runs it.

Fields in errors (`errors.Field`) are called "prompt", "max_tokens", "min_tokens", "tools", "tool_choice";
each dialect spells them as its clients do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Protocol

from tgi_asgi.api.limits import Overflow
from tgi_asgi.api.parse import refuse_field
from tgi_asgi.errors import Field, TgiError
from tgi_asgi.model_info import ModelInfo
from tgi_asgi.text.chat.message import ChatMessage, ChatTool
from tgi_asgi.text.constrain.source import GrammarSource, source_of
from tgi_asgi.types import Channel, GenerationRequest, ProcessedImage, SamplingParams, TokenEvent

if TYPE_CHECKING:
    from tgi_asgi.api.answer import Reading
    from tgi_asgi.api.context import Served
    from tgi_asgi.api.prompt import Prompt
    from tgi_asgi.text.constrain.grammar import Grammar
    from tgi_asgi.text.tools import ToolSpec

Choices = Sequence[Sequence[TokenEvent]]  # each choice's events, for one prompt


@dataclass(frozen=True, slots=True)
class ImageSource:
    """An image as a client sends it: a URL, or a base64 file; `param` is the client's name of the field."""

    content: str
    param: str
    is_base64: bool = False


@dataclass(slots=True)
class Images:
    """The images of one prompt, in order. Parsers of message parts add them; `api/images.py` loads them.

    Exists only if the model accepts images; false if there are none.
    """

    sources: list[ImageSource] = field(default_factory=list)
    loaded: list[tuple[bytes, ProcessedImage]] = field(default_factory=list)  # with their digests

    def __len__(self) -> int:
        return len(self.sources)

    def add(self, content: object, param: str, *, is_base64: bool = False) -> dict[str, str]:
        """Add an image; return its placeholder for a message.

        Raises:
            InvalidRequest: if it is not a string.
        """
        if not isinstance(content, str):
            refuse_field(param, "must be a string")
        self.sources.append(ImageSource(content, param, is_base64))
        return {"type": "image"}


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

    `needs_text`: whether its text is needed in addition to its tokens, even if it came as ids. The text has
    the model's placeholder for each of the images. `may_be_empty`: whether an empty text stands for the
    beginning of a document, instead of being refused.
    """

    content: str | list[int]
    adds_special_tokens: bool = True
    needs_text: bool = False
    echoes: bool = False
    shows_special_tokens: bool = False
    may_be_empty: bool = False
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
        reasoning_budget: Maximum number of tokens of reasoning; None: the administrator's.
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
    reasoning_budget: int | Literal["any"] | None = None
    priority: int = 0
    cache_salt: str | None = None
    prompt_logprobs: int | None = None
    seeds: tuple[int, ...] = ()
    adapter: str | None = None


@dataclass(slots=True, kw_only=True)
class Call:
    """One request of a client.

    Attributes:
        jobs: The prompts; if there are none, the renderer's `whole` answers at once.
        model: Model name that the client sent.
        render: Creates the renderer that turns the answer's tokens into the dialect's bytes.
        stream_type, keep_alive: Media type of a streamed answer, and the bytes that fill a silence.
        is_sum: Whether times and counts cover several prompts; TGI then omits `x-compute-time`.
        num_repeats: How often the last events of a stream repeat all tokens with their log-probabilities; the
            renderer then keeps them.
        has_headers: Whether a complete answer has TGI's headers (`x-total-time` …).
    """

    jobs: Sequence[Job]
    render: Callable[[Generation], Renderer]
    model: str | None = None
    stream: bool = False
    stream_type: bytes = b"text/event-stream; charset=utf-8"
    keep_alive: bytes = b":\n\n"
    is_sum: bool = False
    num_repeats: int = 0
    has_headers: bool = True

    @property
    def num_choices(self) -> int:
        return sum(job.n for job in self.jobs)


@dataclass(slots=True)
class Prepared:
    """A job ready for the engine, and how to parse its answer (None: it is plain text)."""

    job: Job
    prompt: Prompt
    request: GenerationRequest
    reading: Reading | None


@dataclass(slots=True)
class Generation:
    """A call in progress, as its renderer sees it.

    Attributes:
        model: Name to answer with.
        channels: The jobs' channels, in order; filled when they are submitted.
        num_shown: Number of tokens of a whole answer that count, if the renderer chose among several choices.
    """

    served: Served
    model: str
    jobs: Sequence[Prepared]
    channels: list[Channel]
    num_shown: int | None = None

    @property
    def info(self) -> ModelInfo:
        return self.served.info

    @property
    def num_prompt_tokens(self) -> int:
        return sum(len(job.request.prompt_ids) for job in self.jobs)

    @property
    def num_cached_tokens(self) -> int:
        return sum(channel.stats.cached_tokens for channel in self.channels)


class Renderer(Protocol):
    """Produces the bytes of one call's answer: `whole`, or the other methods; in a thread if that is slow."""

    def whole(self, job_choices: Sequence[Choices]) -> bytes:
        """Return the body of an answer; `job_choices[i]` has the choices of job number i."""

    def render(self, job_index: int, events: Sequence[TokenEvent]) -> bytes:
        """Return complete frames for new events of job number `job_index`, or nothing."""

    def close(self) -> bytes:
        """Return what follows the last choice's last frame: nothing if that frame marks the end itself."""
        return b""

    def fail(self, error: TgiError) -> bytes:
        """Return the frames that end a started stream after a failure."""
