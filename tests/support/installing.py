"""The ways in which users install the server, as shell commands, with a request to the installed server.

A way is a shell script that runs in an empty folder of a `Machine`: `ThisMachine` or a fresh Debian
(tests/container_image). $SOURCE is a folder with the files that git tracks, and $REPOSITORY a git repository
of the same files.
"""

from __future__ import annotations

import fcntl
import fnmatch
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import httpx

from tests.support.server_process import free_port

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "build" / "install.json"
START_TIMEOUT_S = 3600  # includes fetching the demonstration model; `make serve` also installs and compiles
_ENVIRONMENT = "python3 -m venv env && . env/bin/activate"
_COPY = "cp -r $SOURCE source"  # pip and `build` write to the folder that they are given
_TOOLS = "python3 -m venv tools && . tools/bin/activate && pip install --quiet"


@dataclass(frozen=True)
class Way:
    """An install script, a serve command and the folder of the environment."""

    install: str
    serve: str = "env/bin/tgi-asgi --port $PORT"
    environment: str = "env"


# The documents' commands verbatim (tests/test_install.py checks this).
WAYS = {
    "pip": Way(f"{_COPY} && {_ENVIRONMENT} && cd source && TGI_KERNEL_SETS=native pip install ."),
    "git": Way(f"{_ENVIRONMENT} && pip install git+file://$REPOSITORY"),
    "uv": Way(
        f"{_COPY} && {_TOOLS} uv && uv venv env && export UV_CONSTRAINT=$PIP_CONSTRAINT"
        " VIRTUAL_ENV=$PWD/env && cd source && uv pip install ."
    ),
    "sdist": Way(
        f"{_COPY} && {_TOOLS} build && (cd source && python -m build --sdist)"
        f" && {_ENVIRONMENT} && pip install source/dist/*.tar.gz"
    ),
    "wheel": Way(
        f"{_COPY} && {_TOOLS} build && (cd source && python -m build)"
        f" && {_ENVIRONMENT} && pip install source/dist/*.whl"
    ),
    "make": Way(_COPY, 'make -C source serve ARGS="--port $PORT"', "source/.venv"),
}


class Machine(Protocol):
    """A machine where a way is tried."""

    @property
    def name(self) -> str:
        """Name of the machine in the results."""

    def run(self, script: str) -> str:
        """Run a shell script in the machine's folder and return its output, or fail with it."""

    def start(self, script: str, environ: dict[str, str]) -> AbstractContextManager[subprocess.Popen[bytes]]:
        """Start a script and end it when the context exits."""


class ThisMachine:
    """A folder on this machine, with the tests' Python but nothing from its environment."""

    name = "this machine"

    def __init__(self, folder: Path, environ: dict[str, str]) -> None:
        self.folder = folder
        unwanted = ("PYTHONPATH", "VIRTUAL_ENV", "TGI_CUDA")
        self._environ = {key: value for key, value in os.environ.items() if key not in unwanted} | environ
        commands = folder / "commands"  # python3 is the tests' interpreter, outside their environment
        commands.mkdir(parents=True)
        (commands / "python3").symlink_to(Path(sys.executable).resolve())
        self._environ["PATH"] = f"{commands}:{os.environ['PATH']}"

    def run(self, script: str) -> str:
        """Run a shell script in the folder and return its output, or fail with it."""
        done = subprocess.run(
            ["bash", "-ec", script], cwd=self.folder, env=self._environ, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    @contextmanager
    def start(self, script: str, environ: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
        """Start a script, and end it and everything that it started when the context exits."""
        process = subprocess.Popen(
            ["bash", "-ec", script], cwd=self.folder, env=self._environ | environ, start_new_session=True
        )
        try:
            yield process
        finally:
            end_group(process)


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End a process group leader and everything that it started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def copy_tracked(target: Path) -> None:
    """Copy the files of the working tree that git tracks, and new ones that it does not ignore."""
    for name in _tracked():
        _copy(name, target)


def copy_context(target: Path) -> None:
    """Copy the build context of an image: those files that .dockerignore does not exclude."""
    rules = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    for name in _tracked():
        path = Path(name)
        kept = True
        for rule in (line for line in rules if line and not line.startswith("#")):
            pattern = rule.removeprefix("!")
            inside = path.parts if pattern.startswith("**/") else map(str, (path, *path.parents))
            if any(fnmatch.fnmatch(part, pattern.removeprefix("**/")) for part in inside):
                kept = rule.startswith("!")
        if kept:
            _copy(name, target)


def _tracked() -> list[str]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout.splitlines()  # fmt: skip
    return [name for name in listed if (ROOT / name).is_file()]


def _copy(name: str, target: Path) -> None:
    (target / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(ROOT / name, target / name)


def make_repository(folder: Path) -> None:
    """Commit all of `folder` to a new repository in it."""
    identity = ["-c", "user.name=tests", "-c", "user.email=tests@localhost"]
    for command in (["init", "--quiet"], ["add", "--all"], ["commit", "--quiet", "--message", "all"]):
        subprocess.run(["git", *identity, *command], cwd=folder, check=True)


def pinned_torch() -> str:
    """Return the Makefile's torch version as its CPU build, with the local version suffix."""
    found = re.search(r"^TORCH \?= (\S+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert found is not None
    return f"{found[1]}+cpu"


def settings_for_uv() -> dict[str, str]:
    """Return variables that let uv find the same packages, as it ignores pip's configuration."""
    found = {}
    for name, variable in (("find-links", "UV_FIND_LINKS"), ("extra-index-url", "UV_EXTRA_INDEX_URL")):
        value = os.environ.get(f"PIP_{name.replace('-', '_').upper()}") or _configured(f"global.{name}")
        if value:
            found[variable] = value
    return found | {"UV_INDEX_STRATEGY": "unsafe-best-match"}


def _configured(name: str) -> str:
    command = [sys.executable, "-m", "pip", "config", "get", name]
    return " ".join(subprocess.run(command, capture_output=True, text=True).stdout.split())


def install_and_ask(machine: Machine, name: str) -> None:
    """Install in one way, ask the demonstration model a question, and record time and size."""
    way, port, start = WAYS[name], free_port(), time.monotonic()
    machine.run(way.install)
    installed = time.monotonic()
    with machine.start(way.serve, {"PORT": str(port)}) as process:
        _wait(process, f"http://127.0.0.1:{port}/health")
        healthy = time.monotonic()
        assert "Paris" in ask(f"http://127.0.0.1:{port}")
    size = machine.run(f"du -sm {way.environment}").split()[0]
    minutes, start_s = (installed - start) / 60, healthy - installed
    record(machine.name, name, install_minutes=minutes, start_s=start_s, environment_mb=int(size))


def ask(url: str) -> str:
    """Return the demonstration model's answer to a question that it can answer."""
    body = {
        "model": "tgi", "temperature": 0, "max_tokens": 24,
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
    }  # fmt: skip
    response = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120)
    response.raise_for_status()
    content: str = response.json()["choices"][0]["message"]["content"]
    return content


def record(where: str, what: str, **figures: float) -> None:
    """Write figures under an environment and a name, keeping those of earlier tests."""
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
        results |= {"cpu": _cpu(), "cores": len(os.sched_getaffinity(0))}
        rounded = {key: round(value, 2) for key, value in figures.items()}
        results.setdefault(where, {})[what] = rounded
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def _cpu() -> str:
    found = re.search(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found[1] if found else platform.machine()


def _wait(process: subprocess.Popen[bytes], url: str) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        assert process.poll() is None, "the server has ended"
        try:
            if httpx.get(url).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise TimeoutError(f"{url} does not answer")
