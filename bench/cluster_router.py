"""Ray Serve's default choice of a replica, which tells our ingress who is there, as ours does."""

from __future__ import annotations

from ray.serve._private.request_router.pow_2_router import PowerOfTwoChoicesRequestRouter
from ray.serve.request_router import ReplicaID, RunningReplica

from tgi_asgi.cluster import presence


class RaysOwnRouter(PowerOfTwoChoicesRequestRouter):  # type: ignore[misc]  # of Ray, which has no types
    """Two replicas at random, of which the one with the shorter queue."""

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
