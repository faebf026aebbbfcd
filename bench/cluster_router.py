"""Ray Serve's default choice of a replica, which tells our ingress who is there, as ours does."""

from __future__ import annotations

from ray.serve._private.request_router.pow_2_router import PowerOfTwoChoicesRequestRouter
from ray.serve.request_router import PendingRequest, RunningReplica

from tgi_asgi.cluster.routing import TellsIngress


class RaysOwnRouter(TellsIngress, PowerOfTwoChoicesRequestRouter):  # type: ignore[misc]  # of Ray, which has no types
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
