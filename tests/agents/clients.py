"""The agents' command lines as npm installs them, each with its own home and no access to other servers."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.server.conftest import require_program

_PACKAGE = Path(__file__).parent / "package.json"  # pins the versions
_FOLDER = Path(__file__).parent.parent.parent / "build" / "agents"
_BIN = _FOLDER / "node_modules" / ".bin"
_NOWHERE = "http://127.0.0.1:9"  # proxy for all other hosts: a port without a listener
_INSTALL_TIMEOUT_S = 900
_RUN_TIMEOUT_S = 180


@dataclass(frozen=True)
class Run:
    """A client's run: its exit code, its last message, and its whole output."""

    exit_code: int
    answer: str
    output: str


def install() -> None:
    """Install the clients in `build/agents`, unless package.json's versions are installed already."""
    npm = require_program("npm")
    _FOLDER.mkdir(parents=True, exist_ok=True)
    with (_FOLDER / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        stamp = _FOLDER / ".installed"
        if stamp.is_file() and stamp.read_bytes() == _PACKAGE.read_bytes():
            return
        stamp.unlink(missing_ok=True)
        shutil.copy(_PACKAGE, _FOLDER)
        command = [npm, "install", "--prefix", str(_FOLDER), "--no-audit", "--no-fund", "--no-package-lock"]
        subprocess.run(command, check=True, timeout=_INSTALL_TIMEOUT_S)
        shutil.copy(_PACKAGE, stamp)


def codex(
    url: str, home: Path, project: Path, prompt: str, *options: str,
    provider_name: str = "local", takes_it_for_ollama: bool = False,
) -> Run:  # fmt: skip
    """Run Codex CLI in a project until it has answered; it takes a provider called OpenAI for OpenAI's."""
    last = home / "last.txt"
    provider = f'{{name="{provider_name}", base_url="{url}/v1", env_key="LOCAL_KEY", wire_api="responses"}}'
    settings = ['model_provider="local"', f"model_providers.local={provider}"]
    command = [_BIN / "codex", "exec", "--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox"]
    command += ["-m", "toy/model", "-C", project, "-o", last]
    if takes_it_for_ollama:
        settings = []
        command += ["--oss", "--local-provider", "ollama"]
    for setting in [*settings, "check_for_update_on_startup=false", "analytics.enabled=false"]:
        command += ["-c", setting]
    environ = _codex_home(home) | {"LOCAL_KEY": "key", "CODEX_OSS_BASE_URL": f"{url}/v1"}
    run = _run([*command, *options, "--", prompt], project, environ)
    answer = last.read_text() if last.exists() else ""
    return Run(run.returncode, answer, run.stdout)


def codex_catalog(home: Path) -> Path:
    """Write a model catalog that lets "toy/model" patch files with a custom tool, as OpenAI's models do."""
    run = _run([_BIN / "codex", "debug", "models", "--bundled"], home, _codex_home(home))
    known = json.loads(run.stdout)["models"]
    model = next(model for model in known if not model["use_responses_lite"])
    assert model["apply_patch_tool_type"] == "freeform"
    path = home / "catalog.json"
    path.write_text(json.dumps({"models": [{**model, "slug": "toy/model", "context_window": 65_536}]}))
    return path


def claude(
    url: str, home: Path, project: Path, prompt: str, *options: str, context: int | None = None
) -> Run:
    """Run Claude Code in a project until it has answered; it may be told the model's context, in tokens."""
    command = [_BIN / "claude", "-p", "--model", "toy/model", "--dangerously-skip-permissions"]
    environ = {
        "HOME": str(home),
        "CLAUDE_CONFIG_DIR": str(home / "claude"),
        "ANTHROPIC_BASE_URL": url,
        "ANTHROPIC_API_KEY": "key",
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "DISABLE_AUTOUPDATER": "1",
        "IS_SANDBOX": "1",  # otherwise it refuses to skip permissions as root
    }
    if context is not None:
        environ["CLAUDE_CODE_MAX_CONTEXT_TOKENS"] = str(context)
    run = _run([*command, "--output-format", "json", *options, "--", prompt], project, environ)
    answer = json.loads(run.stdout).get("result", "") if run.stdout.startswith("{") else ""
    return Run(run.returncode, answer, run.stdout)


def _codex_home(home: Path) -> dict[str, str]:
    (home / "codex").mkdir(exist_ok=True)
    return {"HOME": str(home), "CODEX_HOME": str(home / "codex")}


def _run(command: list[Any], folder: Path, environ: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a command without a terminal and without this process's environment."""
    base = {"PATH": os.environ["PATH"], "TERM": "dumb", "NO_PROXY": "127.0.0.1"}
    base |= {"HTTP_PROXY": _NOWHERE, "HTTPS_PROXY": _NOWHERE}
    return subprocess.run(
        command,
        cwd=folder,
        env=base | environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=None,  # pytest shows it if a test fails
        text=True,
        timeout=_RUN_TIMEOUT_S,
        check=False,
    )
