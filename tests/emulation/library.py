"""Builds the emulated kernels into a shared library; what is built is kept, by a hash of its inputs."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

_HERE = Path(__file__).parent
_CSRC = _HERE.parents[1] / "csrc"
CACHE = _HERE.parents[1] / "build" / "emulation"
_MAX_KEPT_BYTES = 6 << 30  # twice what a run of all tests needs
_COMMON = [
    "-std=c++17", "-g1", "-fPIC", "-fvisibility=hidden", "-mf16c", "-Wall", "-Wno-unknown-pragmas", "-Werror",
]  # fmt: skip
_RUNTIME_FLAGS = [*_COMMON, "-O3"]
# memory.cpp defines the hooks that -fsanitize=thread calls before each access; libtsan is not linked.
_KERNEL_FLAGS = [
    *_COMMON, "-O1", "-x", "c++", "-fno-strict-aliasing", "-ffp-contract=off", "-fsanitize=thread",
    "--param", "tsan-instrument-func-entry-exit=0",
    "-fsanitize=bounds,shift,alignment,signed-integer-overflow",
]  # fmt: skip


def require() -> None:
    """Skip the test if the emulation is unavailable."""
    if platform.machine() != "x86_64":
        pytest.skip(f"the emulator switches stacks on x86-64, not on {platform.machine()}")
    if shutil.which("g++") is None:
        pytest.skip("no emulation of CUDA without g++")


def build(variant: Variant | None = None) -> Path:
    """Build the library, with one file's kernels as changed by the variant, and return its path.

    Raises:
        AssertionError: if a variant's old text does not occur exactly once.
        CalledProcessError: if the code does not compile; the compiler's messages are on stderr.
    """
    objects = _objects()
    if variant is not None:
        changed = _compile(variant.apply(_read_sources()), variant.kernel, _KERNEL_FLAGS)
        objects = {**objects, variant.kernel: changed}
    library = CACHE / f"emulated-{digest(*(path.name for path in objects.values()))}.so"
    if not is_kept(library):
        run(["g++", "-shared", "-Wl,-Bsymbolic", *map(str, objects.values())], library)
    return library


@functools.cache
def _objects() -> dict[str, Path]:
    """Return the unchanged sources' objects by the sources' names; hundreds of variants share them."""
    files = _read_sources()
    runtime = {
        path.name: path.read_text() for path in sorted(_HERE.iterdir()) if path.suffix in (".cpp", ".h")
    }
    jobs = {name: (files, _KERNEL_FLAGS) for name in files if name.endswith(".cu")}
    jobs |= {name: (files | runtime, _RUNTIME_FLAGS) for name in runtime if name.endswith(".cpp")}
    with ThreadPoolExecutor(2) as executor:
        objects = executor.map(lambda name: _compile(jobs[name][0], name, jobs[name][1]), jobs)
        return dict(zip(jobs, objects, strict=True))


@dataclass(frozen=True, slots=True)
class Variant:
    """A text replacement in `file` of csrc/cuda that applies only to the kernels of `kernel`.

    Of those of routed experts, only the ones for `element` are compiled.
    """

    file: str
    old: str
    new: str
    kernel: str
    element: str = "bf16"

    def apply(self, files: Mapping[str, str]) -> dict[str, str]:
        count = files[self.file].count(self.old)
        assert count == 1, f"{self.file} has {count} times: {self.old}"
        changed = dict(files)
        changed[self.file] = files[self.file].replace(self.old, self.new)
        # One head size is enough to show a fault, and compiles in a fifth of the time.
        changed["attention_tile.cuh"] = re.sub(
            r".*case (80|96|128|256):.*", "", changed["attention_tile.cuh"]
        )
        # One type of elements, too.
        types = "p.type == Type::kBfloat16 ? with_element(bf16()) : with_element(fp16())"
        changed["experts.cuh"] = changed["experts.cuh"].replace(types, f"with_element({self.element}())")
        # One tile of tokens.
        quant = re.sub(r".*(launch_kernel<.*, (?:16|32), Run>).*", "", changed["quant_linear.cuh"])
        changed["quant_linear.cuh"] = quant.replace("if (p.num_tokens <= 8) return", "return")
        return changed


@functools.cache
def _read_sources() -> dict[str, str]:
    """Return the files that a kernel's source can include, keyed by the name used to include them."""
    files = {path.name: path.read_text() for path in sorted((_CSRC / "cuda").iterdir())}
    return files | {
        "params.h": (_CSRC / "params.h").read_text(),
        "cuda_emu.h": (_HERE / "cuda_emu.h").read_text(),
    }


def _closure(files: Mapping[str, str], name: str) -> dict[str, str]:
    """Return the file and everything that it includes, directly or indirectly."""
    found, waiting = {}, [name]
    while waiting:
        current = waiting.pop()
        if current not in found and current in files:
            found[current] = files[current]
            waiting += re.findall(r'^#include "([^"]+)"', files[current], re.MULTILINE)
    return dict(sorted(found.items()))


def _compile(files: Mapping[str, str], name: str, flags: list[str]) -> Path:
    closure = _closure(files, name)
    key = f"{Path(name).stem}-{digest(closure, flags, _compiler())}"
    target, folder = CACHE / f"{key}.o", CACHE / f"{key}.src"
    if is_kept(target):
        return target
    with locked(folder):
        if not target.exists():
            for part, text in closure.items():
                (folder / part).write_text(text)
            run(["g++", *flags, f"-I{folder}", "-c", str(folder / name)], target)
    return target


def is_kept(target: Path) -> bool:
    """Return whether a file has been built before, and note that it is needed."""
    try:
        os.utime(target)
    except FileNotFoundError:
        return False
    return True


def discard_old(folder: Path = CACHE, max_bytes: int = _MAX_KEPT_BYTES) -> None:
    """Remove what was needed longest ago: a change of a header that kernels share builds all anew."""
    kept = [path for path in folder.glob("*.*") if path.is_file()]
    for path in sorted(kept, key=lambda path: path.stat().st_mtime, reverse=True):
        max_bytes -= path.stat().st_size
        if max_bytes < 0:
            path.unlink()
            shutil.rmtree(path.with_suffix(".src"), ignore_errors=True)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Let only one of several processes compile in a folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def run(command: list[str], target: Path) -> None:
    """Run a compiler; its output appears under the final name only when complete."""
    partial = partial_of(target)
    subprocess.run([*command, "-o", str(partial)], check=True)
    partial.replace(target)


def partial_of(target: Path) -> Path:
    """Return this thread's own name for a file that is not complete yet."""
    return target.with_suffix(f".{os.getpid()}-{threading.get_ident()}.tmp")


@functools.cache
def _compiler() -> str:
    return subprocess.check_output(["g++", "-dumpfullversion"], text=True)


def digest(*parts: object) -> str:
    """Return a name derived from the contents of the parts."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
