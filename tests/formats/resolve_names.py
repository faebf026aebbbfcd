"""Resolve names of models, with the settings that variables give; print what each is, as a line of JSON."""

from __future__ import annotations

import json
import logging
import sys
from typing import Any

from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats.sources import resolve
from tgi_asgi.settings import Settings


def _resolved(name: str) -> dict[str, Any]:
    steps: list[tuple[str, int, int | None]] = []
    try:
        files = resolve(Settings.from_environ(model_id=name), lambda *step: steps.append(step))
    except ModelLoadError as error:
        return {"error": str(error)}
    return {
        "model_id": files.model_id,
        "kind": files.kind,
        "path": str(files.path),
        "revision": files.revision,
        "more": [str(each) for each in (files.adapter, files.projector) if each is not None],
        "steps": steps,
    }


if __name__ == "__main__":
    logging.basicConfig(level="INFO", format="%(message)s")
    for each in sys.argv[1:]:
        print(json.dumps(_resolved(each)))
