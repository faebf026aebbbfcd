"""Types passed between HTTP and the engine: requests in, token events out, through a channel.

These types import no torch, Starlette or asyncio. `api/` builds `GenerationRequest` and `engine/` builds
`TokenEvent`; tests replace either side with a script.
"""

from __future__ import annotations

import enum
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, overload

from tgi_asgi.errors import TgiError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import PIL.Image

    from tgi_asgi.text.constrain.grammar import Grammar
    from tgi_asgi.text.stop_scope import HarmonyMarks, ReasoningMarks

    Vector = npt.NDArray[np.float32]

# Called with loading progress, from any thread: the stage, the amount done (bytes, tensors), and the total
# if known.
Progress = Callable[[str, int, int | None], None]


def no_progress(stage: str, done: int, total: int | None) -> None:
    """Take progress that nobody follows."""


class FinishReason(enum.Enum):
    """Why a choice ended. Each API spells it differently; `api/` does that."""

    LENGTH = "length"  # max_tokens, or the end of the context
    EOS = "eos"  # the model's end-of-sequence token, or the end of the request's grammar
    STOP = "stop"  # a stop string or a stop token id of the request


class LogprobsMode(enum.Enum):
    """Which distribution log-probabilities describe."""

    RAW = "raw"  # softmax of the model's logits (OpenAI routes)
    PROCESSED = "processed"  # the distribution that was sampled from (TGI routes)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is sampled: penalties, bias, temperature, top-k, top-p, min-p, typical-p, seed.

    `temperature == 0` is greedy: the argmax after penalties and bias; ties go to the lowest id.
    """

    temperature: float = 1.0  # >= 0
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # (0, 1]; 1: off
    min_p: float = 0.0  # [0, 1]; 0: off
    typical_p: float = 1.0  # (0, 1]; 1: off
    repetition_penalty: float = 1.0  # > 0, multiplicative, over prompt and output
    frequency_penalty: float = 0.0  # multiplied by the token's count in the output
    presence_penalty: float = 0.0  # applied once if the token is in the output
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, added to its logit); <= -100 bans
    seed: int = 0  # [0, 2**63), always set: if the client sent none, HTTP chooses one below 2**53
    logprobs: int | None = None  # None: none; k: for the sampled token and the k best
    logprobs_mode: LogprobsMode = LogprobsMode.RAW


@dataclass(frozen=True, slots=True)
class StopConditions:
    """When a choice ends, and which text it keeps."""

    max_tokens: int  # >= 1, already clipped to the context
    min_tokens: int = 0  # until then, EOS and stop ids are masked and stop strings are not matched
    ignore_eos: bool = False
    stop_token_ids: frozenset[int] = frozenset()  # in addition to the model's EOS ids
    stop: tuple[str, ...] = ()  # matched on decoded text across tokens; the earliest wins, then the longest
    include_stop: bool = False  # keep the matched stop string in the text, and hold nothing back
    skip_special_tokens: bool = True  # special tokens produce no text ...
    shown_special_ids: frozenset[int] = frozenset()  # ... except these, by which answers are parsed
    reasoning: ReasoningMarks | HarmonyMarks | None = None  # of text in which stop strings are not matched
    drops_first_space: bool = False  # the space that a vocabulary writes before a text's first word


@dataclass(frozen=True, slots=True)
class ReasoningBudget:
    """How many tokens a choice may spend on reasoning before the end of the section is forced.

    Attributes:
        num_tokens: Maximum over all sections of the choice, >= 0; their marks do not count.
        start_ids: Tokens that begin a section, at least one.
        end_ids: Tokens that are forced at its end. The first of them ends it also where the model writes it.
        answer_ids: Tokens that are forced after these if the model has begun another section after a forced
            end: they begin the answer.
        is_open: Whether the prompt has begun a section.
        call_id: Token that begins a call, which also ends the section, so that no end is forced within it.
    """

    num_tokens: int
    start_ids: tuple[int, ...]
    end_ids: tuple[int, ...]
    is_open: bool
    answer_ids: tuple[int, ...] = ()
    call_id: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Image:
    """A decoded image of a request."""

    pixels: PIL.Image.Image  # RGB, upright
    digest: bytes  # 32-byte hash of its size and pixels
    param: str  # path of the image in the request, as the client's API names it


@dataclass(frozen=True, slots=True, eq=False)
class ProcessedImage:
    """An image, processed for the model."""

    text: str  # text that replaces its placeholder
    token_id: int  # token that the image's embeddings replace
    num_tokens: int  # how many of these tokens `text` has, at least one
    payload: Any  # opaque except to the runner
    num_bytes: int = 0  # size of what the request keeps of it; counted until the request ends
    needs_gap: bool = False  # whether another token must stand between its tokens and the next image's
    fence: str = ""  # token around it that two images side by side share (`text/images.py`)
    is_seen_by_all: bool = False  # see `ImageInput`


class ImageProcessor(Protocol):
    """Converts images to the model's input, and their placeholders to the prompt's image tokens.

    `placeholder` is the text of one of the tokenizer's special tokens. The chat template writes it once for
    each `{"type": "image"}`; HTTP writes it into prompts that are not chats.
    """

    @property
    def placeholder(self) -> str: ...

    @property
    def chat_text(self) -> str:
        """Text of an image, with one placeholder, in a chat whose template writes none; empty: it must."""

    @property
    def adds_special_tokens(self) -> bool:
        """Whether a chat gets the tokenizer's special tokens if its template has not written BOS."""

    def process(self, images: Sequence[Image]) -> Sequence[ProcessedImage]:
        """Return the images of one prompt, in order, in the model's form. Called in a worker thread.

        Raises:
            InvalidRequest: if the model cannot use an image; `param` names it.
        """


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class ImageInput:
    """An image within a prompt's tokens.

    It covers `num_tokens` tokens from `start`: the first to the last token that its embeddings replace,
    including row and tile tokens between them.

    If it `is_seen_by_all`, its embeddings replace no tokens. Layers of cross-attention read them, for any
    token of the sequence, even one before `start`. All such images are needed to compute any token.
    """

    digest: bytes
    start: int
    num_tokens: int
    payload: Any
    is_seen_by_all: bool = False


