"""The import rules between packages, and the modules that importing the app must not load."""

from __future__ import annotations

import ast
import functools
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "tgi_asgi"

# The packages that each package may import, in addition to `COMMON` and its own modules.
_BELOW_ENGINE = {"runner", "models", "ops", "text", "formats"}
ALLOWED_IMPORTS = {
    "api": {"images", "observe", "text"},
    "serve": {"app", "assembly", "api", "observe"},
    "commands": {"serve", "observe", "formats"},
    "observe": {"engine"},  # the engine's counters
    "engine": _BELOW_ENGINE,
    "runner": {"models", "ops", "text", "formats"},
    "models": {"ops", "text", "formats"},
    "ops": {"_C", "_cuda"},
    "text": {"formats"},
    "images": set(),
    "formats": {"_C"},  # for its table of weight formats, and to unpack codes
    "settings": set(),
    "errors": set(),
    "system": set(),
    "types": set(),
    "model_info": set(),
}
COMMON = {"settings", "errors", "system", "types", "model_info"}
# Packages of `api` that implement one dialect each; code shared by dialects is outside them.
DIALECTS = {"openai", "anthropic", "tgi", "tei", "ollama"}
# TGI's cloud routes and tokenizer route accept OpenAI chats; Ollama's tools use OpenAI's format.
ALLOWED_DIALECTS = {
    "tgi": {"openai"},
    "tei": {"openai"},  # the two APIs share the path /rerank
    "ollama": {"openai"},
}
MAX_CHAT_MODULES = 33
RAY_FILES = {"cluster/serving.py", "cluster/routing.py"}
# Files that compute in torch.
TORCH_FILES = (
    "ops/cuda*.py", "ops/direct.py", "ops/paged.py", "ops/state_rows.py", "ops/tensors.py",
    "models/generic/**/*.py",
    "runner/cuda*.py",
)  # fmt: skip
PURE = (
    "engine/scheduler.py",
    "engine/running_set.py",
    "engine/preemption.py",
    "engine/blocks.py",
    "engine/prefix.py",
    "engine/sequence.py",
)


@functools.cache
def _import_nodes(path: Path) -> tuple[list[ast.Import | ast.ImportFrom], set[int]]:
    """Return a file's imports, and the ids of those under `if TYPE_CHECKING`."""
    found: list[ast.Import | ast.ImportFrom] = []
    for_types: set[int] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found.append(node)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for_types.update(id(inner) for inner in ast.walk(node))
    return found, for_types


@functools.cache
def _imports(path: Path) -> list[str]:
    """Return the modules that a file imports anywhere except under `if TYPE_CHECKING`."""
    nodes, for_types = _import_nodes(path)
    found: list[str] = []
    for node in nodes:
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            found += (alias.name for alias in node.names)
        else:
            assert node.level == 0, f"{path}: a relative import"
            assert node.module is not None
            found.append(node.module)
            found += (f"{node.module}.{alias.name}" for alias in node.names)
    return found


def _package_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("package", ALLOWED_IMPORTS)
def test_imports_point_one_way(package: str) -> None:
    """Packages that are not listed, app, cli and what only they use, may import everything."""
    files = [path for path in FILES if _package_of(path) == package]
    assert files
    for path in files:
        for name in _imports(path):
            parts = name.split(".")
            if parts[0] != "tgi_asgi" or len(parts) == 1 or parts[1] == "__version__":
                continue
            assert parts[1] in ALLOWED_IMPORTS[package] | COMMON | {package}, f"{path} must not import {name}"


@pytest.mark.parametrize("dialect", sorted(DIALECTS))
def test_a_dialect_knows_no_other(dialect: str) -> None:
    files = sorted((PACKAGE / "api" / dialect).glob("*.py"))
    assert files
    for path in files:
        for name in _imports(path):
            if name.startswith("tgi_asgi.api."):
                found = name.split(".")[2]
                others = DIALECTS - {dialect} - ALLOWED_DIALECTS.get(dialect, set())
                assert found not in others, f"{path} must not import {name}"


