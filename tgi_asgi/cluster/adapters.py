"""The adapters of a cluster, those that its replicas serve, as the API needs them (`types.Adapters`)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from tgi_asgi.cluster.remote import RemoteEngine, ReplicaLost
from tgi_asgi.errors import InvalidRequest, TgiError, UnknownAdapter
from tgi_asgi.types import Adapter

_ReplicaCall = Callable[[str], Awaitable[TgiError | None]]  # of one replica, by its id


class RemoteLease:
    """A request's reference to an adapter; the replica holds the real one while it computes the request."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter

    def release(self) -> None:
        """Do nothing; the replica releases its own reference."""


class RemoteAdapters:
    """Offers every adapter that any replica serves; requests go to replicas that have it."""

    def __init__(self, engine: RemoteEngine) -> None:
        self._engine = engine

    async def start(self) -> None:
        """Do nothing, because replicas read their adapters when they start."""

    def close(self) -> None:
        """Do nothing."""

    def __contains__(self, name: object) -> bool:
        return any(name in replica.adapters for replica in self._engine.table.replicas.values())

    @property
    def names(self) -> list[str]:
        """Names of the adapters that requests may use."""
        return list(self.keys)

    @property
    def keys(self) -> dict[str, str]:
        """The content key of each adapter in `names`, as its first replica reports it."""
        keys: dict[str, str] = {}
        for replica in self._engine.table.replicas.values():
            for name, key in replica.adapters.items():
                keys.setdefault(name, key)
        return keys

    async def lease(self, name: str) -> RemoteLease:
        """Return an adapter without weights; its key is part of the hashes of the prompt's blocks.

        Raises:
            UnknownAdapter: if no replica serves it.
        """
        for replica in self._engine.table.replicas.values():
            if name in replica.adapters:
                return RemoteLease(Adapter(name, replica.adapters[name], None))
        raise UnknownAdapter(name, param="model")

    async def add(self, name: str, location: str) -> None:
        """Make every replica read an adapter.

        Raises:
            InvalidRequest, Overloaded: if one of them failed; then none keeps it.
        """
        if name in self:
            raise InvalidRequest(f"The name '{name}' is taken", param="lora_name")
        call = self._engine.transport.call
        errors = await self._everywhere(lambda replica: call(replica, "add_adapter", name, location))
        if error := next(filter(None, errors.values()), None):
            # On the others, the adapter of this name may be that of a call at the same time.
            added = [replica for replica, failure in errors.items() if failure is None]
            await _ask_each(added, lambda replica: call(replica, "remove_adapter", name))
            raise error
        await self._engine.refresh()

    async def replace(self, name: str, location: str) -> None:
        """Make every replica read an adapter that replaces the one of this name.

        A replica that fails keeps the old adapter while the others have the new one. Cached prompts stay
        separate, because their keys depend on the contents; repeating the call makes the replicas equal.

        Raises:
            InvalidRequest, Overloaded: if one of them failed.
            UnknownAdapter: if the name was unloaded meanwhile.
        """
        call = self._engine.transport.call
        errors = await self._everywhere(lambda replica: call(replica, "replace_adapter", name, location))
        await self._engine.refresh()
        if error := next(filter(None, errors.values()), None):
            raise error

    async def remove(self, name: str) -> None:
        """Make every replica unload an adapter once its requests have ended.

        Raises:
            UnknownAdapter: if no replica serves it.
        """
        if name not in self:
            raise UnknownAdapter(name, param="lora_name")
        await self._everywhere(lambda replica: self._engine.transport.call(replica, "remove_adapter", name))
        await self._engine.refresh()

    async def _everywhere(self, call: _ReplicaCall) -> dict[str, TgiError | None]:
        """Call every replica; return each one's error."""
        return await _ask_each(self._engine.transport.replicas(), call)


async def _ask_each(replicas: Sequence[str], call: _ReplicaCall) -> dict[str, TgiError | None]:
    """Call these replicas at the same time; return each one's error, None if it is lost."""

    async def ask(replica: str) -> TgiError | None:
        try:
            return await call(replica)
        except ReplicaLost:
            return None

    return dict(zip(replicas, await asyncio.gather(*map(ask, replicas)), strict=True))
