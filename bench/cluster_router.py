"""Ray Serve's default router, made to report the replicas to the ingress as the native router does."""

from __future__ import annotations

from ray.serve._private.request_router.pow_2_router import PowerOfTwoChoicesRequestRouter
from ray.serve.request_router import PendingRequest, RunningReplica

from tgi_asgi.cluster.routing import ReplicaReporter


class RaysOwnRouter(ReplicaReporter, PowerOfTwoChoicesRequestRouter):  # type: ignore[misc]  # of Ray, which has no types
    """Chooses the one with the shorter queue of two random replicas."""

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Choose by Ray's own rule for generation requests; reports are requested from every replica."""
        found: list[list[RunningReplica]]
        if pending_request is None or pending_request.metadata.call_method == "generate":
            found = await super().choose_replicas(candidate_replicas, pending_request)
            return found
        order = pending_request.args[0].order
        return [[each for each in candidate_replicas if not order or each.replica_id.unique_id in order]]
