"""Random changes to a GGUF file's metadata: of one to three of its architecture's keys."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tgi_asgi.formats.gguf import GgufFile

# Not too large: what a size allows may be allocated.
VALUES: tuple[Any, ...] = (
    None, 0, 1, 2, 3, 7, 1 << 16, (1 << 31) - 1, ("i32", -1), -1.0, 0.5, float("inf"), float("nan"), "text",
    True, [1, 2], [0, 1, 0, 1], [],
)  # fmt: skip


def random_changes(path: Path, seed: int, count: int) -> Iterator[dict[str, Any]]:
    """Yield new values of keys; None removes one."""
    random = np.random.default_rng(seed)
    with GgufFile.open(path) as file:
        prefix = f"{file.metadata['general.architecture']}."
        keys = sorted(key for key in file.metadata if key.startswith(prefix))
    for _ in range(count):
        chosen = random.choice(keys, random.integers(1, 4), replace=False)
        yield {str(key): VALUES[random.integers(len(VALUES))] for key in chosen}
