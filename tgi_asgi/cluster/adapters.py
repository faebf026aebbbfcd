"""The adapters of a cluster: those that its replicas serve, as the API sees them (`types.Adapters`)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from tgi_asgi.cluster.remote import RemoteEngine, ReplicaLost
from tgi_asgi.errors import InvalidRequest, TgiError, UnknownAdapter
from tgi_asgi.types import Adapter


class RemoteLease:
    """A request's hold on an adapter: the replica holds it while it computes the request."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter

    def release(self) -> None:
        """Let go."""


class RemoteAdapters:
    """What can be asked for is what any replica serves; requests go to those that do."""

    def __init__(self, engine: RemoteEngine) -> None:
        self._engine = engine

    async def start(self) -> None:
        """Do nothing: replicas read theirs when they start."""

    def close(self) -> None:
        """Do nothing."""

    def __contains__(self, name: object) -> bool:
        return any(name in replica.adapters for replica in self._engine.table.replicas.values())

    @property
    def names(self) -> list[str]:
        """Those that can be asked for."""
        replicas = self._engine.table.replicas.values()
        return list(dict.fromkeys(name for replica in replicas for name in replica.adapters))

    async def lease(self, name: str) -> RemoteLease:
        """Return an adapter without weights, whose key the prompt's blocks are hashed with.

        Raises:
            UnknownAdapter: no replica serves it.
        """
        for replica in self._engine.table.replicas.values():
            if name in replica.adapters:
                return RemoteLease(Adapter(name, replica.adapters[name], None))
        raise UnknownAdapter(name, param="model")

    async def add(self, name: str, location: str) -> None:
        """Have every replica read an adapter.

        Raises:
            InvalidRequest, Overloaded: one of them could not; then none has it.
        """
        if name in self:
            raise InvalidRequest(f"The name '{name}' is taken", param="lora_name")
        call = self._engine.transport.call
        found = await self._everywhere(lambda replica: call(replica, "add_adapter", name, location))
        if error := next(filter(None, found), None):
            await self._everywhere(lambda replica: call(replica, "remove_adapter", name))
            raise error
        await self._engine.refresh()

    async def replace(self, name: str, location: str) -> None:
        """Have every replica read an adapter in place of that of the name.

        Where one of them cannot, it keeps the old one and the others have the new one: cached prompts are
        told apart, as their contents are; asking again makes them equal.

        Raises:
            InvalidRequest, Overloaded: one of them could not.
            UnknownAdapter: the name was unloaded meanwhile.
        """
        call = self._engine.transport.call
        found = await self._everywhere(lambda replica: call(replica, "replace_adapter", name, location))
        await self._engine.refresh()
        if error := next(filter(None, found), None):
            raise error

    async def remove(self, name: str) -> None:
        """Have every replica forget an adapter, once its requests have ended.

        Raises:
            UnknownAdapter: none serves it.
        """
        if name not in self:
            raise UnknownAdapter(name, param="lora_name")
        await self._everywhere(lambda replica: self._engine.transport.call(replica, "remove_adapter", name))
        await self._engine.refresh()

    async def _everywhere(self, call: Callable[[str], Awaitable[TgiError | None]]) -> list[TgiError | None]:
        """Call every replica; one that is lost has nothing to say."""

        async def ask(replica: str) -> TgiError | None:
            try:
                return await call(replica)
            except ReplicaLost:
                return None

        return await asyncio.gather(*map(ask, self._engine.transport.replicas()))
