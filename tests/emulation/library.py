"""Builds the emulated kernels into a shared library; objects are cached by what went into them."""

from __future__ import annotations

import functools
import hashlib
import platform
import shutil
import subprocess
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_HERE = Path(__file__).parent
_CSRC = _HERE.parents[1] / "csrc"
_CACHE = _HERE.parents[1] / "build" / "emulation"
_COMMON = ["-std=c++17", "-g1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas", "-Werror"]
_RUNTIME_FLAGS = [*_COMMON, "-O2"]
# The hooks that -fsanitize=thread calls before each access are memory.cpp's; libtsan is not linked.
_KERNEL_FLAGS = [
    *_COMMON, "-O1", "-x", "c++", "-fno-strict-aliasing", "-ffp-contract=off", "-fsanitize=thread",
    "--param", "tsan-instrument-func-entry-exit=0",
    "-fsanitize=bounds,shift,alignment,signed-integer-overflow",
]  # fmt: skip


def missing_tool() -> str | None:
    """Say why there is no emulation on this machine; None: there is."""
    if shutil.which("g++") is None:
        return "there is no g++"
    if platform.machine() != "x86_64":
        return f"the emulator switches stacks on x86-64, not on {platform.machine()}"
    return None


def build(replaced: Mapping[str, tuple[str, str]] | None = None) -> Path:
    """Build the library, with a text replacement (old, new) in the csrc/cuda files named; return its path.

    Raises:
        AssertionError: an old text is not there exactly once.
        CalledProcessError: it does not compile; the compiler's words are on stderr.
    """
    replaced = dict(replaced or {})
    sources = {path.name: path.read_text() for path in sorted((_CSRC / "cuda").iterdir())}
    for name, (old, new) in replaced.items():
        assert sources[name].count(old) == 1, f"{name} has {sources[name].count(old)} times: {old}"
        sources[name] = sources[name].replace(old, new)
    headers = {name: text for name, text in sources.items() if not name.endswith(".cu")}
    folder = _CACHE / _digest("headers", *headers.items(), (_CSRC / "params.h").read_text(), _own_headers())
    _write_all(folder, headers)
    with ThreadPoolExecutor(2) as executor:
        kernels = [
            executor.submit(_compile, folder, name, text, _KERNEL_FLAGS)
            for name, text in sources.items()
            if name.endswith(".cu")
        ]
        runtime = [
            executor.submit(_compile, folder, path.name, path.read_text(), _RUNTIME_FLAGS)
            for path in sorted(_HERE.glob("*.cpp"))
        ]
        objects = [future.result() for future in (*kernels, *runtime)]
    library = folder / f"emulated-{_digest(*(path.name for path in objects))}.so"
    if not library.exists():
        _run(["g++", "-shared", "-Wl,-Bsymbolic", *map(str, objects)], library)
    return library


def _compile(folder: Path, name: str, text: str, flags: list[str]) -> Path:
    target = folder / f"{Path(name).stem}-{_digest(text, *flags)}.o"
    if not target.exists():
        source = folder / f"{target.stem}{Path(name).suffix}"
        _write(source, text)
        includes = [f"-I{folder}", f"-I{_HERE}", f"-I{_CSRC}"]
        _run(["g++", *flags, *includes, "-c", str(source)], target)
    return target


def _run(command: list[str], target: Path) -> None:
    """Run a compiler; its output appears under its name only when whole."""
    partial = target.with_suffix(f".{_unique()}.tmp")
    subprocess.run([*command, "-o", str(partial)], check=True)
    partial.replace(target)


def _write_all(folder: Path, texts: Mapping[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        if not (folder / name).exists():
            _write(folder / name, text)


def _write(path: Path, text: str) -> None:
    partial = path.with_suffix(f".{_unique()}.tmp")
    partial.write_text(text)
    partial.replace(path)


def _unique() -> str:
    import os
    import threading

    return f"{os.getpid()}-{threading.get_ident()}"


@functools.cache
def _own_headers() -> str:
    version = subprocess.check_output(["g++", "-dumpfullversion"], text=True)
    return version + "".join(path.read_text() for path in sorted(_HERE.glob("*.h")))


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