def test_what_serves_all_dialects_knows_none() -> None:
    for path in (PACKAGE / "api").glob("*.py"):
        known = {name.split(".")[2] for name in _imports(path) if name.startswith("tgi_asgi.api.")}
        assert path.name in ("table.py", "docs.py") or not known & DIALECTS, path


def test_no_files_import_each_other_in_a_circle() -> None:
    """Imports for types count, too: who reads a file need not know those above it."""
    root = PACKAGE.parent
    paths = [path for folder in (PACKAGE, root / "bench") for path in folder.rglob("*.py")]
    modules = {".".join(path.relative_to(root).with_suffix("").parts): path for path in paths}
    graph: dict[str, set[str]] = {}
    for name, path in modules.items():
        if path.name == "__init__.py":
            continue  # a package's file hands on the names of those in it, which its own files may use
        found = graph[name] = set[str]()
        for node in _import_nodes(path)[0]:
            if isinstance(node, ast.Import):
                found.update(alias.name for alias in node.names)
            else:
                found.add(str(node.module))
                found.update(f"{node.module}.{alias.name}" for alias in node.names)
    graph = {name: found & graph.keys() for name, found in graph.items()}
    assert graph["tgi_asgi.app"] and graph["tgi_asgi.engine.scheduler"]
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the files


def test_a_chat_stands_on_few_modules() -> None:
    """Count the API modules that the chat route imports, directly or indirectly, packages included."""
    found: set[Path] = set()
    waiting = ["tgi_asgi.api.openai.chat", "tgi_asgi.api.life"]
    while waiting:
        parts = waiting.pop().split(".")[1:]
        for size in range(1, len(parts) + 1):
            path = PACKAGE.joinpath(*parts[:size])
            path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
            if path.exists() and path not in found and path.is_relative_to(PACKAGE / "api"):
                found.add(path)
                waiting += _imports(path)
    assert len(found) <= MAX_CHAT_MODULES, sorted(map(str, found))


@pytest.mark.parametrize("name", PURE)
def test_scheduler_and_blocks_know_neither_torch_nor_asyncio(name: str) -> None:
    roots = {module.split(".")[0] for module in _imports(PACKAGE / name)}
    assert not roots & {"torch", "asyncio", "threading"}


def test_torch_stays_in_what_computes_in_it() -> None:
    allowed = {path for pattern in TORCH_FILES for path in PACKAGE.glob(pattern)}
    for path in set(FILES) - allowed:
        assert "torch" not in {module.split(".")[0] for module in _imports(path)}, path


def test_ray_stays_in_two_files_that_the_server_does_not_know() -> None:
    for path in FILES:
        imported = set(_imports(path))
        if str(path.relative_to(PACKAGE)) not in RAY_FILES:
            assert "ray" not in {module.split(".")[0] for module in imported}, path
        if _package_of(path) != "cluster":
            assert not any(name.startswith("tgi_asgi.cluster") for name in imported), path


def test_importing_the_server_loads_neither_torch_nor_pillow() -> None:
    code = "import tgi_asgi.app, tgi_asgi.serve.server, tgi_asgi.cli, tgi_asgi.runner.load"
    assert not _loaded_by(code, {"torch", "transformers", "PIL"})


def test_native_families_load_no_torch() -> None:
    code = "from tgi_asgi.models.registry import all_families; all_families()"
    assert not _loaded_by(code, {"torch", "transformers"})


def test_a_gpu_and_transformers_code_load_no_compiler() -> None:
    """They double the start-up time; `torch.nn.attention.bias` alone imports torch's compiler."""
    slow = {"torch._dynamo", "torch._inductor", "torch.distributed.tensor", "sympy", "transformers"}
    code = "import tgi_asgi.models.generic.model, tgi_asgi.runner.cuda_load, tgi_asgi.runner.encoder"
    assert not _loaded_by(code, slow)


def _loaded_by(code: str, names: set[str]) -> str:
    """Run code in a new process; return those of the modules that it has loaded."""
    report = f"import sys; {code}; print(*({names} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", report], capture_output=True, text=True, timeout=60)
    assert found.returncode == 0, found.stderr
    return found.stdout.strip()
