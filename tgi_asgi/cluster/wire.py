"""What an ingress and a replica tell each other: requests that are ready for the engine, replies, reports.

Everything here is pickled. Times are durations: two machines have no clock in common.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from tgi_asgi.errors import TgiError
from tgi_asgi.text.constrain.source import GrammarSource
from tgi_asgi.types import (
    FinishReason,
    GenerationRequest,
    ImageProcessor,
    ModelInfo,
    RequestStats,
    TokenEvent,
)

if TYPE_CHECKING:
    from tgi_asgi.text.chat.template import ChatTemplate
    from tgi_asgi.text.tokenizer import Tokenizer

Event = tuple[Any, ...]  # a `TokenEvent`'s fields, of which plain tuples are pickled fastest
_FIELDS = attrgetter("index", "token_id", "data", "text", "logprob", "top", "is_special", "finish", "stop")
_DIGEST_BYTES = 16


@dataclass(frozen=True, slots=True)
class WireRequest:
    """A request as it goes to a replica, which neither renders nor tokenises it again.

    Attributes:
        request: without its grammar and adapter, which are objects of one process.
        adapter: its name.
        grammar: to be compiled there.
        tenant: the API key's name: replicas share their room among keys, too.
    """

    request: GenerationRequest
    adapter: str | None = None
    grammar: GrammarSource | None = None
    tenant: str | None = None

    @classmethod
    def of(cls, request: GenerationRequest, tenant: str | None) -> WireRequest:
        """Pack a request."""
        source = None if request.grammar is None else request.grammar.source
        assert request.grammar is None or source is not None, "grammars know what they were compiled from"
        bare = replace(request, prompt_ids=array("I", request.prompt_ids), adapter=None, grammar=None)
        return cls(bare, None if request.adapter is None else request.adapter.name, source, tenant)


@dataclass(frozen=True, slots=True)
class Course:
    """A request's `RequestStats`, with times in seconds since it came to the replica; that is `age_s` ago."""

    age_s: float
    scheduled_s: float | None
    first_token_s: float | None
    finished_s: float | None
    cached_tokens: int
    prompt_logprobs: Any
    vector: Any

    @classmethod
    def of(cls, stats: RequestStats) -> Course:
        """Take stock of a request now."""

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
        """Write what is known to the stats of the ingress, whose request came earlier than the replica's."""
        begun_s = max(time.monotonic() - self.age_s, stats.arrival_s)

        def at(duration_s: float | None) -> float | None:
            return None if duration_s is None else begun_s + duration_s

        stats.scheduled_s, stats.first_token_s = at(self.scheduled_s), at(self.first_token_s)
        stats.finished_s = at(self.finished_s)
        stats.cached_tokens, stats.vector = self.cached_tokens, self.vector
        stats.prompt_logprobs = self.prompt_logprobs


@dataclass(frozen=True, slots=True)
class Reply:
    """Some of an answer.

    Attributes:
        replica: that gives it.
        course: with the first reply and the last.
        error: the request failed; nothing follows.
    """

    replica: str
    events: Sequence[Event] = ()
    course: Course | None = None
    error: TgiError | None = None


def packed(events: Sequence[TokenEvent]) -> list[Event]:
    """Return events as they are sent."""
    return [_FIELDS(event) for event in events]


def unpacked(events: Sequence[Event]) -> list[TokenEvent]:
    """Return events as they were packed."""
    return [TokenEvent(*event) for event in events]


def finishes_of(events: Sequence[TokenEvent]) -> list[FinishReason]:
    """Return why choices ended, of those that end with these events."""
    return [event.finish for event in events if event.finish is not None]


@dataclass(frozen=True, slots=True)
class Seen:
    """How far an ingress knows a replica's prefix cache: up to a number of the journal of one life of it."""

    life: str = ""
    number: int = 0


@dataclass(frozen=True, slots=True)
class Report:
    """How a replica does.

    Attributes:
        replica: its id.
        seen: what an ingress that has read this knows.
        is_whole: `found` is all that is cached; else what has changed since the ingress had its last report.
        found, lost: digests of blocks, one behind the other.
        num_open: requests that run or wait there, whichever ingress they came by.
        stats: of its engine: `totals.snapshot`.
        adapters: those that can be asked for, with their keys.
        has_states: a prompt goes on behind the last block of it that is cached, also where others before that
            are not told of: it is states that are told.
    """

    replica: str
    seen: Seen
    is_whole: bool = True
    found: bytes = b""
    lost: bytes = b""
    num_open: int = 0
    stats: Mapping[str, Any] = field(default_factory=dict)
    adapters: Mapping[str, str] = field(default_factory=dict)
    has_states: bool = False


def join_digests(digests: Iterable[bytes]) -> bytes:
    """Join digests for a report: those of blocks of the first group of layers, one a block of a prompt.

    An ingress counts how much of a prompt's beginning a replica has; what other groups have of it is longer
    (`engine/hits.py`), and says no more to who knows no windows.
    """
    return b"".join(digest for digest in digests if len(digest) == _DIGEST_BYTES)


def split_digests(joined: bytes) -> list[bytes]:
    """Return the digests that a report has joined."""
    return [joined[start : start + _DIGEST_BYTES] for start in range(0, len(joined), _DIGEST_BYTES)]


@dataclass(frozen=True, slots=True)
class Description:
    """What an ingress needs of the model to speak for it: everything but weights."""

    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    info: ModelInfo
    image_processor: ImageProcessor | None
    has_adapters: bool
    block_size: int
