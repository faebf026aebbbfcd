"""Run `tgi-asgi` with a subcommand, as from a user's shell."""

from __future__ import annotations

import os
import subprocess
import tempfile

from tests.support.forked import KEPT_VARIABLES, start_forked

_LONGEST_S = 300


def run_command(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run the command to its end with the variables in `KEPT_VARIABLES` and those in `environ`."""
    kept = {name: text for name, text in os.environ.items() if name in KEPT_VARIABLES}
    command = ["tgi_asgi", *arguments]
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        process = start_forked(command, {**kept, **environ}, stdout=stdout, stderr=stderr)
        try:
            code = process.wait(_LONGEST_S)
        finally:
            process.kill()
        stdout.seek(0)
        stderr.seek(0)
        return subprocess.CompletedProcess(command, code, stdout.read(), stderr.read())
