"""What a client asks for, in no API's words: a dialect makes a `Call` of a body, `life.py` carries it out.

Fields in errors (`errors.Field`) are called "prompt", "max_tokens", "min_tokens", "tools", "tool_choice";
each dialect spells them as its clients do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from tgi_asgi.api.limits import Room
from tgi_asgi.api.parse import refuse_field
from tgi_asgi.errors import Field, TgiError
from tgi_asgi.text.constrain.source import GrammarSource, source_of
from tgi_asgi.types import (
    Channel,
    GenerationRequest,
    ModelInfo,
    ProcessedImage,
    SamplingParams,
    TokenEvent,
)

if TYPE_CHECKING:
    from tgi_asgi.api.answer import Reading
    from tgi_asgi.api.context import Served
    from tgi_asgi.api.prompt import Prompt
    from tgi_asgi.text.constrain.grammar import Grammar
    from tgi_asgi.text.tools import ToolSpec

Choices = Sequence[Sequence[TokenEvent]]  # of one prompt: each choice's events


@dataclass(frozen=True, slots=True)
class ImageSource:
    """An image as a client gives it: a URL, or a file in base64; `param` is the field by its own name."""

    content: str
    param: str
    is_base64: bool = False


@dataclass(slots=True)
class Images:
    """The images of one prompt, in order; who reads its parts adds them, `api/images.py` loads them.

    There is one only where the model has eyes.
    """

    sources: list[ImageSource] = field(default_factory=list)
    loaded: list[tuple[bytes, ProcessedImage]] = field(default_factory=list)  # with their digests

    def add(self, content: object, param: str, *, is_base64: bool = False) -> dict[str, str]:
        """Take an image; return what stands for it in a message.

        Raises:
            InvalidRequest: it is no text.
        """
        if not isinstance(content, str):
            refuse_field(param, "must be a string")
        self.sources.append(ImageSource(content, param, is_base64))
        return {"type": "image"}


@dataclass(slots=True)
class Conversation:
    """A chat, as chat templates take it.

    Attributes:
        messages: plain dicts with `role`, `content` (a text, None, or a list of texts and of `{"type":
            "image"}` for each of the images) and what else there is; calls are `{"id", "type": "function",
            "function": {"name", "arguments"}}`.
        tools: `{"type": "function", "function": {...}}` each.
        offers_tools: they may be called; templates are told of those that may not, too.
        variables: further ones of the template.
        is_continued: the last message is left open, for the model to go on with it.
        adds_turn: the prompt ends by opening the assistant's turn.
        echoes: the answer begins with the text of the message that is continued.
        tool_prompt: TGI's: what to say behind the last message where tools are given.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    offers_tools: bool = True
    variables: Mapping[str, Any] = field(default_factory=dict)
    is_continued: bool = False
    adds_turn: bool = True
    adds_special_tokens: bool = False
    echoes: bool = False
    tool_prompt: str | None = None
    images: Images | None = None


@dataclass(slots=True)
class Text:
    """A prompt that is no chat: text, or token ids that have been checked.

    `needs_text`: its text is wanted beside its tokens, also where it came as ids. The text has the model's
    placeholder for each of the images.
    """

    content: str | list[int]
    adds_special_tokens: bool = True
    needs_text: bool = False
    echoes: bool = False
    shows_special_tokens: bool = False
    field: Field = ("prompt",)
    images: Images | None = None


@dataclass(slots=True)
class Constraint:
    """What an answer's text must match, and the field that asked for it, as the client knows it.

    Attributes:
        make: takes milliseconds for large schemas.
        prefix: of what is said where the grammar is refused.
        grammar: once it is compiled: the prompts of one call share it.
    """

    param: str
    make: Callable[[], GrammarSource]
    prefix: str = ""
    grammar: Grammar | None = None

    @classmethod
    def of(cls, param: str, kind: str, value: Any, *, is_strict: bool = False) -> Constraint:
        """Return a constraint of one of the kinds that `source_of` knows, for the field that asked for it."""
        return cls(param, partial(source_of, kind, value, is_strict=is_strict), f"`{param}`: ")


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """Which functions the model may call; there is none where nothing may be called."""

    specs: Sequence[ToolSpec]
    must_call: bool = False
    is_named: bool = False  # the client chose the function: OpenAI then says that the answer just stopped
    is_parallel: bool = True


@dataclass(slots=True, kw_only=True)
class Job:
    """One prompt and what is wanted for it; each of its choices is a sequence of the engine's.

    Attributes:
        check: what else may refuse it, once there is a permit (TGI's order).
        where: its place in the call, put before the field of a refusal: `instances[2]`.
        max_tokens: what the client asked for; None: `default_max_tokens`, or the rest of the context.
        keep_tokens: of the prompt's end; -1: as many as the context has room for.
        reads_reasoning: a reasoning section is told apart from the content.
        adapter: the name of the one that it wants, where the API has a field for it (`adapter_id`).
    """

    prompt: Conversation | Text
    sampling: SamplingParams
    n: int = 1
    check: Callable[[], None] | None = None
    where: str = ""
    max_tokens: int | None = None
    default_max_tokens: int | None = None
    room: Room = Room.REFUSED
    keep_tokens: int | None = None
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
    priority: int = 0
    cache_salt: str | None = None
    prompt_logprobs: int | None = None
    seeds: tuple[int, ...] = ()
    adapter: str | None = None


@dataclass(slots=True, kw_only=True)
class Call:
    """One request of a client.

    Attributes:
        jobs: where there are none, the renderer's `whole` answers at once.
        model: the name that the client gave.
        render: makes what turns the answer's tokens into the dialect's bytes.
        stream_type, keep_alive: of a streamed answer: its media type, and what fills a silence.
        is_sum: times and counts are over several prompts; TGI has no `x-compute-time` then.
    """

    jobs: Sequence[Job]
    render: Callable[[Generation], Renderer]
    model: str | None = None
    stream: bool = False
    stream_type: bytes = b"text/event-stream; charset=utf-8"
    keep_alive: bytes = b":\n\n"
    is_sum: bool = False

    @property
    def num_choices(self) -> int:
        return sum(job.n for job in self.jobs)


@dataclass(slots=True)
class Prepared:
    """A job that the engine can take, and how its answer is to be read (None: it is text)."""

    job: Job
    prompt: Prompt
    request: GenerationRequest
    reading: Reading | None


@dataclass(slots=True)
class Generation:
    """A call under way: what its renderer knows.

    Attributes:
        model: the name to answer with.
        channels: of the jobs, in order; filled when they are submitted.
        num_shown: tokens of the whole answer that counts, where a renderer chose among several.
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
    """Makes the bytes of one call's answer: `whole`, or the others; in a thread where that takes long."""

    def whole(self, parts: Sequence[Choices]) -> bytes:
        """Return the body that answers the jobs' choices."""

    def render(self, part: int, events: Sequence[TokenEvent]) -> bytes:
        """Return whole frames for the new events of job number `part`, or nothing."""

    def close(self) -> bytes:
        """Return what follows the last choice's last frame: nothing, where that says that it is the last."""
        return b""

    def fail(self, error: TgiError) -> bytes:
        """Return what ends a stream that has begun and cannot go on."""
