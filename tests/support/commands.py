"""`tgi-asgi` with a subcommand, as a user's shell runs it."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.support.server_process import KEPT, ROOT


def run_command(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run it to its end, with a few of this process' variables and those given."""
    kept = {name: text for name, text in os.environ.items() if name in KEPT}
    return subprocess.run(
        [sys.executable, "-m", "tgi_asgi", *arguments],
        cwd=ROOT, env={**kept, **environ}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
