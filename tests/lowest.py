"""Tests with the oldest versions of all declared dependencies except torch: `make test-lowest`.

    python -m tests.lowest [pytest's arguments]

build/lowest holds an environment and a copy of the tree, so that the tree's own extension is not rebuilt. If
a bound fails, it is wrong: raise it. Tests of models are left out because they need one particular
`transformers`.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib

from tests.support.installing import ROOT, copy_tracked, settings_for_uv

FOLDER = ROOT / "build" / "lowest"
TREE, PYTHON = FOLDER / "tree", FOLDER / "env" / "bin" / "python"
# Only tests of models need them, or they require newer versions than these.
NOT_INSTALLED = {"transformers", "compressed-tensors", "peft"}
# These need peft's patterns, adapters that peft writes, or conversations rendered by the newest
# `transformers`.
LEFT_OUT = [
    "formats/test_peft.py",
    "text/test_chat_references.py",
    "text/test_chat.py::test_renders_what_transformers_renders",
    "server/test_guides.py::test_a_command_of_the_documents_runs[docs/adapters.md",
    "server/test_shards.py::test_adapters_named_at_start_and_loaded_later_answer_as_with_peft",
]
TESTS = [
    "api",
    "engine",
    "formats",
    "images",
    "ops",
    "serve",
    "server",
    "text",
    "test_cli.py",
    "test_imports.py",
]


def name_of(requirement: str) -> str:
    """Return the package's name as package indexes spell it."""
    return re.split(r"[<>=;\[\s]", requirement)[0].lower().replace("_", "-")


def make_environment() -> None:
    """Install the oldest versions, build with the oldest tools, and add the newest test dependencies."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    shutil.rmtree(FOLDER, ignore_errors=True)
    copy_tracked(TREE)
    _run(sys.executable, "-m", "uv", "venv", "--python", sys.executable, FOLDER / "env")
    torch = f"torch=={importlib.metadata.version('torch')}"
    tools = project["build-system"]["requires"]
    _install("--resolution", "lowest-direct", torch, *tools, "-r", "requirements.txt")
    versions = _run(sys.executable, "-m", "uv", "pip", "freeze", "--python", PYTHON)
    (FOLDER / "versions.txt").write_text(versions, encoding="utf-8")
    _check(versions)
    _install("--no-build-isolation", "--no-deps", "--editable", ".")
    wanted = project["project"]["optional-dependencies"]["test"]
    _install("-c", FOLDER / "versions.txt", *(need for need in wanted if name_of(need) not in NOT_INSTALLED))


def _check(versions: str) -> None:
    """Raise `SystemExit` if another package requires a newer version than the project's bound."""
    installed = dict(line.lower().split("==") for line in versions.splitlines() if "==" in line)
    lines = [line.partition("#")[0] for line in (TREE / "requirements.txt").read_text().splitlines()]
    wrong = []
    for line in lines:
        found = re.match(r"([\w.-]+)>=([\w.]+)", line)
        if found is None or found[1] == "torch":
            continue
        oldest = installed[name_of(line)]
        if not re.fullmatch(rf"{re.escape(found[2])}(\.0)*", oldest):
            wrong.append(f"{found[0]} is allowed, but the other packages go with {oldest} at the oldest")
    if wrong:
        raise SystemExit("\n".join(wrong))


def _install(*arguments: object) -> None:
    _run(sys.executable, "-m", "uv", "pip", "install", "--quiet", "--python", PYTHON, *arguments)


def _run(*command: object) -> str:
    unwanted = ("PYTHONPATH", "VIRTUAL_ENV")
    environ = {key: value for key, value in os.environ.items() if key not in unwanted or command[0] != PYTHON}
    environ |= settings_for_uv()
    done = subprocess.run(
        [str(word) for word in command], cwd=TREE, env=environ, stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        raise SystemExit(f"{done.stdout}\n{' '.join(map(str, command))} failed")
    return done.stdout


def main() -> int:
    """Create the environment, run the tests in it, and return their exit status."""
    make_environment()
    tests = [f"tests/{name}" for name in TESTS] + [f"--deselect=tests/{name}" for name in LEFT_OUT]
    # CI's rule that nothing may be missing does not apply: `make test` tests the clients that have
    # environments of their own.
    environ = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "CI")}
    environ["PATH"] = f"{PYTHON.parent}{os.pathsep}{environ['PATH']}"  # guides call tgi-asgi
    command = [str(PYTHON), "-m", "pytest", "-q", "-m", "thorough or not thorough", *tests, *sys.argv[1:]]
    return subprocess.run(command, cwd=TREE, env=environ, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
