"""Ray Serve's part of routing: sends a request where the ingress says, and reports replicas to the ingress.

The choice itself is made in `table.py`, where the prompt has been hashed. Ray creates the router in the
ingress process, in a thread with its own event loop, from a copy of this module.
"""

from __future__ import annotations

from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from tgi_asgi.cluster import presence


class ReplicaReporter:
    """Mixin for Ray routers that reports the existing replicas to the ingress of its process."""

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Accept the controller's list of replicas."""
        super().update_replicas(replicas)  # type: ignore[misc]
        self._publish_replicas()

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """Drop a replica after a failed call, before the controller reports it."""
        super().on_replica_actor_died(replica_id)  # type: ignore[misc]
        self._publish_replicas()

    def _publish_replicas(self) -> None:
        router: Any = self
        names = [replica_id.unique_id for replica_id in router.curr_replicas]
        presence.shared.publish((router.app_name, router._deployment_id.name), names)


class PreferringRouter(ReplicaReporter, RequestRouter):  # type: ignore[misc]  # Ray has no types
    """Chooses the first wanted replica that exists, otherwise any."""

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Return the candidates in the order in which to try them, one per rank."""
        wanted: Any = (
            pending_request.args[0] if pending_request is not None and pending_request.args else None
        )
        order = wanted.order if isinstance(wanted, presence.Wanted) else ()
        by_id = {each.replica_id.unique_id: each for each in candidate_replicas}
        ranks = [[by_id.pop(name)] for name in order if name in by_id]
        return [*ranks, list(by_id.values())] if by_id else ranks
