"""The Ray Serve deployments of a cluster: one of replicas per model, and one of ingresses.

Only this module and `routing.py` import Ray.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ray import serve
from ray.exceptions import RayActorError
from ray.serve.config import RequestRouterConfig
from ray.serve.exceptions import DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle

from tgi_asgi.app import Loader
from tgi_asgi.assembly import load_model
from tgi_asgi.cluster.config import ClusterConfig, ModelDeployment, name_of
from tgi_asgi.cluster.dispatcher import dispatch_app
from tgi_asgi.cluster.ingress import ingress_app
from tgi_asgi.cluster.presence import Wanted, shared
from tgi_asgi.cluster.remote import ReplicaLost, Transport
from tgi_asgi.cluster.replica import Replica
from tgi_asgi.cluster.wire import CacheVersion, Description, Reply, Report, WireRequest
from tgi_asgi.errors import TgiError
from tgi_asgi.observe import logs
from tgi_asgi.serve.process import shorten_waits_for_gil
from tgi_asgi.settings import Settings

ROUTER = "tgi_asgi.cluster.routing:PreferringRouter"
_SLACK = 64  # calls in addition to those that generate: reports, and those that the engine itself refuses
_MAX_INGRESS_REQUESTS = 100_000  # the ingress's own permits limit it
_DRAIN_SLACK_S = 5.0


class ReplicaDeployment:
    """The actor around a replica; its ongoing calls are what runs and waits in its engine."""

    async def __init__(self, settings: Settings, loader: Loader) -> None:  # type: ignore[misc]  # Ray awaits it
        logs.configure(settings)
        shorten_waits_for_gil()
        name = serve.get_replica_context().replica_id.unique_id
        self._replica = await Replica.start(name, settings, loader)

    async def generate(self, _wanted: Wanted, request: WireRequest) -> AsyncIterator[Reply]:
        """Yield an answer as it is generated."""
        async for reply in self._replica.generate(request):
            yield reply

    async def describe(self, _wanted: Wanted) -> Description:
        """Return what an ingress needs to know about the model."""
        return self._replica.describe()

    async def report(self, _wanted: Wanted, known: CacheVersion) -> Report:
        """Return the replica's status."""
        return self._replica.report(known)

    async def add_adapter(self, _wanted: Wanted, name: str, location: str) -> TgiError | None:
        """Read an adapter."""
        return await self._replica.add_adapter(name, location)

    async def replace_adapter(self, _wanted: Wanted, name: str, location: str) -> TgiError | None:
        """Read an adapter that replaces the one of this name."""
        return await self._replica.replace_adapter(name, location)

    async def remove_adapter(self, _wanted: Wanted, name: str) -> TgiError | None:
        """Unload an adapter."""
        return await self._replica.remove_adapter(name)

    async def reset_prefix_cache(self, _wanted: Wanted) -> int:
        """Drop all cached prompts."""
        return self._replica.reset_prefix_cache()

    async def check_health(self) -> None:
        """Raise if the engine is dead, so that Ray starts another replica."""
        self._replica.check()

    async def __del__(self) -> None:
        if hasattr(self, "_replica"):
            await self._replica.stop()


@serve.ingress()
class IngressDeployment:
    """The actor around the API: one application per model, combined by `dispatcher.py` if several."""

    def __init__(self, models: Sequence[tuple[Settings, DeploymentHandle[Any]]]) -> None:
        logs.configure(models[0][0])
        shorten_waits_for_gil()
        self._models = models

    def __serve_build_asgi_app__(self) -> Any:  # name required by Ray
        return dispatch_app([_app_of(settings, handle) for settings, handle in self._models])


def _app_of(settings: Settings, handle: DeploymentHandle[Any]) -> Any:
    loop = asyncio.get_running_loop()

    async def describe() -> Description:
        description: Description = await handle.describe.remote(Wanted())
        return description

    def connect() -> tuple[Transport, Description]:
        description = asyncio.run_coroutine_threadsafe(describe(), loop).result()
        # A transport subscribes for good, so there must not be one for each failed attempt.
        return RayTransport(handle, loop), description

    return ingress_app(settings, connect)


