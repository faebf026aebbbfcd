"""The server state that routes share: settings, the loaded model, threads for text and grammars."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
import threading
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from tgi_asgi.api.call import Images
from tgi_asgi.errors import InvalidRequest, ModelLoadError, Overloaded, TgiError, Unavailable
from tgi_asgi.images.fetch import Fetcher
from tgi_asgi.model_info import ModelInfo
from tgi_asgi.observe.metrics import Metrics
from tgi_asgi.settings import Settings
from tgi_asgi.types import Adapters, Engine, EngineState, ImageProcessor

if TYPE_CHECKING:  # the last three import libraries that are not needed before the model has loaded
    from tgi_asgi.api.openai.response_store import ResponseStore
    from tgi_asgi.api.routes import Route
    from tgi_asgi.engine.stats import EngineStats
    from tgi_asgi.text.chat.template import ChatTemplate
    from tgi_asgi.text.constrain.grammar import GrammarCompiler
    from tgi_asgi.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

_TOKEN_BYTES = 256  # a token's event
_LOGPROB_BYTES = 200  # a log-probability: packed, as JSON, and in the body
_MAX_NAMES_LOGGED = 100  # clients choose the names, of up to 256 characters each

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(slots=True)
class LoadProgress:
    """Loading progress. Written by the loading thread, read by `/health`."""

    stage: str = "starting"
    done: int = 0
    total: int | None = None  # in the stage's unit (bytes, tensors); None: unknown


@dataclass(frozen=True)
class Served:
    """A loaded model with everything needed to serve it."""

    engine: Engine
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    info: ModelInfo
    stats: EngineStats | None = None  # the engine's counters, for `/metrics`
    image_processor: ImageProcessor | None = None  # if the model accepts images
    adapters: Adapters | None = None  # if adapters are served

    @property
    def accepts_images(self) -> bool:
        """Whether prompts may have images."""
        return self.image_processor is not None

    def new_images(self) -> Images | None:
        """Return a collector for a prompt's images if the model accepts images, else None."""
        return Images() if self.accepts_images else None

    def serves(self, name: str) -> bool:
        """Return whether this is the model's name or an adapter's."""
        return name == self.info.model_id or (self.adapters is not None and name in self.adapters)

    @cached_property
    def special_ids(self) -> dict[str, int]:
        """The model's special tokens, by text."""
        return {self.tokenizer.token_text(i): i for i in sorted(self.tokenizer.special_ids)}

    @cached_property
    def for_scores(self) -> Served:
        """The same model with the chat template for the pairs that it scores."""
        from tgi_asgi.text.chat.template import ChatTemplate

        source = self.info.scoring.template if self.info.scoring is not None else None
        if source is None:
            return self
        return replace(self, chat_template=ChatTemplate(source, self.tokenizer.special_tokens))

    @cached_property
    def grammars(self) -> GrammarCompiler:
        """Grammar compiler for the model's vocabulary, created for the first grammar."""
        from tgi_asgi.text.constrain.grammar import GrammarCompiler

        return GrammarCompiler(self.tokenizer, self.info.vocab_size)


class ServerContext:
    """One server's state, shared by all routes; changed only on the event loop.

    Attributes:
        served: The model, or None while it loads.
        failure: The reason why loading failed or the engine died, if it did.
        metrics: Metrics for `/metrics`.
        responses: Stored answers of `/v1/responses`.
        text_threads, grammar_threads: Threads for prompts and for grammars.
        count_threads: Threads for large requests that only count tokens.
        image_threads, dns_threads: Threads for images, and for looking up their hosts.
        body_budget: Budget for bytes of unanswered request bodies and of what they fetched.
        image_budget: Budget for bytes of such requests' images, decoded or processed.
        answer_memory: Memory of answers that are kept until they are sent.
        num_pool_calls: How many calls for vectors or scores are being computed; they share the capacity.
        num_tokenising: How many requests that only count or show tokens are being answered.
        fetcher: Fetches images.
        routes: All routes, for the OpenAPI document.
        is_terminating: Whether SIGTERM has arrived; `/readyz` then fails, while requests are still accepted.
    """

    responses: ResponseStore  # set by `app.py`

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.served: Served | None = None
        self.failure: BaseException | None = None
        self.progress = LoadProgress()
        self.metrics = Metrics(settings.block_size)
        self.body_budget = ByteBudget(settings.max_body_memory, "request bodies")
        self.image_budget = ByteBudget(settings.max_image_memory, "images")
        self.answer_memory = AnswerMemory(settings.max_answer_memory)
        self.num_pool_calls = 0
        self.num_tokenising = 0
        self.is_terminating = False
        self.routes: Sequence[Route] = ()
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
        hosts = ",".join(settings.allowed_media_domains).lower().split(",")
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
        """Log a warning once per topic; the code defines the few topics."""
        if topic not in self._warned:
            self._warned.add(topic)
            logger.warning(message)

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


