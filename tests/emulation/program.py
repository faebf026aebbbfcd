"""The module tgi_asgi._cuda without CUDA and operators: what makes a step of operators of other kinds."""

from __future__ import annotations

import functools
import importlib.util
import re
import sys
import sysconfig
from pathlib import Path

import torch

from tests.emulation import library

_CSRC = Path(__file__).parents[2] / "csrc"
_HOST = Path(__file__).parent / "host"  # what stands for CUDA's headers
_NAME = "tgi_asgi._cuda"
MODULE = """#include "bindings/cuda/program.h"
#include "bindings/cuda/submit.h"
#include "cuda/dependent_launch.h"

void tgi::cuda::follow_library() {}

PYBIND11_MODULE(_cuda, module) {
  tgi::cuda::bind_program(module);
  tgi::cuda::bind_submit(module);
}
"""
# torch 2.15's headers need C++20, and GCC 12 mistakes their reference counts for buffers.
_FLAGS = [
    "-std=c++20", "-O2", "-g1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-stringop-overflow",
]  # fmt: skip


def schemas() -> list[str]:
    """Return the schemas of all operators, from the extension's own source."""
    text = re.sub(r'"\s*\n\s*"', "", (_CSRC / "bindings" / "cuda" / "library.cpp").read_text())
    return re.findall(r'm\.def\(\s*"([^"]+)"', text)


@functools.cache
def install(text: str = MODULE) -> None:
    """Install the module with this text so that `import` finds it, once per process.

    Raises:
        CalledProcessError: if the code does not compile; the compiler's messages are on stderr.
    """
    spec = importlib.util.spec_from_file_location(_NAME, build(text))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[_NAME] = module


def build(text: str) -> Path:
    """Build the library from the module's text and the program, and return its path."""
    from torch.utils.cpp_extension import include_paths, library_paths

    folder = _CSRC / "bindings" / "cuda"
    names = ("program.*", "submit.*", "without_gil.h")
    sources = {path: path.read_text() for name in names for path in sorted(folder.glob(name))}
    stubs = [path.read_text() for path in sorted(_HOST.rglob("*.h"))]
    key = library.digest(list(sources.values()), stubs, text, _FLAGS, torch.__version__, sys.version)
    target = library.CACHE / f"program-{key}" / "module.so"
    with library.locked(target.parent):
        if not target.exists():
            module = target.with_suffix(".cpp")
            module.write_text(text)
            folders = [*include_paths(), sysconfig.get_paths()["include"]]
            includes = [f"-I{_HOST}", f"-I{_CSRC}", *(f"-isystem{folder}" for folder in folders)]
            libraries = [f"-L{folder}" for folder in library_paths()]
            libraries += ["-lc10", "-ltorch_cpu", "-ltorch", "-ltorch_python"]
            files = [str(module), *(str(path) for path in sources if path.suffix == ".cpp")]
            library.run(["g++", *_FLAGS, "-shared", *includes, *files, *libraries], target)
    return target
