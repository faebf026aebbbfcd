"""Run `tgi-asgi` with a subcommand, as from a user's shell."""

from __future__ import annotations

import subprocess

from tests.support.forked import run_forked


def run_command(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run the command to its end with the variables in `KEPT_VARIABLES` and those in `environ`."""
    return run_forked(["tgi_asgi", *arguments], environ)
