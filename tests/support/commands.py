"""Run `tgi-asgi` with a subcommand, as from a user's shell."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.support.server_process import KEPT_VARIABLES, ROOT


def run_command(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run the command to its end with the variables in `KEPT_VARIABLES` and those in `environ`."""
    kept = {name: text for name, text in os.environ.items() if name in KEPT_VARIABLES}
    return subprocess.run(
        [sys.executable, "-m", "tgi_asgi", *arguments],
        cwd=ROOT, env={**kept, **environ}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
