"""A cluster in one process, without Ray: each replica is the real engine over a runner without a model.

async with LocalCluster(2) as cluster:
    answer = await send(cluster.app, request("POST", "/v1/chat/completions", {...}))
    cluster.kill("r0")                         # its streams fail, as when Ray's actor ends
"""

from __future__ import annotations

import asyncio
import hashlib
import pickle
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from tests.support.fake_runner import FakeRunner
from tests.support.scripted_engine import CHATML, toy_info
from tests.support.toy_tokenizer import ToyTokenizer
from tests.support.waiting import LONGEST_S
from tgi_asgi.api.served import Served
from tgi_asgi.app import App, Loader
from tgi_asgi.cluster.ingress import ingress_app
from tgi_asgi.cluster.remote import RemoteEngine, ReplicaLost
from tgi_asgi.cluster.replica import Replica
from tgi_asgi.cluster.wire import Reply, WireRequest
from tgi_asgi.engine.adapters import Adapters
from tgi_asgi.engine.engine import Engine
from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats.sources import AdapterSource, adapter_sources
from tgi_asgi.settings import Settings
from tgi_asgi.text.chat.template import ChatTemplate
from tgi_asgi.types import Progress

CONTEXT = 4096


def toy_loader(*, num_blocks: int = 512, step_s: float = 0.0) -> Loader:
    """Return a loader of the toy model that makes a new runner for each load."""

    def load(settings: Settings, progress: Progress) -> Served:
        made = FakeRunner(
            num_blocks=num_blocks, step_s=step_s, max_batch_size=settings.max_batch_size, keeps_plans=False
        )
        tokenizer = ToyTokenizer()
        info = toy_info(
            model_id=settings.model_name,
            max_total_tokens=CONTEXT,
            max_input_tokens=CONTEXT - 1,
        )
        engine = Engine(made, tokenizer, settings, info)
        adapters = None
        if settings.serves_adapters:
            adapters = Adapters(_load_adapter, adapter_sources(settings), max_loaded=8)
        return Served(
            engine,
            tokenizer,  # type: ignore[arg-type]
            ChatTemplate(CHATML, {}),
            info,
            engine.stats,
            adapters=adapters,
        )

    return load


@dataclass
class _LoadedAdapter:
    weights: object
    digest: bytes
    rank: int = 4
    num_bytes: int = 1000


def _load_adapter(source: AdapterSource) -> _LoadedAdapter:
    """Return a fake adapter, or raise for the location `/missing`."""
    if source.location == "/missing":
        raise ModelLoadError("/missing: no such directory")
    return _LoadedAdapter(object(), hashlib.blake2b(source.location.encode(), digest_size=16).digest())


class LocalTransport:
    """A `remote.Transport` within this process; messages are pickled as between processes."""

    def __init__(self) -> None:
        self.found: dict[str, Replica] = {}
        self.sent: list[tuple[str, WireRequest]] = []
        self.lost: dict[str, asyncio.Event] = {}
        self.changed = asyncio.Event()

    def replicas(self) -> Sequence[str]:
        self.changed.clear()
        return list(self.found)

    async def wait_for_change(self) -> None:
        await self.changed.wait()

    async def generate(self, order: Sequence[str], request: WireRequest) -> AsyncIterator[Reply]:
        name = next((name for name in order if name in self.found), None)
        if name is None:
            raise ReplicaLost(order[0])
        self.sent.append((name, request))
        replies = self.found[name].generate(pickle.loads(pickle.dumps(request)))
        lost = asyncio.ensure_future(self.lost[name].wait())
        following: asyncio.Future[Reply | None] | None = None
        try:
            while True:
                following = asyncio.ensure_future(anext(replies, None))
                await asyncio.wait({following, lost}, return_when=asyncio.FIRST_COMPLETED)
                if lost.done():
                    raise ReplicaLost(name)
                reply = await following
                if reply is None:
                    return
                yield pickle.loads(pickle.dumps(reply))
        finally:
            lost.cancel()
            if following is not None:
                following.cancel()
                await asyncio.wait({following})
            await replies.aclose()  # type: ignore[attr-defined]

    async def call(self, replica: str, method: str, *arguments: Any) -> Any:
        if replica not in self.found:
            raise ReplicaLost(replica)
        found = getattr(self.found[replica], method)(*arguments)
        found = await found if asyncio.iscoroutine(found) else found
        return pickle.loads(pickle.dumps(found))


class LocalCluster:
    """Replicas and an ingress, started and stopped together."""

    def __init__(
        self,
        num_replicas: int,
        settings: Settings | None = None,
        *,
        step_s: float = 0.0,
    ) -> None:
        self.settings = settings or Settings(model_id="toy/model")
        self.transport = LocalTransport()
        self.app: App = ingress_app(
            self.settings,
            lambda: (self.transport, pickle.loads(pickle.dumps(self.transport.found["r0"].describe()))),
        )
        self._num_replicas = num_replicas
        self._loader = toy_loader(step_s=step_s)
        self._replicas: list[Replica] = []

    @property
    def engine(self) -> RemoteEngine:
        """The ingress' engine."""
        assert self.app.context.served is not None
        return self.app.context.served.engine  # type: ignore[return-value]

    def engine_of(self, name: str) -> Engine:
        """Return a replica's own engine."""
        return self.transport.found[name]._engine

    async def start_replica(self, name: str) -> None:
        """Add a replica."""
        replica = await Replica.start(name, self.settings, self._loader)
        self._replicas.append(replica)
        self.transport.lost[name] = asyncio.Event()
        self.transport.found[name] = replica
        self.transport.changed.set()

    def kill(self, name: str) -> None:
        """End a replica as if its machine were lost: it sends nothing more."""
        del self.transport.found[name]
        self.transport.lost[name].set()
        self.transport.changed.set()

    async def __aenter__(self) -> Self:
        for number in range(self._num_replicas):
            await self.start_replica(f"r{number}")
        self.app.start()
        async with asyncio.timeout(LONGEST_S):
            while self.app.context.served is None:
                await asyncio.sleep(0.001)
            await self.engine.refresh()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.app.stop()
        for replica in self._replicas:
            await replica.stop()
