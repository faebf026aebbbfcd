"""Messages between an ingress and a replica: requests prepared for the engine, replies, reports.

All of them are pickled. Times are durations, because two machines have no common clock.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from tgi_asgi.errors import TgiError
from tgi_asgi.model_info import ModelInfo
from tgi_asgi.text.constrain.source import GrammarSource
from tgi_asgi.types import (
    FinishReason,
    GenerationRequest,
    ImageProcessor,
    PromptLogprobs,
    RequestStats,
    TokenEvent,
)

if TYPE_CHECKING:
    from tgi_asgi.text.chat.template import ChatTemplate
    from tgi_asgi.text.tokenizer import Tokenizer
    from tgi_asgi.types import Vector

Event = tuple[Any, ...]  # fields of a `TokenEvent`; plain tuples are the fastest to pickle
_FIELDS = attrgetter("index", "token_id", "data", "text", "logprob", "top", "is_special", "finish", "stop")
_DIGEST_BYTES = 16


@dataclass(frozen=True, slots=True)
class WireRequest:
    """A request on its way to a replica, already rendered and tokenised.

    Attributes:
        request: The request without grammar and adapter, which are objects of one process.
        adapter: Name of the adapter.
        grammar: Source of the grammar, which the replica compiles.
        tenant: Name of the API key; replicas share their capacity among keys, too.
    """

    request: GenerationRequest
    adapter: str | None = None
    grammar: GrammarSource | None = None
    tenant: str | None = None

    @classmethod
    def of(cls, request: GenerationRequest, tenant: str | None) -> WireRequest:
        """Pack a request."""
        source = None if request.grammar is None else request.grammar.source
        assert request.grammar is None or source is not None, "a grammar keeps its source"
        bare = replace(request, prompt_ids=array("I", request.prompt_ids), adapter=None, grammar=None)
        return cls(bare, None if request.adapter is None else request.adapter.name, source, tenant)


@dataclass(frozen=True, slots=True)
class WireStats:
    """A request's `RequestStats`; times are in seconds since it reached the replica, which is `age_s` ago."""

    age_s: float
    scheduled_s: float | None
    first_token_s: float | None
    finished_s: float | None
    cached_tokens: int
    prompt_logprobs: PromptLogprobs | None
    vector: Vector | None

    @classmethod
    def of(cls, stats: RequestStats) -> WireStats:
        """Return the request's stats as of now."""

        def since(moment_s: float | None) -> float | None:
            return None if moment_s is None else moment_s - stats.arrival_s

        return cls(
            time.monotonic() - stats.arrival_s,
            since(stats.scheduled_s),
            since(stats.first_token_s),
            since(stats.finished_s),
            stats.cached_tokens,
            stats.prompt_logprobs,
            stats.vector,
        )

    def fill(self, stats: RequestStats) -> None:
        """Fill in the ingress's stats; its request arrived earlier than the replica's."""
        begun_s = max(time.monotonic() - self.age_s, stats.arrival_s)

        def at(duration_s: float | None) -> float | None:
            return None if duration_s is None else begun_s + duration_s

        stats.scheduled_s, stats.first_token_s = at(self.scheduled_s), at(self.first_token_s)
        stats.finished_s = at(self.finished_s)
        stats.cached_tokens, stats.vector = self.cached_tokens, self.vector
        stats.prompt_logprobs = self.prompt_logprobs


@dataclass(frozen=True, slots=True)
class Reply:
    """Part of an answer.

    Attributes:
        replica: Id of the replica that sends it.
        stats: The request's stats, sent with the first reply and the last.
        error: Set if the request failed; nothing follows.
    """

    replica: str
    events: Sequence[Event] = ()
    stats: WireStats | None = None
    error: TgiError | None = None


def pack_events(events: Sequence[TokenEvent]) -> list[Event]:
    """Return events in the form in which they are sent."""
    return [_FIELDS(event) for event in events]


def unpack_events(events: Sequence[Event]) -> list[TokenEvent]:
    """Return the events that were packed."""
    return [TokenEvent(*event) for event in events]


def finishes_of(events: Sequence[TokenEvent]) -> list[FinishReason]:
    """Return the finish reasons of the choices that end with these events."""
    return [event.finish for event in events if event.finish is not None]


@dataclass(frozen=True, slots=True)
class CacheVersion:
    """What an ingress knows of a replica's prefix cache: its journal up to an entry, in one process life."""

    life: str = ""
    number: int = 0


@dataclass(frozen=True, slots=True)
class Report:
    """A replica's status.

    Attributes:
        replica: Its id.
        cache_version: What an ingress knows after reading this.
        is_whole: Whether `found` is everything cached; otherwise it has the changes since the last report.
        found, lost: Concatenated digests of blocks.
        num_open: Number of requests that run or wait there, from any ingress.
        stats: Counters of its engine, from `totals.snapshot`.
        adapters: Names and keys of the adapters that requests may use.
        has_states: Whether the digests are those of kept recurrent states. A prompt then resumes after its
            last reported digest, even if earlier ones are not reported.
    """

    replica: str
    cache_version: CacheVersion
    is_whole: bool = True
    found: bytes = b""
    lost: bytes = b""
    num_open: int = 0
    stats: Mapping[str, Any] = field(default_factory=dict)
    adapters: Mapping[str, str] = field(default_factory=dict)
    has_states: bool = False


def join_digests(digests: Iterable[bytes]) -> bytes:
    """Concatenate digests for a report: those of the first group of layers, one per block of a prompt.

    An ingress counts how much of a prompt's prefix a replica has. Digests of other groups are longer
    (`engine/hits.py`) and are of no use to an ingress, which knows no windows.
    """
    return b"".join(digest for digest in digests if len(digest) == _DIGEST_BYTES)


def split_digests(joined: bytes) -> list[bytes]:
    """Return the digests that a report has concatenated."""
    return [joined[start : start + _DIGEST_BYTES] for start in range(0, len(joined), _DIGEST_BYTES)]


@dataclass(frozen=True, slots=True)
class Description:
    """What an ingress needs of a model to serve its API: everything except the weights."""

    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    info: ModelInfo
    image_processor: ImageProcessor | None
    has_adapters: bool
    block_size: int
