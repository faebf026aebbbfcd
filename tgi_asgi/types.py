"""What passes between HTTP and the engine: a request in, token events out, through a channel.

Values only: no torch, no Starlette, no asyncio. `GenerationRequest` is built by `api/`, `TokenEvent` by
`engine/`; both are read by tests that replace the other side with a script.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from tgi_asgi.errors import TgiError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import PIL.Image

    from tgi_asgi.text.constrain.grammar import Grammar

    Vector = npt.NDArray[np.float32]

# Hears how far loading has come: the stage, what is done of it (bytes, tensors), and of how much if that is
# known. Called from any thread.
Progress = Callable[[str, int, int | None], None]


class FinishReason(enum.Enum):
    """Why a choice ended. The wire's spelling differs by API and belongs to `api/`."""

    LENGTH = "length"  # max_tokens, or the end of the context
    EOS = "eos"  # the model's own end-of-sequence token, or the end of the request's grammar
    STOP = "stop"  # a stop string or a stop token id of the request


class LogprobsMode(enum.Enum):
    """Which distribution log-probabilities describe."""

    RAW = "raw"  # softmax of the model's logits (OpenAI routes)
    PROCESSED = "processed"  # the distribution that was sampled from (TGI routes)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is drawn: penalties, bias, temperature, top-k, top-p, min-p, typical-p, draw.

    `temperature == 0` is greedy: the argmax after penalties and bias, lowest id on ties.
    """

    temperature: float = 1.0  # >= 0
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # (0, 1]; 1: off
    min_p: float = 0.0  # [0, 1]; 0: off
    typical_p: float = 1.0  # (0, 1]; 1: off
    repetition_penalty: float = 1.0  # > 0, multiplicative, over prompt and output
    frequency_penalty: float = 0.0  # times the count in the output
    presence_penalty: float = 0.0  # once if present in the output
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, added to its logit); <= -100 bans
    seed: int = 0  # [0, 2**63): always given; the HTTP layer draws one below 2**53 where the client gave none
    logprobs: int | None = None  # None: none wanted; k: of the sampled token and of the k best
    logprobs_mode: LogprobsMode = LogprobsMode.RAW


@dataclass(frozen=True, slots=True)
class StopConditions:
    """When a choice ends, and what its text keeps."""

    max_tokens: int  # >= 1, already clipped to the context
    min_tokens: int = 0  # before that many tokens EOS and stop ids are masked and stop strings not matched
    ignore_eos: bool = False
    stop_token_ids: frozenset[int] = frozenset()  # beside the model's own EOS ids
    stop: tuple[str, ...] = ()  # matched on decoded text across tokens: earliest wins, then longest
    include_stop: bool = False  # keep the matched stop string in the text, and hold nothing back
    skip_special_tokens: bool = True  # special tokens give no text


@dataclass(frozen=True, slots=True, eq=False)
class Image:
    """A picture of a request, decoded."""

    pixels: PIL.Image.Image  # RGB, upright
    digest: bytes  # 32 bytes: of its size and pixels
    param: str  # where it stands in the request, as the client's API calls it


@dataclass(frozen=True, slots=True, eq=False)
class ProcessedImage:
    """A picture as a model takes it."""

    text: str  # what to write in the place of its placeholder
    token_id: int  # the token that the model's view of it replaces
    num_tokens: int  # how many of these `text` has, at least one
    payload: Any  # the runner's; nobody else looks at it
    num_bytes: int = 0  # of the payload: they are counted until the request ends


class ImageProcessor(Protocol):
    """What makes of pictures what a model takes, and of their placeholders what its prompts have for them.

    `placeholder` is the text of one special token of the tokenizer. The chat template writes it once for each
    `{"type": "image"}`, and HTTP into prompts that are no chats.
    """

    @property
    def placeholder(self) -> str: ...

    def process(self, images: Sequence[Image]) -> Sequence[ProcessedImage]:
        """Return the images of one prompt, in order, as the model takes them. Called in a worker thread.

        Raises:
            InvalidRequest: the model cannot take one; with its `param`.
        """


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class ImageInput:
    """A picture in a prompt's tokens.

    Its `num_tokens` lie from `start` on, from the first that the model's view replaces to the last: tokens of
    rows and tiles between them included.
    """

    digest: bytes
    start: int
    num_tokens: int
    payload: Any


class Eyes(enum.Enum):
    """What of a prompt a step must compute as a whole, for a model that takes images."""

    NOTHING = "nothing"
    IMAGES = "images"  # the tokens of each
    PROMPT = "prompt"  # and nothing of it can be shared with another


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Adapter:
    """What a request adds to the model's products (LoRA).

    Attributes:
        key: of its contents: what adapters with one key compute is the same.
        weights: the runner's; nobody else looks at it.
    """

    name: str
    key: str
    weights: Any


class Lease(Protocol):
    """A request's hold on an adapter."""

    @property
    def adapter(self) -> Adapter: ...

    def release(self) -> None:
        """Let go. Idempotent."""


