"""The module tgi_asgi._cuda without CUDA: the extension's own bindings, on CPU tensors and emulated kernels.

Its operators, `torch.ops.tgi_cuda`, therefore refuse what they would refuse on a GPU, and fill in the
kernels' parameters as they would there.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import sys
import sysconfig
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from tests.emulation import library
from tests.emulation.device import Device

_HERE = Path(__file__).parent
_CSRC = _HERE.parents[1] / "csrc"
_SCHEMAS = "library.cpp"  # it also defines the module
# The others are compiled in two files, because torch's headers take 5 of the 6 s that each would take.
_ALONE = ("program.cpp", "launchers.cpp")
_NAME = "tgi_asgi._cuda"
# What names the device in the sources, and its replacement.
_ON_CPU = {
    "TORCH_LIBRARY_IMPL(tgi_cuda, CUDA, m)": "TORCH_LIBRARY_IMPL(tgi_cuda, CPU, m)",
    "tensor.device().is_cuda()": "tensor.device().is_cpu()",
}
# torch 2.15's headers need C++20, and GCC 12 mistakes their reference counts for buffers.
_FLAGS = [
    "-std=c++20", "-DTGI_CUDA", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-Wall",
    "-Wno-stringop-overflow",
]  # fmt: skip


@functools.cache
def install() -> Path:
    """Install the module so that `import` finds it, once per process; if it was built, only the operators.

    Returns the library's path.

    Raises:
        CalledProcessError: if the code does not compile; the compiler's messages are on stderr.
    """
    kernels = library.build()
    Device(kernels).allow_host()
    is_built = hasattr(torch.ops.tgi_cuda, "attention_plan")
    path = build(is_whole=not is_built)
    ctypes.CDLL(str(path)).emu_open(str(kernels).encode())
    if is_built:
        return path
    spec = importlib.util.spec_from_file_location(_NAME, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[_NAME] = module
    return path


@contextlib.contextmanager
def observed(call: Callable[[str], None]) -> Iterator[None]:
    """Call a function with the name of each kernel that the operators launch, in the launching thread."""
    loaded = ctypes.CDLL(str(install()))
    callback = ctypes.CFUNCTYPE(None, ctypes.c_char_p)(lambda name: call(name.decode()))
    loaded.emu_observe(callback)
    try:
        yield
    finally:
        loaded.emu_observe(None)


def build(*, is_whole: bool = True) -> Path:
    """Build the library, without the schemas and the module if it is not whole, and return its path."""
    from torch.utils.cpp_extension import include_paths, library_paths

    files = {path.name: path.read_text() for path in sorted((_CSRC / "bindings" / "cuda").iterdir())}
    for old, new in _ON_CPU.items():
        assert any(old in text for text in files.values()), f"nothing says: {old}"
        files = {name: text.replace(old, new) for name, text in files.items()}
    files["launchers.cpp"] = (_HERE / "host" / "launchers.cpp").read_text()
    switches, params = _CSRC / "cuda" / "dependent_launch.h", _CSRC / "params.h"
    headers = [_CSRC / "cuda" / "kernels.h", switches, params, _CSRC / "bindings" / "activation.h"]
    headers += sorted((_HERE / "host").rglob("*.h"))
    included = [path.read_text() for path in headers]
    key = library.digest(files, included, _FLAGS, torch.__version__, sys.version)
    folder = library.CACHE / f"bindings-{key}"
    sources = [name for name in files if name.endswith(".cpp") and (is_whole or name != _SCHEMAS)]
    target = folder / ("whole.so" if is_whole else "operators.so")
    with library.locked(folder):
        if target.exists():
            return target
        copies = folder / "bindings" / "cuda"
        copies.mkdir(parents=True, exist_ok=True)
        together = [name for name in sources if name not in _ALONE]
        units = {f"together_{index}.cpp": together[index::2] for index in range(2)}
        files |= {unit: "".join(f'#include "{name}"\n' for name in names) for unit, names in units.items()}
        for name, text in files.items():
            (copies / name).write_text(text)
        system = [*include_paths(), sysconfig.get_paths()["include"]]
        includes = [f"-I{each}" for each in (folder, _HERE / "host", _CSRC)]
        includes += [f"-isystem{each}" for each in system]
        command = ["g++", *_FLAGS, *includes, "-c"]

        def compiled(name: str) -> str:
            made = folder / f"{name}.o"
            library.run([*command, str(copies / name)], made)
            return str(made)

        with ThreadPoolExecutor(2) as executor:
            objects = list(executor.map(compiled, [*units, *(name for name in sources if name in _ALONE)]))
        libraries = [f"-L{each}" for each in library_paths()]
        libraries += ["-lc10", "-ltorch_cpu", "-ltorch", "-ltorch_python", "-ldl"]
        library.run(["g++", "-shared", *objects, *libraries], target)
    return target
