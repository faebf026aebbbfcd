"""Load a model in its own process and report the memory used: `measure` runs this file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

_ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class LoadResult:
    """Results of a measured load."""

    peak_bytes: int  # peak resident memory beyond that before the load
    max_total_tokens: int  # of a sequence


def measure(kind: str, path: Path, *, free_bytes: int) -> LoadResult:
    """Load `path` as the server does with this much free memory; a GGUF file without its tokenizer."""
    done = subprocess.run(
        [sys.executable, __file__, kind, str(path), str(free_bytes)],
        env={**os.environ, "PYTHONPATH": str(_ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return LoadResult(**json.loads(done.stdout.splitlines()[-1]))


def _resident(key: str) -> int:
    """Return VmRSS (resident memory) or VmHWM (its peak) in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) * 1024
    raise AssertionError(key)


def _main(kind: str, path: str, free_bytes: str) -> None:
    from tgi_asgi import ops
    from tgi_asgi.formats.sources import ModelFiles
    from tgi_asgi.models.loading.open import OpenModel
    from tgi_asgi.runner import load
    from tgi_asgi.settings import Settings

    files = ModelFiles("measured", None, "gguf" if kind == "gguf" else "directory", Path(path))
    setattr(load, "free_memory", lambda: int(free_bytes))  # noqa: B010
    before = _resident("VmRSS")
    if kind == "gguf":
        with OpenModel(files) as opened:
            model = opened.load(ops.Packing(is_exact=False), opened.config.context_length)
        longest = model.config.context_length
    else:
        settings = Settings(num_threads=1, thread_nice=0, max_batch_size=2, max_batch_prefill_tokens=64)
        loaded = load.load(settings, files)
        loaded.runner.close()
        longest = loaded.info.max_total_tokens
    taken = LoadResult(peak_bytes=_resident("VmHWM") - before, max_total_tokens=longest)
    print(json.dumps({"peak_bytes": taken.peak_bytes, "max_total_tokens": taken.max_total_tokens}))


if __name__ == "__main__":
    _main(*sys.argv[1:])
