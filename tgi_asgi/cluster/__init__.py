"""Several replicas and several models at one address, on Ray Serve (`pip install 'tgi-asgi[ray]'`).

    serve run tgi_asgi.cluster:app model_id=Qwen/Qwen3-0.6B num_replicas=2 num_threads=8

`docs/cluster.md` explains the architecture. Ray is not imported before `app` is called.
"""

from __future__ import annotations

from typing import Any

__all__ = ["app"]


def app(args: dict[str, Any]) -> Any:
    """Return the Serve application for these arguments; called by Serve.

    Raises:
        InvalidRequest: if an argument is unknown or invalid.
    """
    from tgi_asgi.cluster.serving import make_app

    return make_app(args)
