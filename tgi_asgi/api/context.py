"""The server state that routes share: settings, the loaded model, threads for text and grammars."""

from __future__ import annotations

import logging
import socket
import ssl
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tgi_asgi.api.budgets import AnswerMemory, ByteBudget
from tgi_asgi.api.served import Served
from tgi_asgi.api.thread_pools import ThreadPool
from tgi_asgi.errors import ModelLoadError, Unavailable, UnknownModel
from tgi_asgi.images.fetch import Fetcher
from tgi_asgi.model_info import ModelInfo
from tgi_asgi.observe.metrics import Metrics
from tgi_asgi.settings import Settings
from tgi_asgi.types import EngineState

if TYPE_CHECKING:
    from tgi_asgi.api.openai.conversation_store import ConversationStore
    from tgi_asgi.api.openai.response_store import ResponseStore

logger = logging.getLogger(__name__)

NO_NAMES = ("tgi", "dummy")  # what TGI's documents and huggingface_hub send as `model` if there is no name
_URL_SCHEMES = ("http://", "https://")  # huggingface.js then sends the endpoint's address
_MAX_NAMES_LOGGED = 100  # clients choose the names, of up to 256 characters each


@dataclass(slots=True)
class LoadProgress:
    """Loading progress, as `/health` reports it. The loading thread makes a new one for each report."""

    stage: str = "starting"
    done: int = 0
    total: int | None = None  # in the stage's unit (bytes, tensors); None: unknown


class ServerContext:
    """One server's state, shared by all routes.

    It is changed on the event loop, with three exceptions: the loading thread replaces `progress`; parsing,
    which may run in a thread, calls `warn_once`; the stores of responses and conversations have locks.

    Attributes:
        served: The model, or None while it loads.
        failure: The reason why loading failed or the engine died, if it did.
        metrics: Metrics for `/metrics`.
        responses: Stored answers of `/v1/responses`.
        conversations: Those of `/v1/conversations`.
        text_threads, grammar_threads: Threads for prompts and for grammars.
        count_threads: Threads for large requests that only count tokens.
        image_threads, dns_threads: Threads for images, and for looking up their hosts.
        body_budget: Budget for bytes of unanswered request bodies and of what they fetched.
        image_budget: Budget for bytes of such requests' images, decoded or processed.
        answer_memory: Memory of answers that are kept until they are sent.
        num_pool_calls: How many calls for vectors or scores are being computed; they share the capacity.
        tokenising_keys: How many requests that only count or show tokens each API key has; absent if none.
        fetcher: Fetches images.
        is_terminating: Whether SIGTERM has arrived; `/readyz` then fails, while requests are still accepted.
    """

    def __init__(
        self,
        settings: Settings,
        responses: ResponseStore,
        conversations: ConversationStore,
    ) -> None:
        self.settings = settings
        self.responses, self.conversations = responses, conversations
        self.served: Served | None = None
        self.failure: BaseException | None = None
        self.progress = LoadProgress()
        self.metrics = Metrics(settings.block_size)
        self.body_budget = ByteBudget(settings.max_body_memory, "request bodies")
        self.image_budget = ByteBudget(settings.max_image_memory, "images")
        self.answer_memory = AnswerMemory(settings.max_answer_memory)
        self.num_pool_calls = 0
        self.tokenising_keys: Counter[str | None] = Counter()
        self.is_terminating = False
        self._warned: set[str] = set()
        self._unknown_models: set[str] = set()
        self.text_threads = ThreadPool(settings.validation_workers, "text")
        # Compiling a schema or counting a book's tokens may take a second, and must not delay templates and
        # prompts.
        self.grammar_threads = ThreadPool(2, "grammar")
        self.count_threads = ThreadPool(1, "count")
        self.image_threads = ThreadPool(2, "image")
        self.dns_threads = ThreadPool(8, "dns")  # a lookup may occupy one for half a minute
        self._text_pools = (self.text_threads, self.grammar_threads, self.count_threads)
        self._image_pools = (self.image_threads, self.dns_threads)
        hosts = (host.strip() for host in ",".join(settings.allowed_media_domains).lower().split(","))
        self.fetcher = Fetcher(frozenset(filter(None, hosts)), self._lookup, self._tls)

    @property
    def info(self) -> ModelInfo | None:
        return self.served.info if self.served else None

    @property
    def state(self) -> EngineState:
        """Whether requests can be served: LOADING, READY, DRAINING or DEAD."""
        if self.failure is not None:
            return EngineState.DEAD
        return self.served.engine.state if self.served else EngineState.LOADING

    def report(self, stage: str, done: int, total: int | None) -> None:
        """Record a loader's progress; called in its thread."""
        self.progress = LoadProgress(stage, done, total)

    def ready(self) -> Served:
        """Return the loaded model.

        Raises:
            Unavailable: if it is still loading or failed, or the server is shutting down.
        """
        state = self.state
        if state is EngineState.READY and self.served is not None:
            return self.served
        if state is EngineState.LOADING:
            raise Unavailable(f"The model is loading ({self.describe_progress()})", retry_after_s=2)
        if state is EngineState.DRAINING:
            raise Unavailable("The server is shutting down", retry_after_s=5)
        raise Unavailable("The model cannot be served: the engine has failed", retry_after_s=10)

    def describe_progress(self) -> str:
        """Return the loading progress in a few words: `reading weights, 41%`."""
        progress = self.progress
        if progress.total:
            return f"{progress.stage}, {100 * progress.done // progress.total}%"
        return progress.stage

    def warn_once(self, topic: str, message: str) -> None:
        """Log a warning once per topic (twice if two threads do at once); the code defines the few topics."""
        if topic not in self._warned:
            self._warned.add(topic)
            logger.warning(message)

    def check_name(self, requested: str | None) -> None:
        """Refuse the name of a model that is not served, if names are strict; may run in any thread.

        Raises:
            UnknownModel: if it is refused.
        """
        name = name_in(requested)
        if self.settings.strict_model_names and name is not None and not self.ready().serves(name):
            raise UnknownModel(name)

    def note_unknown_model(self, name: str) -> None:
        """Log, once per name, that a client asked for a model that is not served."""
        if name not in self._unknown_models and len(self._unknown_models) < _MAX_NAMES_LOGGED:
            self._unknown_models.add(name)
            logger.info("model %r was asked for; answering as the served one", name)

    async def _lookup(self, name: str, port: int) -> list[str]:
        found = await self.dns_threads.run(socket.getaddrinfo, name, port, type=socket.SOCK_STREAM)
        return [str(address[0]) for *_, address in found]

    async def _tls(self) -> ssl.SSLContext:
        return await self.dns_threads.run(ssl.create_default_context)

    def begin_threads(self, served: Served) -> None:
        """Start the threads that a model's requests need, so that the server is not ready without them.

        Raises:
            ModelLoadError: if the system does not allow so many.
        """
        try:
            for pool in self._text_pools + (self._image_pools if served.accepts_images else ()):
                pool.begin()
        except RuntimeError as error:
            self.close(waits=True)  # asyncio needs a thread to end
            limits = "`ulimit -u`, or the container's limit of processes"
            raise ModelLoadError(f"{error}: too few threads are allowed here ({limits})") from None

    def close(self, *, waits: bool = False) -> None:
        """Shut down the threads; they may work on for a moment, unless this waits for them."""
        for pool in self._text_pools + self._image_pools:
            pool.close(waits=waits)


def name_in(requested: str | None) -> str | None:
    """Return the name that a request gives, or None for what clients send without one."""
    if requested is None or requested in NO_NAMES or requested.startswith(_URL_SCHEMES):
        return None
    return requested
