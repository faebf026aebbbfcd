"""The adapters of a cluster, those that its replicas serve, as the API needs them (`types.Adapters`)."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

from tgi_asgi.cluster.remote import RemoteEngine, ReplicaLost
from tgi_asgi.errors import InvalidRequest, TgiError, UnknownAdapter
from tgi_asgi.types import Adapter

logger = logging.getLogger(__name__)

_ReplicaCall = Callable[[str], Awaitable[TgiError | None]]  # of one replica, by its id
_Errors = dict[str, Exception | None]  # of each replica


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
            TgiError: if one of them failed; then none keeps it.
        """
        if name in self:
            raise InvalidRequest(f"The name '{name}' is taken", param="lora_name")
        call = self._engine.transport.call
        errors = await self._everywhere(lambda replica: call(replica, "add_adapter", name, location))
        if any(errors.values()):
            # Where a replica has refused, the adapter of this name may be that of a call at the same time.
            # Where the call itself has failed, the replica may have read it.
            added = [replica for replica, failure in errors.items() if not isinstance(failure, TgiError)]
            await _ask_each(added, lambda replica: call(replica, "remove_adapter", name))
        await self._engine.refresh()
        _raise_first(errors)

    async def replace(self, name: str, location: str) -> None:
        """Make every replica read an adapter that replaces the one of this name.

        A replica that fails keeps the old adapter while the others have the new one. Cached prompts stay
        separate, because their keys depend on the contents; repeating the call makes the replicas equal.

        Raises:
            TgiError: if one of them failed.
            UnknownAdapter: if the name was unloaded meanwhile.
        """
        call = self._engine.transport.call
        errors = await self._everywhere(lambda replica: call(replica, "replace_adapter", name, location))
        await self._engine.refresh()
        _raise_first(errors)

    async def remove(self, name: str) -> None:
        """Make every replica unload an adapter once its requests have ended.

        Raises:
            UnknownAdapter: if no replica serves it.
            TgiError: if one of them failed.
        """
        if name not in self:
            raise UnknownAdapter(name, param="lora_name")
        call = self._engine.transport.call
        errors = await self._everywhere(lambda replica: call(replica, "remove_adapter", name))
        await self._engine.refresh()
        # A replica that has started since does not know it.
        _raise_first({key: error for key, error in errors.items() if not isinstance(error, UnknownAdapter)})

    async def _everywhere(self, call: _ReplicaCall) -> _Errors:
        """Call every replica; return each one's error."""
        return await _ask_each(self._engine.transport.replicas(), call)


async def _ask_each(replicas: Sequence[str], call: _ReplicaCall) -> _Errors:
    """Call these replicas at the same time; return each one's error, None if it is lost.

    A replica returns its errors as `TgiError`; any other means that the call failed on its way.
    """

    async def ask(replica: str) -> Exception | None:
        try:
            return await call(replica)
        except ReplicaLost:
            return None
        except Exception as error:  # of one replica; what the others did must be known
            logger.warning("changing an adapter of replica %s failed", replica, exc_info=error)
            return error

    return dict(zip(replicas, await asyncio.gather(*map(ask, replicas)), strict=True))


def _raise_first(errors: _Errors) -> None:
    """Raise the first replica's error, if there is any."""
    error = next(filter(None, errors.values()), None)
    if error is not None and not isinstance(error, TgiError):
        raise TgiError(f"A replica could not be asked: {type(error).__name__}; the log says why") from error
    if error is not None:
        raise error