class Bidirectional(enum.Enum):
    """Which tokens of a vision model's prompt attend to later ones; a single step computes each such part."""

    NOTHING = "nothing"
    IMAGES = "images"  # each image's tokens
    PROMPT = "prompt"  # the whole prompt; none of it can be shared with another


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Adapter:
    """A LoRA adapter: the terms that a request adds to the model's matrix products.

    Attributes:
        key: Hash of the contents; adapters with the same key compute the same.
        weights: Opaque except to the runner.
    """

    name: str
    key: str
    weights: Any


class Lease(Protocol):
    """A request's reference to an adapter."""

    @property
    def adapter(self) -> Adapter: ...

    def release(self) -> None:
        """Release the reference. Idempotent."""


MAX_ADAPTER_NAME = 256  # characters, as many as a request may name a model with


def is_adapter_name(name: str) -> bool:
    """Return whether an adapter may have this name, which answers and log lines repeat."""
    return 0 < len(name) <= MAX_ADAPTER_NAME and name.isprintable()


class Adapters(Protocol):
    """The adapters that requests may name: `engine/adapters.py`."""

    def __contains__(self, name: object) -> bool: ...

    @property
    def names(self) -> list[str]:
        """Names of the adapters that requests may use."""

    @property
    def keys(self) -> Mapping[str, str]:
        """The content key of each adapter in `names`."""

    async def lease(self, name: str) -> Lease:
        """Return a reference to an adapter.

        Raises:
            UnknownAdapter, Unavailable, InvalidRequest, Overloaded: if it is not available, or not now.
        """

    async def add(self, name: str, location: str) -> None:
        """Read an adapter; requests may then name it.

        Raises:
            InvalidRequest, Overloaded: if the name is taken, it cannot be read, or there is no free slot.
        """

    async def replace(self, name: str, location: str) -> None:
        """Read an adapter, move an existing adapter's name to it, and wait until no request uses the old one.

        Raises:
            InvalidRequest, Overloaded: if it cannot be read or there is no free slot; the old adapter stays.
            UnknownAdapter: if the name was unloaded meanwhile.
        """

    async def remove(self, name: str) -> None:
        """Unload an adapter, and wait until no request uses it.

        Raises:
            UnknownAdapter: if no adapter has that name.
        """


