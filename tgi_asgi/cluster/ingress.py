"""The API in front of the replicas: the regular application with a remote engine, one per model.

Does not depend on Ray; `serving.py` makes a deployment of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from tgi_asgi.api.context import Served
from tgi_asgi.app import App, create_app
from tgi_asgi.cluster.adapters import RemoteAdapters
from tgi_asgi.cluster.remote import RemoteEngine, Transport
from tgi_asgi.cluster.wire import Description
from tgi_asgi.settings import Settings
from tgi_asgi.types import Engine, Progress

Connect = Callable[[], tuple[Transport, Description]]  # waits for the first replica; called in a thread


def ingress_app(settings: Settings, connect: Connect) -> App:
    """Return the application for one model; it is loading until a replica has described the model."""

    def loader(settings: Settings, progress: Progress) -> Served:
        progress("waiting for a replica", 0, None)
        transport, description = connect()
        engine = RemoteEngine(transport, settings, description.block_size)
        return Served(
            cast(Engine, engine),
            description.tokenizer,
            description.chat_template,
            description.info,
            engine.stats,
            description.image_processor,
            RemoteAdapters(engine) if description.has_adapters else None,
        )

    return create_app(settings, loader)
