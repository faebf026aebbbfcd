"""Several replicas, and several models, behind one address: on Ray Serve (`pip install 'tgi-asgi[ray]'`).

    serve run tgi_asgi.cluster:app model_id=Qwen/Qwen3-0.6B num_replicas=2 num_threads=8

`docs/cluster.md` shows how the parts fit. Nothing of Ray is imported before `app` is called.
"""

from __future__ import annotations

from typing import Any

__all__ = ["app"]


def app(args: dict[str, Any]) -> Any:
    """Return the Serve application that arguments describe; Serve calls it.

    Raises:
        InvalidRequest: an argument is not known, or not valid.
    """
    from tgi_asgi.cluster.serving import make_app

    return make_app(args)
