"""Ray Serve's default choice of a replica, which tells our ingress who is there, as ours does."""

from __future__ import annotations

from ray.serve._private.request_router.pow_2_router import PowerOfTwoChoicesRequestRouter
from ray.serve.request_router import PendingRequest, ReplicaID, RunningReplica

from tgi_asgi.cluster import presence


class RaysOwnRouter(PowerOfTwoChoicesRequestRouter):  # type: ignore[misc]  # of Ray, which has no types
    """Two replicas at random, of which the one with the shorter queue."""

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Choose by Ray's own rule for what generates; reports are asked of each replica."""
        found: list[list[RunningReplica]]
        if pending_request is None or pending_request.metadata.call_method == "generate":
            found = await super().choose_replicas(candidate_replicas, pending_request)
            return found
        order = pending_request.args[0].order
        return [[each for each in candidate_replicas if not order or each.replica_id.unique_id in order]]

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Take what the controller says of who is there."""
        super().update_replicas(replicas)
        self._tell()

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """Learn that a replica is gone."""
        super().on_replica_actor_died(replica_id)
        self._tell()

    def _tell(self) -> None:
        names = [replica_id.unique_id for replica_id in self.curr_replicas]
        presence.shared.tell((self.app_name, self._deployment_id.name), names)