class ThreadPool:
    """Threads for one purpose, to which the event loop delegates slow work."""

    def __init__(self, size: int, name: str) -> None:
        self._size = size
        self._executor = ThreadPoolExecutor(size, thread_name_prefix=f"tgi-{name}")
        self._queue = FairQueue(2 * size)  # so that no thread waits for the event loop between two calls

    def begin(self) -> None:
        """Start all threads; otherwise each starts when it is first needed.

        Raises:
            RuntimeError: if the system does not allow so many.
        """
        gate = threading.Event()
        try:
            for _ in range(self._size):
                self._executor.submit(gate.wait)
        finally:
            gate.set()

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a function in one of the threads."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, _cleared, lambda: function(*args, **kwargs))

    async def run_for(
        self, tenant: str | None, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Call a function in one of the threads; tenants take turns, whoever has asked more often."""
        await self._queue.enter(tenant)
        try:
            return await self.run(function, *args, **kwargs)
        finally:
            self._queue.leave()

    def start(self, function: Callable[[], None]) -> None:
        """Call a function in one of the threads; nobody waits for it."""
        with suppress(RuntimeError):  # the threads have ended already, and the process will
            self._executor.submit(function)

    def free(self, objects: list[object]) -> None:
        """Free objects in a thread; half a million small ones take 40 ms."""
        self.start(objects.clear)

    def close(self, *, waits: bool = False) -> None:
        """Shut down the threads; drop queued work."""
        self._executor.shutdown(wait=waits, cancel_futures=True)


def _cleared(work: Callable[[], T]) -> T:
    """Run some work; if it fails, free its frames' objects in this thread, not in the event loop.

    Raises:
        RuntimeError: for a panic in a library written in Rust, such as `tokenizers`: it is no `Exception`,
            which is what a failed request's handlers catch.
    """
    try:
        return work()
    except Exception as error:
        traceback.clear_frames(error.__traceback__)
        raise
    except BaseException as panic:
        traceback.clear_frames(panic.__traceback__)
        raise RuntimeError(f"{type(panic).__name__}: {panic}") from panic


class FairQueue:
    """Lets a few callers work at a time; those of different tenants take turns, and wait in order within one.

        await queue.enter(tenant)
        try:
            ...
        finally:
            queue.leave()

    Otherwise a key that sends a hundred requests, each of which takes a second, would keep the next key's
    request waiting for all of them.
    """

    def __init__(self, max_active: int) -> None:
        self._num_free = max_active  # if any, nobody waits
        self._waiting: dict[str | None, deque[asyncio.Future[None]]] = {}  # in the order of their turns

    async def enter(self, tenant: str | None) -> None:
        """Wait for this caller's turn."""
        if self._num_free:
            self._num_free -= 1
            return
        future = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(tenant, deque()).append(future)
        try:
            await future
        except asyncio.CancelledError:
            if not future.cancelled():  # its turn has come meanwhile
                self.leave()
            raise

    def leave(self) -> None:
        """End a caller's work; the next tenant's first caller that still waits has its turn."""
        while self._waiting:
            tenant = next(iter(self._waiting))
            callers = self._waiting.pop(tenant)
            future = callers.popleft()
            if callers:
                self._waiting[tenant] = callers  # after all others
            if not future.done():
                future.set_result(None)
                return
        self._num_free += 1


class ByteBudget:
    """A limit of bytes of `what` held at a time, over all requests."""

    def __init__(self, max_bytes: int, what: str) -> None:
        self._max_bytes = max_bytes
        self._what = what
        self.held = 0

    def acquire(self, size: int, num_held: int = 0) -> None:
        """Hold `size` more bytes for a request that already holds `num_held`.

        Raises:
            Overloaded: if there are too many now.
        """
        # A request on its own has other limits.
        if self.held > num_held and self.held + size > self._max_bytes:
            raise Overloaded(f"The server holds as many {self._what} as it may")
        self.held += size

    def release(self, size: int) -> None:
        """Release bytes that were acquired."""
        self.held -= size


def token_bytes(num_top: int | None) -> int:
    """Return the bytes of a token with its log-probability and `num_top` alternatives; None: without any."""
    return _TOKEN_BYTES + (0 if num_top is None else _LOGPROB_BYTES * (1 + num_top))


@dataclass(slots=True, eq=False)
class KeptAnswer:
    """One answer's part of the memory.

    Attributes:
        param: The client's name of the field that makes the answer large.
        advice: What the client may do if its answer is too large.
        prompt_bytes: Bytes of the prompts' log-probabilities.
        token_bytes: Bytes of each token that arrives.
    """

    memory: AnswerMemory
    tenant: str | None
    param: str
    advice: str
    prompt_bytes: int
    token_bytes: int
    num_bytes: int = 0
    refuse: Callable[[TgiError], None] = field(init=False)

    def begin(self, refuse: Callable[[TgiError], None]) -> None:
        """Count the prompts; `refuse` is called once with the error if the request must end, perhaps now."""
        self.refuse = refuse
        self.memory.begin(self)
        self.memory.add(self, self.prompt_bytes)

    def end(self) -> None:
        """Note that the answer is complete: it only has to be sent."""
        self.memory.end(self)

    def add_tokens(self, count: int) -> None:
        """Count tokens that have arrived; may call `refuse`, of this answer or another."""
        self.memory.add(self, count * self.token_bytes)


class AnswerMemory:
    """Counts the bytes of all answers that are kept until they are sent. Used on the event loop only.

    They are counted as tokens arrive, because nobody knows how long an answer will be. If there are too many,
    the largest answer fails, of the key that holds most. Small answers never fail, however much others hold.

    Attributes:
        held: Bytes of all of them together.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._small = max_bytes // 1024  # an answer may always have these bytes
        self._growing: set[KeptAnswer] = set()
        self.held = 0

    @contextmanager
    def keeping(self, answer: KeptAnswer) -> Iterator[KeptAnswer]:
        """Count an answer's bytes, once it begins, until the context ends."""
        try:
            yield answer
        finally:
            self.end(answer)
            self._release(answer)

    def begin(self, answer: KeptAnswer) -> None:
        """From now on, count what is added to an answer, and refuse it if it is too large."""
        self._growing.add(answer)

    def add(self, answer: KeptAnswer, size: int) -> None:
        """Count bytes of an answer, unless it has been refused."""
        if answer not in self._growing:
            return
        answer.num_bytes += size
        self.held += size
        while self.held > self._max_bytes and self._refuse_largest():
            pass

    def end(self, answer: KeptAnswer) -> None:
        """Note that an answer is complete, and can no longer be refused; its bytes still count."""
        self._growing.discard(answer)

    def _refuse_largest(self) -> bool:
        """Refuse an answer; return False if all that could be are small."""
        by_tenant: Counter[str | None] = Counter()
        for answer in self._growing:
            by_tenant[answer.tenant] += answer.num_bytes
        large = [answer for answer in self._growing if answer.num_bytes > self._small]
        if not large:
            return False
        largest = max(large, key=lambda each: (by_tenant[each.tenant], each.num_bytes))
        error: TgiError = Overloaded("The server keeps as many bytes of unsent answers as it may")
        if largest.num_bytes > self._max_bytes:
            what = f"`{largest.param}`: the answer takes more than {self._max_bytes} bytes until it is sent"
            error = InvalidRequest(f"{what}. {largest.advice}", param=largest.param)
        self.end(largest)
        self._release(largest)
        largest.refuse(error)
        return True

    def _release(self, answer: KeptAnswer) -> None:
        self.held -= answer.num_bytes
        answer.num_bytes = 0
