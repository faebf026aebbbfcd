"""The `tgi-asgi` command; its import of what loads models waits until something opens the FIFO in GATE."""

from __future__ import annotations

import importlib.abc
import os
import runpy
import sys
from typing import Any


class _Gate(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any, target: Any = None) -> None:
        if name == "tgi_asgi.runner.load":
            with open(os.environ["GATE"], "rb") as gate:
                gate.read()


if __name__ == "__main__":
    sys.meta_path.insert(0, _Gate())
    runpy.run_module("tgi_asgi", run_name="__main__")