class Adapters(Protocol):
    """The adapters that requests may name: `engine/adapters.py`."""

    def __contains__(self, name: object) -> bool: ...

    @property
    def names(self) -> list[str]:
        """Those that can be asked for."""

    async def lease(self, name: str) -> Lease:
        """Return a hold on an adapter.

        Raises:
            UnknownAdapter, Unavailable, InvalidRequest, Overloaded: it cannot be had, or not now.
        """

    async def add(self, name: str, location: str) -> None:
        """Read an adapter; from then on it can be asked for.

        Raises:
            InvalidRequest, Overloaded: the name is taken, it cannot be read, or there is no room.
        """

    async def replace(self, name: str, location: str) -> None:
        """Read an adapter, give it the name of the one that had it, and wait until nobody uses that.

        Raises:
            InvalidRequest, Overloaded: it cannot be read, or there is no room; the old one stays.
            UnknownAdapter: the name was unloaded meanwhile.
        """

    async def remove(self, name: str) -> None:
        """Forget an adapter, and wait until nobody uses it.

        Raises:
            UnknownAdapter: there is none of that name.
        """


class PoolingKind(enum.Enum):
    """How a prompt's hidden states, behind the last norm, become one vector."""

    LAST = "last"  # of the last token
    CLS = "cls"  # of the first
    MEAN = "mean"
    MEAN_SQRT_LEN = "mean_sqrt_len"  # their sum over the root of their number
    WEIGHTED_MEAN = "weighted_mean"  # the n-th token counts n times
    MAX = "max"  # of each dimension
    LOGITS = (
        "logits"  # no state: the logits of some tokens, or of a classifier's labels, after the last token
    )


@dataclass(frozen=True, slots=True)
class Pooling:
    """What is wanted of a prompt in the place of an answer: a vector."""

    kind: PoolingKind
    token_ids: tuple[int, ...] = ()  # of LOGITS: which of them

    @property
    def needs_all(self) -> bool:
        """Whether every token must be computed: none of them may come from the prefix cache."""
        return self.kind not in (PoolingKind.LAST, PoolingKind.LOGITS)


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One validated request: every integer in it is already within the model's bounds.

    `n` choices share the prompt; choice i draws from the stream (seed, i), so it does not depend on n. With
    `seeds` it draws as the only choice of a request with `seeds[i]` would.
    """

    request_id: str
    prompt_ids: Sequence[int]  # [1, max_input_tokens] ids, each < vocab_size
    sampling: SamplingParams
    stop: StopConditions
    n: int = 1
    priority: int = 0  # smaller is sooner
    cache_salt: str | None = None  # mixed into the prefix-cache key
    adapter: Adapter | None = None
    grammar: Grammar | None = None  # what the output must match
    prompt_logprobs: int | None = None  # None: none; k: of each prompt token and of the k best there
    is_prefix_cached: bool = True  # may take cached blocks (never when prompt_logprobs is set)
    seeds: tuple[int, ...] = ()  # n of them, in the place of `sampling.seed`, or none
    images: tuple[ImageInput, ...] = ()  # in the prompt's order; they do not overlap
    # A vector is wanted, in `RequestStats.vector`, and no token: n and max_tokens are 1, and the one event
    # says that it is there.
    pooling: Pooling | None = None
    second_start: int | None = None  # of a pair of texts: where in the prompt the second one begins


@dataclass(slots=True, eq=False)  # not frozen: that would cost four times as much, and one is made a token
class TokenEvent:
    """One sampled token of one choice."""

    index: int  # the choice, [0, n)
    token_id: int
    # The token's own bytes in the text; b"" for a special token that is skipped, and for one that ends the
    # choice unseen. They may end inside a UTF-8 character.
    data: bytes = b""
    # What may be shown now: whole characters, less what is held back as the possible head of a stop string.
    # Concatenated over a choice's events it is the choice's text.
    text: str = ""
    logprob: float | None = None  # natural logarithm in the request's mode, or None if none was asked for
    top: Sequence[tuple[int, float]] | None = None  # the k best (id, logprob), descending
    is_special: bool = False  # one of the tokenizer's special tokens
    finish: FinishReason | None = None  # set on the choice's last event only
    stop: str | int | None = None  # the stop string or stop id that matched, with `finish == STOP`


@dataclass(slots=True)
class RequestStats:
    """What the engine knows of one request's course, filled as it happens; times by `time.monotonic()`."""

    arrival_s: float
    scheduled_s: float | None = None  # the first step that ran a token of it
    first_token_s: float | None = None
    finished_s: float | None = None
    cached_tokens: int = 0  # prompt tokens taken from the prefix cache
    generated_tokens: int = 0  # sampled, over all choices
    finishes: list[FinishReason] = field(default_factory=list)  # of the choices, in the order they ended
    # Per prompt token: (logprob or None for the first, the k best), when `prompt_logprobs` asked for them.
    prompt_logprobs: list[tuple[float | None, Sequence[tuple[int, float]]]] | None = None
    vector: Vector | None = None  # what `pooling` asked for: float32