class PoolingKind(enum.Enum):
    """How a prompt's hidden states after the last norm become one vector."""

    LAST = "last"  # the last token's
    CLS = "cls"  # the first token's
    MEAN = "mean"
    MEAN_SQRT_LEN = "mean_sqrt_len"  # their sum divided by the square root of their number
    WEIGHTED_MEAN = "weighted_mean"  # the n-th token has weight n
    MAX = "max"  # maximum of each dimension
    LOGITS = "logits"  # no state but logits of some tokens, or of a classifier's labels, after the last token


@dataclass(frozen=True, slots=True)
class Pooling:
    """Request for a vector of the prompt instead of generated tokens."""

    kind: PoolingKind
    token_ids: tuple[int, ...] = ()  # with LOGITS: the tokens whose logits are returned
    pad_id: int | None = None  # tokens of this id at the end of a prompt do not count

    @property
    def needs_all(self) -> bool:
        """Whether every token must be computed, so none may come from the prefix cache."""
        return self.kind not in (PoolingKind.LAST, PoolingKind.LOGITS)


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A validated request: every integer in it is within the model's bounds.

    The `n` choices share the prompt. Choice i samples with the random stream (seed, i), so it does not depend
    on n. With `seeds`, choice i samples as the only choice of a request with seed `seeds[i]` would.
    """

    request_id: str
    prompt_ids: Sequence[int]  # [1, max_input_tokens] ids, each < vocab_size
    sampling: SamplingParams
    stop: StopConditions
    n: int = 1
    priority: int = 0  # lower runs sooner
    cache_salt: str | None = None  # mixed into the prefix-cache key
    adapter: Adapter | None = None
    grammar: Grammar | None = None  # grammar that the output must match
    reasoning_budget: ReasoningBudget | None = None
    prompt_logprobs: int | None = None  # None: none; k: for each prompt token and the k best at its position
    seeds: tuple[int, ...] = ()  # n seeds that replace `sampling.seed`, or none
    images: tuple[ImageInput, ...] = ()  # in prompt order, not overlapping
    # If set, the result is a vector in `RequestStats.vector` instead of tokens: n and max_tokens are 1, and
    # the only event says that the vector is ready.
    pooling: Pooling | None = None
    second_start: int | None = None  # for a pair of texts: index in the prompt where the second begins

    @property
    def needs_all(self) -> bool:
        """Whether every prompt token must be computed, in order, so that none may come from the cache."""
        return self.prompt_logprobs is not None or (self.pooling is not None and self.pooling.needs_all)


class TopTokens(Sequence[tuple[int, float]]):
    """The likeliest tokens at a position, as `TokenEvent.top` has them, but packed.

    Twenty take 250 bytes, and 2.4 KB in a list of pairs, of which a request may keep a million.

    Args:
        packed: All ids as int32, followed by all log-probabilities as float32.
    """

    __slots__ = ("_packed",)

    def __init__(self, packed: bytes = b"") -> None:
        self._packed = packed

    @classmethod
    def of(cls, pairs: Sequence[tuple[int, float]]) -> TopTokens:
        """Pack pairs of an id and a log-probability, which is rounded to float32."""
        ids, logprobs = zip(*pairs, strict=True) if pairs else ((), ())
        return cls(array("i", ids).tobytes() + array("f", logprobs).tobytes())

    def __iter__(self) -> Iterator[tuple[int, float]]:
        view, middle = memoryview(self._packed), len(self._packed) // 2
        return zip(view[:middle].cast("i").tolist(), view[middle:].cast("f").tolist(), strict=True)

    def __len__(self) -> int:
        return len(self._packed) // 8

    @overload
    def __getitem__(self, index: int) -> tuple[int, float]: ...

    @overload
    def __getitem__(self, index: slice) -> list[tuple[int, float]]: ...

    def __getitem__(self, index: int | slice) -> tuple[int, float] | list[tuple[int, float]]:
        return [*self][index]

    def __eq__(self, other: object) -> bool:
        return [*self] == [*other] if isinstance(other, Sequence) else NotImplemented

    def __repr__(self) -> str:
        return repr([*self])


@dataclass(slots=True, eq=False)  # not frozen, which would make creation four times as slow: one per token
class TokenEvent:
    """One sampled token of one choice."""

    index: int  # the choice, [0, n)
    token_id: int
    # The token's own bytes in the text; b"" for a skipped special token and for a token that ends the choice
    # without being shown. They may end inside a UTF-8 character.
    data: bytes = b""
    # Text that may be shown now: whole characters, minus any that may begin a stop string. A choice's events
    # concatenate to its text.
    text: str = ""
    logprob: float | None = None  # natural logarithm, in the request's mode; None if not requested
    top: Sequence[tuple[int, float]] | None = None  # the k best as (id, logprob), descending
    is_special: bool = False  # one of the tokenizer's special tokens
    finish: FinishReason | None = None  # set on the choice's last event only
    stop: str | int | None = None  # the stop string or stop id that matched, with `finish == STOP`


# Per token of a prompt or of a chunk: its log-probability given the tokens before it (None at position 0),
# and the k best.
PromptLogprobs = list[tuple[float | None, Sequence[tuple[int, float]]]]


@dataclass(slots=True)
class RequestStats:
    """What the engine records of one request while it runs, and its results that are not tokens.

    Times are from `time.monotonic()`.
    """

    arrival_s: float
    scheduled_s: float | None = None  # first step that ran one of its tokens
    first_token_s: float | None = None
    finished_s: float | None = None
    cached_tokens: int = 0  # prompt tokens taken from the prefix cache
    generated_tokens: int = 0  # sampled tokens over all choices
    finishes: list[FinishReason] = field(default_factory=list)  # of the choices, in the order they ended
    prompt_logprobs: PromptLogprobs | None = None  # if `GenerationRequest.prompt_logprobs` asked for them
    vector: Vector | None = None  # the vector that `pooling` asked for, float32


class Sink(Protocol):
    """Receiver that HTTP attaches to a channel. Called on the event loop; must not block or raise."""

    def on_events(self, events: Sequence[TokenEvent]) -> None:
        """Receive all events since the last call, in order, choices interleaved."""

    def on_error(self, error: TgiError) -> None:
        """Receive the request's error; nothing follows."""


