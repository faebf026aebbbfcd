"""A client's request, independent of the API: a dialect makes a `Call` from a body, and `life.py` runs it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from tgi_asgi.api.job import Job
from tgi_asgi.errors import TgiError
from tgi_asgi.model_info import ModelInfo
from tgi_asgi.types import Channel, GenerationRequest, TokenEvent

if TYPE_CHECKING:
    from tgi_asgi.api.answer import Choices, Reading
    from tgi_asgi.api.prompt import Prompt
    from tgi_asgi.api.served import Served


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