class Sink(Protocol):
    """What HTTP attaches to a channel. Called on the event loop; must not block or raise."""

    def on_events(self, events: Sequence[TokenEvent]) -> None:
        """Take all that is new since the last call, in order, choices mixed."""

    def on_error(self, error: TgiError) -> None:
        """Learn that the request failed; nothing follows."""


class Channel(Protocol):
    """A request's mailbox for all its n choices.

    It ends when every choice has had its event with `finish`, or with one error; never otherwise.
    """

    request: GenerationRequest
    stats: RequestStats

    def attach(self, sink: Sink) -> None:
        """Call `sink` from now on, first with whatever is waiting. At most once."""

    def cancel(self) -> None:
        """Give the request up: blocks and permit come back within two steps. Idempotent."""


class EngineState(enum.Enum):
    """What `/health` reports."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    DEAD = "dead"


class Permit(Protocol):
    """Room for n choices, running or waiting; released at the request's end, or by its taker."""

    @property
    def n(self) -> int: ...

    @property
    def tenant(self) -> str | None:
        """Whom the room is counted for."""

    def split(self, n: int) -> Permit:
        """Return a permit of its own for n of the choices: room is taken for several requests at once."""

    def release(self, *, has_run: bool = False) -> None: ...


class Engine(Protocol):
    """The engine as HTTP sees it."""

    @property
    def state(self) -> EngineState: ...

    def describe(self) -> dict[str, Any]:
        """Return what the engine holds now, for a person to read: JSON's types only."""

    def acquire(self, n: int, tenant: str | None = None) -> Permit:
        """Take room for n choices before any work is done on them; tenants (API keys) share it evenly.

        Raises:
            Overloaded: no room; `retry_after_s` is an estimate from the drain rate.
            Unavailable: the engine is draining or dead.
        """

    def submit(self, request: GenerationRequest, permit: Permit) -> Channel:
        """Queue a request; the permit is the engine's from here on."""

    def abort(self, request_id: str) -> int:
        """End the requests of this id, running or waiting, with an error; return how many there were."""

    def reset_prefix_cache(self) -> int:
        """Forget all prompts that are cached; return how many blocks that were."""


@dataclass(frozen=True, slots=True)
class Embedding:
    """How a model turns texts into vectors.

    Attributes:
        dimensions: of a vector.
        max_tokens: of a text.
        is_normalized: vectors have the length 1, unless a request says otherwise.
        prompts: what requests may have put before their texts, by name.
    """

    pooling: Pooling
    dimensions: int
    max_tokens: int
    is_normalized: bool = True
    prompts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Scoring:
    """How a model scores a pair of texts: by one logit, or by how far the second of two exceeds the first.

    Attributes:
        template: a chat template with the roles `query`, `document` and `system` (the instruction), or None:
            the pair is tokenised as one.
    """

    pooling: Pooling
    max_tokens: int
    template: str | None = None


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What the API says of the model that is served."""

    model_id: str  # as the operator named it: also the served name
    revision: str | None  # commit or file hash, where known
    architecture: str  # e.g. "LlamaForCausalLM"
    dtype: str  # of the arithmetic, e.g. "float32"
    device: str  # "cpu" or "cuda"
    vocab_size: int
    max_input_tokens: int
    max_total_tokens: int  # prompt and output together
    eos_token_ids: frozenset[int]
    kv_tokens: int = 0  # size of the KV cache, in sequences of `max_total_tokens`
    kv_bytes: int = 0
    max_batch_size: int = 0  # sequences in a step
    num_kept_states: int = 0  # of recurrent layers, for prompts to go on from
    kept_state_bytes: int = 0  # of all of them
    num_threads: int = 0
    num_shards: int = 1  # each with as many threads
    kernel_set: str | None = None  # of the CPU's kernels
    prompt_precision: str | None = None  # of prompts, where it is not that of generated tokens
    implementation: str = "native"  # or "transformers"
    is_batch_invariant: bool = True  # same bits whatever runs beside a request
    created: int = 0  # seconds since the epoch, constant for the process
    fingerprint: str = "fp_0"  # constant for (weights, dtype, code version, kernel options)
    generates: bool = True  # text; what only embeds or scores does not
    embedding: Embedding | None = None  # None: it does not embed
    scoring: Scoring | None = None  # None: it scores by its embeddings, if it has any
    why_no_pooling: str = ""  # where both are None: what the operator can do about it
