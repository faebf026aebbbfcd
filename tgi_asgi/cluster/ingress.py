"""The API in front of the replicas: the regular application with a remote engine, one per model.

Does not depend on Ray; `serving.py` makes a deployment of it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import cast

from tgi_asgi.api.served import Served
from tgi_asgi.app import App, create_app
from tgi_asgi.cluster.adapters import RemoteAdapters
from tgi_asgi.cluster.remote import RemoteEngine, Transport
from tgi_asgi.cluster.wire import Description
from tgi_asgi.settings import Settings
from tgi_asgi.types import Engine, Progress

logger = logging.getLogger(__name__)

FIRST_PAUSE_S = 1.0  # between two attempts to reach a replica; it doubles
MAX_PAUSE_S = 30.0

Connect = Callable[[], tuple[Transport, Description]]  # waits for the first replica; called in a thread


def ingress_app(settings: Settings, connect: Connect) -> App:
    """Return the application for one model; it is loading until a replica has described the model."""

    def loader(settings: Settings, progress: Progress) -> Served:
        progress("waiting for a replica", 0, None)
        transport, description = _connect(connect, app.has_stopped)
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

    app = create_app(settings, loader)
    return app


def _connect(connect: Connect, has_stopped: threading.Event) -> tuple[Transport, Description]:
    """Connect; if that fails, try again: Ray replaces lost replicas, but not an ingress that cannot serve.

    Raises:
        Exception: the last attempt's, if the application has stopped.
    """
    pause_s = FIRST_PAUSE_S
    while True:
        try:
            return connect()
        except Exception as error:  # a replica that ended meanwhile, or is not deployed yet
            logger.warning("no replica could be asked; trying again in %g s", pause_s, exc_info=error)
            if has_stopped.wait(pause_s):
                raise
        pause_s = min(2 * pause_s, MAX_PAUSE_S)
