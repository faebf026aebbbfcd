"""Who may import whom: the arrows between the rooms, and what importing the app must not load."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "tgi_asgi"

# What each room may import; `settings`, `errors`, `types` and a room's own modules always.
_BELOW_ENGINE = {"runner", "models", "ops", "text", "formats"}
ALLOWED = {
    "http": {"engine", "observe", *_BELOW_ENGINE},
    "observe": {"engine"},
    "engine": _BELOW_ENGINE,
    "runner": {"models", "ops", "text", "formats"},
    "models": {"ops", "text", "formats"},
    "ops": {"_C"},
    "text": {"formats"},
    "formats": set(),
    "settings": set(),
    "errors": set(),
    "types": set(),
}
COMMON = {"settings", "errors", "types"}
TORCH_ROOMS = {"runner", "models", "ops"}
PURE = ("engine/scheduler.py", "engine/blocks.py", "engine/prefix.py", "engine/sequence.py")


def _imports(path: Path) -> Iterator[str]:
    """Yield the modules that a file imports, anywhere in it but under `if TYPE_CHECKING`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    room = _room(path)
    if room not in ALLOWED:
        return  # app, cli and what they alone use see everything
    for name in _imports(path):
        parts = name.split(".")
        if parts[0] != "tgi_asgi" or len(parts) == 1 or parts[1] == "__version__":
            continue
        assert parts[1] in ALLOWED[room] | COMMON | {room}, f"{room} must not import {name}"


@pytest.mark.parametrize("name", PURE)
def test_scheduler_and_blocks_know_neither_torch_nor_asyncio(name: str) -> None:
    roots = {module.split(".")[0] for module in _imports(PACKAGE / name)}
    assert not roots & {"torch", "asyncio", "threading"}


def test_torch_stays_in_the_rooms_below_the_engine() -> None:
    for path in FILES:
        if _room(path) not in TORCH_ROOMS or path.name == "plan.py":
            assert "torch" not in {module.split(".")[0] for module in _imports(path)}, path


@pytest.mark.parametrize(
    "module", ["tgi_asgi.app", "tgi_asgi.serve.server", "tgi_asgi.cli", "tgi_asgi.runner.plan"]
)
def test_importing_the_server_loads_no_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit(len({{'torch', 'transformers'}} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert found.returncode == 0, found.stderr
