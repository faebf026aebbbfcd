"""Cluster configuration, from the arguments of `serve run` or the `args` of Serve's configuration file.

    serve run tgi_asgi.cluster:app model_id=Qwen/Qwen3-0.6B num_replicas=2 num_threads=8

Does not depend on Ray; Ray's own options pass through unchanged.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tgi_asgi.errors import InvalidRequest
from tgi_asgi.settings import DEMO_MODEL, Settings, kinds

_SETTINGS = {spec.name: spec for spec in dataclasses.fields(Settings)}
# Settings of a process that Serve decides: where it listens, and how replicas start and stop.
_REFUSED = {
    "hostname": "set Serve's http_options.host",
    "port": "set Serve's http_options.port",
    "uds": "Serve listens on TCP",
    "ssl_certfile": "set Serve's http_options.ssl_certfile",
    "ssl_keyfile": "set Serve's http_options.ssl_keyfile",
    "max_connections_per_client": "Serve accepts the connections",
    "drain_delay_s": "Serve takes a replica out of its list before it drains",
}
_PLACEMENT = ("num_replicas", "autoscaling_config", "ray_actor_options")


@dataclass(frozen=True, slots=True)
class ModelDeployment:
    """One model: its settings, and the number and size of its replicas in Ray's own terms."""

    settings: Settings
    num_replicas: int | None = None
    autoscaling_config: Mapping[str, Any] | None = None
    ray_actor_options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ClusterConfig:
    """The models at one address, the first of which answers requests that name none; and the ingress."""

    models: tuple[ModelDeployment, ...]
    num_ingresses: int = 1
    ingress_actor_options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_args(cls, args: Mapping[str, Any]) -> ClusterConfig:
        """Read Serve's arguments: server options by name, `num_replicas`, and so on.

        Raises:
            InvalidRequest: if an argument is unknown or invalid; the message names it.
        """
        common = dict(args)
        ingress = common.pop("ingress", None) or {}
        listed = common.pop("models", None) or [{}]
        if not isinstance(listed, list) or not all(isinstance(each, Mapping) for each in listed):
            raise InvalidRequest("`models` must be a list of objects", param="models")
        if not isinstance(ingress, Mapping) or ingress.keys() - {"num_replicas", "ray_actor_options"}:
            rule = "`ingress` must be an object with num_replicas or ray_actor_options"
            raise InvalidRequest(rule, param="ingress")
        models = tuple(_model({**common, **each}, is_only=len(listed) == 1) for each in listed)
        names = [name_of(model) for model in models]
        if len(set(names)) < len(names):
            raise InvalidRequest(f"two models have the same name: {', '.join(sorted(names))}", param="models")
        return cls(
            models,
            _count("ingress.num_replicas", ingress.get("num_replicas", 1)),
            dict(ingress.get("ray_actor_options") or {}),
        )


def name_of(model: ModelDeployment) -> str:
    """Return the name by which requests select the model."""
    return str(model.settings.model_name)


def _model(args: Mapping[str, Any], *, is_only: bool) -> ModelDeployment:
    for name in args:
        if name in _REFUSED:
            raise InvalidRequest(f"`{name}` has no meaning in a cluster: {_REFUSED[name]}", param=name)
        if name not in _SETTINGS and name not in _PLACEMENT:
            raise InvalidRequest(
                f"`{name}` is neither an option of the server nor of the cluster", param=name
            )
    args = {name: value for name, value in args.items() if value is not None}  # null is unset
    given = {name: value for name, value in args.items() if name not in _PLACEMENT}
    given.setdefault("model_id", DEMO_MODEL)
    if not is_only:  # otherwise the first model would answer a mistyped name
        given.setdefault("strict_model_names", True)
    options, autoscaling = (
        _mapping(name, args.get(name)) for name in ("ray_actor_options", "autoscaling_config")
    )
    settings, options = _settings(given), dict(options or {})
    # A replica's threads and the cores that Ray reserves for it are the same.
    num_cpus = options.get("num_cpus")
    if settings.num_threads is not None:
        options.setdefault("num_cpus", settings.num_threads)
    elif isinstance(num_cpus, int | float) and num_cpus >= 1:
        settings = dataclasses.replace(settings, num_threads=int(num_cpus))
    if autoscaling is not None and "num_replicas" in args:
        raise InvalidRequest("num_replicas and autoscaling_config are exclusive", param="num_replicas")
    num_replicas = None if autoscaling is not None else _count("num_replicas", args.get("num_replicas", 1))
    return ModelDeployment(settings, num_replicas, autoscaling, options)


def _settings(given: Mapping[str, Any]) -> Settings:
    """Return settings from values, typed as in a file or text as on a command line."""
    texts = {name.upper(): value for name, value in given.items() if isinstance(value, str) and value}
    values = {name: _typed(name, value) for name, value in given.items() if not isinstance(value, str)}
    return Settings.from_environ(texts, **values)


def _typed(name: str, value: Any) -> Any:
    """Return a file's value with the type of its setting.

    Raises:
        InvalidRequest: if it has another. The message does not show the value, which may be a key.
    """
    spec = _SETTINGS[name]
    kind = str(spec.type).partition(" ")[0]
    match kind, value:
        case ("bool", bool()) | ("float", float()):
            return value
        case "int" | "float", int() if not isinstance(value, bool):
            return value
        case "str", Mapping() if spec.metadata["kind"] is kinds.JSON:
            return json.dumps(value)
        case "tuple[str,", list() if all(isinstance(each, str) for each in value):
            return tuple(value)
    rules = {"bool": "true or false", "int": "an integer", "float": "a number", "str": "text in quotes"}
    rule = rules.get(kind, "text in quotes, or a list of it")
    raise InvalidRequest(f"`{name}` must be {rule}, got {type(value).__name__}", param=name)


def _mapping(name: str, value: Any) -> Mapping[str, Any] | None:
    if value is not None and not isinstance(value, Mapping):
        raise InvalidRequest(f"`{name}` must be an object, got {type(value).__name__}", param=name)
    return value


def _count(name: str, value: Any) -> int:
    if isinstance(value, str) and value.isdigit():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InvalidRequest(f"`{name}` must be at least 1, got {value!r}", param=name)
    return value
