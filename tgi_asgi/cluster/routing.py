"""Ray Serve's half of routing: it sends a request where the ingress says, and tells the ingress who is there.

The choice itself is `table.py`'s, made where the prompt has been hashed. Ray makes the router in the ingress'
process, in a thread with an event loop of its own, from a copy of this module.
"""

from __future__ import annotations

from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from tgi_asgi.cluster import presence


class TellsIngress:
    """What a router of Ray's gets beside its choice: it tells the ingress of its process who is there."""

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Take what the controller says of who is there."""
        super().update_replicas(replicas)  # type: ignore[misc]
        self._tell()

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """Learn from a failed call that a replica is gone, before the controller says so."""
        super().on_replica_actor_died(replica_id)  # type: ignore[misc]
        self._tell()

    def _tell(self) -> None:
        router: Any = self
        names = [replica_id.unique_id for replica_id in router.curr_replicas]
        presence.shared.tell((router.app_name, router._deployment_id.name), names)


class PreferringRouter(TellsIngress, RequestRouter):  # type: ignore[misc]  # of Ray, which has no types
    """Take the first of the wanted replicas that is there, else any."""

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Return the candidates in the order in which they are to be tried, one a rank."""
        wanted: Any = (
            pending_request.args[0] if pending_request is not None and pending_request.args else None
        )
        order = wanted.order if isinstance(wanted, presence.Wanted) else ()
        by_id = {each.replica_id.unique_id: each for each in candidate_replicas}
        ranks = [[by_id.pop(name)] for name in order if name in by_id]
        return [*ranks, list(by_id.values())] if by_id else ranks