class Channel(Protocol):
    """One request's event stream, for all its n choices.

    It ends when every choice has had its event with `finish`, or with one error; never in any other way.
    """

    request: GenerationRequest
    stats: RequestStats

    def attach(self, sink: Sink) -> None:
        """Call `sink` from now on, first with any waiting events. May be called once."""

    def cancel(self) -> None:
        """Cancel the request: its blocks and permit are released within two steps. Idempotent."""


class EngineState(enum.Enum):
    """What `/health` reports."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    DEAD = "dead"


class Permit(Protocol):
    """Admission for n choices, running or waiting; released at the request's end, or by its holder."""

    @property
    def n(self) -> int: ...

    @property
    def tenant(self) -> str | None:
        """The tenant (API key) that the choices count against."""

    def split(self, n: int) -> Permit:
        """Return a separate permit for n of the choices, so one admission can cover several requests."""

    def release(self, *, has_run: bool = False) -> None: ...


class Engine(Protocol):
    """The engine as HTTP sees it."""

    @property
    def state(self) -> EngineState: ...

    def describe(self) -> dict[str, Any]:
        """Return the engine's current state for people to read, in JSON types only."""

    def acquire(self, n: int, tenant: str | None = None, *, is_accepted: bool = False) -> Permit:
        """Admit n choices before any work is done on them; tenants (API keys) share the capacity evenly.

        Args:
            is_accepted: Whether an accepted call needs more permits: it goes on while the engine drains.

        Raises:
            InvalidRequest: if n exceeds the capacity.
            Overloaded: if there is no capacity now; `retry_after_s` is estimated from the drain rate.
            Unavailable: if the engine is draining or dead.
        """

    def submit(self, request: GenerationRequest, permit: Permit) -> Channel:
        """Queue a request; its permit is released at its end, or at once if this raises."""

    def abort(self, request_id: str) -> int:
        """End the requests with this id, running or waiting, with an error; return their number."""

    def reset_prefix_cache(self) -> int:
        """Drop all cached prompts; return the number of blocks dropped."""