class RayTransport:
    """A `remote.Transport` over a deployment's handle; used only on `loop`."""

    def __init__(self, handle: DeploymentHandle[Any], loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._handle = handle
        self._streams = handle.options(stream=True)
        self._replicas: Sequence[str] = ()
        self._has_changed = asyncio.Event()
        shared.subscribe((handle.app_name, handle.deployment_name), self._on_replicas)

    def replicas(self) -> Sequence[str]:
        """Return the ids of the current replicas."""
        self._has_changed.clear()
        return self._replicas

    async def wait_for_change(self) -> None:
        """Return once the replicas differ from those of the last `replicas` call."""
        await self._has_changed.wait()

    async def generate(self, order: Sequence[str], request: WireRequest) -> AsyncIterator[Reply]:
        """Yield replies, as `Transport.generate`; a reader that stops early cancels the request."""
        if not any(name in self._replicas for name in order):  # Ray would wait until one appears
            raise ReplicaLost(order[0])
        stream = self._streams.generate.remote(Wanted(tuple(order)), request)
        is_over = False
        try:
            with _translate_ray_errors():
                async for reply in stream:
                    yield reply
            is_over = True
        except ReplicaLost:
            is_over = True
            raise
        finally:
            if not is_over:
                stream.cancel()

    async def call(self, replica: str, method: str, *arguments: Any) -> Any:
        """Call a method of one replica, as `Transport.call`."""
        if replica not in self._replicas:
            raise ReplicaLost(replica)
        with _translate_ray_errors():
            return await getattr(self._handle, method).remote(Wanted((replica,)), *arguments)

    def _on_replicas(self, replicas: Sequence[str]) -> None:
        """Store the current replicas; called in the router's thread."""
        self._replicas = tuple(replicas)
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._has_changed.set)


@contextlib.contextmanager
def _translate_ray_errors() -> Iterator[None]:
    """Translate Ray's errors for an actor that is gone or ended its call to `ReplicaLost`."""
    try:
        yield
    except (RayActorError, DeploymentUnavailableError, ReplicaUnavailableError) as error:
        raise ReplicaLost(type(error).__name__) from error
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise ReplicaLost("the call was cancelled") from error  # by the replica: nothing here cancelled it


def make_app(args: Mapping[str, Any], loader: Loader = load_model, router: str = ROUTER) -> Any:
    """Return the Serve application; tests and benchmarks replace `loader` and `router`.

    Raises:
        InvalidRequest: if an argument is unknown or invalid.
    """
    config = ClusterConfig.from_args(args)
    bound = []
    for model in config.models:
        bound.append((model.settings, _replicas_of(model, loader, router)))
    ingress = serve.deployment(
        IngressDeployment,
        name="ingress",
        num_replicas=config.num_ingresses,
        max_ongoing_requests=_MAX_INGRESS_REQUESTS,
        graceful_shutdown_timeout_s=config.models[0].settings.graceful_termination_timeout + _DRAIN_SLACK_S,
        ray_actor_options={"num_cpus": 0, **config.ingress_actor_options},
    )
    return ingress.bind(bound)


def _replicas_of(model: ModelDeployment, loader: Loader, router: str) -> Any:
    settings = model.settings
    # Only the ingress checks keys, and a replica's start arguments are visible in Ray's dashboard.
    bare = replace(
        settings,
        api_key=(),
        api_key_file=None,
        admin_api_key=None,
        requests_per_minute=0,
        otlp_endpoint=None,
    )
    given: dict[str, Any] = {"num_replicas": model.num_replicas}
    if model.autoscaling_config is not None:
        given = {"autoscaling_config": dict(model.autoscaling_config)}
    deployment = serve.deployment(
        ReplicaDeployment,
        name=f"model {name_of(model)}".replace("/", "--"),
        max_ongoing_requests=settings.max_concurrent_requests + _SLACK,
        graceful_shutdown_timeout_s=settings.graceful_termination_timeout + _DRAIN_SLACK_S,
        health_check_period_s=5.0,
        request_router_config=RequestRouterConfig(request_router_class=router),
        ray_actor_options=dict(model.ray_actor_options),
        **given,
    )
    return deployment.bind(bare, loader)
