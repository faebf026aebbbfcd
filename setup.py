"""Build the extensions from csrc/ with ninja; everything else is in pyproject.toml.

tgi_asgi._C, the CPU arithmetic, needs GCC's g++ and pybind11, and works with any torch. tgi_asgi._cuda,
the CUDA kernels, is built if torch has CUDA and an nvcc of its version is found; it is tied to that torch.

Environment: MAX_JOBS limits parallel compilers. TGI_KERNEL_SETS=native leaves out the kernels for other
processors than this machine's, two thirds of the time. TGI_CUDA=1 requires the CUDA kernels, TGI_CUDA=0
omits them, and TORCH_CUDA_ARCH_LIST selects their targets. TGI_SANITIZE=1 builds with the address and
undefined behaviour sanitizers (`make sanitize`).
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from glob import glob
from pathlib import Path
from typing import Any

import ninja
import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# fma only where the code writes it: rows must have the same bits in every tile shape.
CXX_FLAGS = [
    "-O3", "-std=c++20", "-g0", "-fPIC", "-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-pthread",
]  # fmt: skip
# For sources whose speed does not matter: -O1 takes the compiler a third less time than -O3, and for the
# software model of AMX's tiles, which only tests run, less than half. The bits are the same.
LIGHT_FLAG = "-O1"
AMX_MODEL = "csrc/cpu/step/step_amx_model.cpp"
LIGHT_PREFIX = "light-bindings-"
SANITIZE_FLAGS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
NVCC_FLAGS = ["-O3", "-std=c++17", "-lineinfo", "--fmad=true"]
# Bindings with loops over weights, or over a step's rows and blocks. The others call what does the work.
LOOPING_BINDINGS = {
    f"csrc/bindings/{name}.cpp"
    for name in (
        "device_rows", "formats", "integer_codes", "matrix", "paged_attention", "program", "rows",
        "state_pool",
    )
}  # fmt: skip
LIGHT_GROUPS = 3
SET_PREFIX = "csrc/cpu/step/step_"  # of the sources with one kernel set each
# Sets whose results have the same bits: a process uses the one that it measures as the fastest.
ALIKE = ("avx2", "avx_vnni", "avx512_vnni")
# A program that prints the sets that the machine can run, best last.
SUPPORTED_SETS = [
    "csrc/tools/supported_sets.cpp",
    *(f"csrc/cpu/step/{name}.cpp" for name in ("supported_sets", "amx_grant", "amx_state")),
]
DEFAULT_ARCHITECTURES = "8.0;9.0a;9.0+PTX"
CUDA_FOLDER = "/usr/local/cuda"


class Build(build_ext):
    """Compiles tgi_asgi._C with ninja, into objects kept in the tree, and tgi_asgi._cuda with torch."""

    def build_extension(self, ext: Extension) -> None:
        if ext.name != "tgi_asgi._C":
            return self._build_with_torch(ext)
        _require_compiler()
        folder = Path("build", f"{sys.implementation.cache_tag}-{sysconfig.get_platform()}").absolute()
        folder.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).absolute()
        target.parent.mkdir(parents=True, exist_ok=True)
        left_out = _sets_left_out(folder)
        sources = [source for source in _translation_units(ext.sources, folder) if source not in left_out]
        (folder / "build.ninja").write_text(_ninja_file(sources, target), encoding="utf-8")
        jobs = os.environ.get("MAX_JOBS")
        command = [str(Path(ninja.BIN_DIR, "ninja")), "-C", str(folder), *(["-j", jobs] if jobs else [])]
        subprocess.check_call(command)

    def _build_with_torch(self, ext: Extension) -> None:
        from torch.utils.cpp_extension import BuildExtension

        # torch looks for ninja on the path, where that of an environment that is not activated is missing,
        # and without it compiles one file after the other.
        os.environ["PATH"] = os.pathsep.join([ninja.BIN_DIR, os.environ.get("PATH", os.defpath)])
        builder = BuildExtension(self.distribution)
        builder.inplace, builder.build_lib = self.inplace, self.build_lib
        builder.build_temp = os.path.abspath(os.path.join("build", f"cuda-{sys.implementation.cache_tag}"))
        builder.ensure_finalized()
        builder.extensions = [ext]
        builder.run()


def _require_gil() -> None:
    """Exit before pip compiles dependencies: some have no wheels for free-threaded Pythons, and need Rust."""
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        raise SystemExit(f"tgi_asgi: {sys.executable} is free-threaded; a Python with a GIL is needed")


def _require_compiler() -> None:
    """Exit with a sentence that pip shows last; ninja's own error is above a long traceback."""
    compiler, header = _compiler(), Path(sysconfig.get_paths()["include"], "Python.h")
    if shutil.which(shlex.split(compiler)[0]) is None:
        raise SystemExit(f"tgi_asgi: there is no C++ compiler ({compiler}). Debian, Ubuntu: build-essential")
    if not header.exists():
        raise SystemExit(f"tgi_asgi: Python's headers are missing ({header}). Debian, Ubuntu: python3-dev")
    # Clang ignores `#pragma GCC target`, and then refuses each intrinsic.
    macros = subprocess.check_output(
        [*shlex.split(compiler), "-dM", "-E", "-x", "c++", os.devnull], text=True
    )
    if "__clang__" in macros:
        raise SystemExit(f"tgi_asgi: {compiler} is Clang, which the kernels are not written for. Use CXX=g++")


def _compiler() -> str:
    return os.environ.get("CXX") or "c++"


def _translation_units(sources: list[str], folder: Path) -> list[str]:
    """Return the files to compile, slowest first: kernel sets, bindings, the rest.

    pybind11's headers take the compiler 10 s, and what most bindings add to them takes less. Several are
    therefore compiled at once, through files in `folder` that include them. Names in their unnamed
    namespaces must differ between files.
    """
    bindings = [source for source in sources if source.startswith("csrc/bindings/")]
    light = [source for source in bindings if source not in LOOPING_BINDINGS]
    groups = {f"{LIGHT_PREFIX}{index}": light[index::LIGHT_GROUPS] for index in range(LIGHT_GROUPS)}
    groups["looping-bindings"] = [source for source in bindings if source in LOOPING_BINDINGS]
    paths = []
    for name, group in groups.items():
        path = folder / f"{name}.cpp"
        _write_if_new(path, "".join(f'#include "{source.removeprefix("csrc/")}"\n' for source in group))
        paths.append(str(path))
    sets = [source for source in sources if source.startswith(SET_PREFIX)]
    return sets + paths + [source for source in sources if source not in sets and source not in bindings]


def _sets_left_out(folder: Path) -> set[str]:
    """Return the sources of kernel sets that TGI_KERNEL_SETS leaves out: none, or those of other machines."""
    wish = os.environ.get("TGI_KERNEL_SETS") or "all"
    if wish not in ("all", "native"):
        raise SystemExit(f"TGI_KERNEL_SETS must be all or native, got {wish}")
    if wish == "all":
        return set()
    program = folder / "supported_sets"
    flags = shlex.split(f"{os.environ.get('CXXFLAGS', '')} {os.environ.get('LDFLAGS', '')}")
    command = [*shlex.split(_compiler()), "-std=c++20", "-Icsrc", *flags, *SUPPORTED_SETS]
    subprocess.check_call([*command, "-o", str(program)])
    kept = kept_sets(subprocess.check_output([program], text=True).split())
    print(f"tgi_asgi: kernels for this machine only ({', '.join(kept)})", flush=True)
    return set(glob(f"{SET_PREFIX}*.cpp")) - {f"{SET_PREFIX}{name}.cpp" for name in kept}


def kept_sets(supported: list[str]) -> list[str]:
    """Return the kernel sets that may serve on a machine, of those that it can run (best last).

    The best set serves, or the fastest of those with its bits. If the system refuses AMX's tiles later, it is
    the next.
    """
    best = supported[-1]
    if best in ALIKE:
        return [name for name in supported if name in ALIKE]
    return supported[-2:] if best == "amx" else [best]


def _write_if_new(path: Path, text: str) -> None:
    """Write a file only if its text changes, because ninja recompiles newer files."""
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def _ninja_file(sources: list[str], target: Path) -> str:
    """Return the ninja file: one object per source, recompiled when an included header changes."""
    flags, link_flags = list(CXX_FLAGS), ["-shared", "-pthread"]
    if os.environ.get("TGI_SANITIZE") == "1":
        flags += ["-O1", "-g1", "-fno-omit-frame-pointer", *SANITIZE_FLAGS]
        link_flags += SANITIZE_FLAGS
    folders = [os.path.abspath("csrc"), sysconfig.get_paths()["include"], pybind11.get_include()]
    flags += [f"-I{folder}" for folder in folders]
    flags += shlex.split(os.environ.get("CXXFLAGS", ""))
    link_flags += shlex.split(os.environ.get("LDFLAGS", ""))
    lines = [
        "ninja_required_version = 1.3",
        f"cxx = {_unexpanded(_compiler())}",
        f"cflags = {_unexpanded(shlex.join(flags))}",
        f"ldflags = {_unexpanded(shlex.join(link_flags))}",
        "rule compile",
        "  command = $cxx -MMD -MF $out.d $cflags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        "  command = $cxx $in $ldflags -o $out",
    ]
    objects = []
    for source in sources:
        name = f"{os.path.relpath(source).removesuffix('.cpp').replace('/', '.')}.o"
        lines.append(f"build {name}: compile {_escaped(os.path.abspath(source))}")
        if source == AMX_MODEL or Path(source).name.startswith(LIGHT_PREFIX):
            lines.append(f"  cflags = $cflags {LIGHT_FLAG}")
        objects.append(name)
    lines += [f"build {_escaped(target)}: link {' '.join(objects)}", f"default {_escaped(target)}", ""]
    return "\n".join(lines)


def _unexpanded(text: str) -> str:
    """Escape `$` so that ninja leaves the text as it is; $ORIGIN is for the linker."""
    return text.replace("$", "$$")


def _escaped(path: object) -> str:
    return re.sub(r"([$ :])", r"$\1", str(path))


def extensions() -> list[Extension]:
    """Return the extensions to build."""
    sources = glob("csrc/cpu/**/*.cpp", recursive=True) + glob("csrc/bindings/*.cpp")
    found = [Extension("tgi_asgi._C", sorted(sources))]
    has_cuda, reason = cuda_decision()
    print(f"tgi_asgi: {'CPU and CUDA' if has_cuda else 'CPU only'} ({reason})", flush=True)
    if has_cuda:
        found.append(cuda_extension())
    return found


def cuda_decision() -> tuple[bool, str]:
    """Return whether to build the CUDA kernels, and the reason in words."""
    wish = os.environ.get("TGI_CUDA", "")
    if wish == "0":
        return False, "TGI_CUDA=0"
    reason = _why_no_cuda()
    if reason is None:
        return True, "torch has CUDA, and a matching nvcc was found"
    if wish == "1":
        raise SystemExit(f"TGI_CUDA=1, but {reason}")
    return False, reason


def _why_no_cuda() -> str | None:
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed here: build with --no-build-isolation for CUDA"
    import torch

    if torch.version.cuda is None:
        return "this torch has no CUDA"
    wanted = torch.version.cuda.split(".")[0]
    return None if _nvcc_major() == int(wanted) else f"no nvcc {wanted}.x found for torch's CUDA {wanted}"


def _nvcc_major() -> int | None:
    """Return the major version of the nvcc that torch would call, or None."""
    home = _use_whole_toolkit()
    if home is None:
        return None
    try:
        text = subprocess.check_output([os.path.join(home, "bin", "nvcc"), "--version"], text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    found = re.search(r"release (\d+)\.", text)
    return int(found.group(1)) if found else None


def _use_whole_toolkit() -> str | None:
    """Return a CUDA folder with headers; torch picks one without if the nvcc on the path is a wrapper."""
    from torch.utils import cpp_extension

    folders = (cpp_extension.CUDA_HOME, CUDA_FOLDER)
    whole = (f for f in folders if f and os.path.exists(os.path.join(f, "include", "cuda_runtime.h")))
    cpp_extension.CUDA_HOME = next(whole, cpp_extension.CUDA_HOME)
    return cpp_extension.CUDA_HOME


def cuda_extension() -> Extension:
    """Return the extension of csrc/cuda and its bindings, the only sources that include torch headers."""
    from torch.utils.cpp_extension import CUDAExtension

    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", _architectures_here() or DEFAULT_ARCHITECTURES)
    # GCC 12 mistakes the reference counts in torch's headers for buffers.
    with_torch = ["-DTGI_CUDA", "-Wno-stringop-overflow"]
    flags = {"cxx": [*CXX_FLAGS, *with_torch], "nvcc": NVCC_FLAGS}
    made: Any = CUDAExtension(
        "tgi_asgi._cuda",
        sorted(glob("csrc/cuda/*.cu") + glob("csrc/bindings/cuda/*.cpp")),
        extra_compile_args=flags,
        include_dirs=[os.path.abspath("csrc")],
    )
    return made


def _architectures_here() -> str:
    """Return the targets of the visible GPUs as TORCH_CUDA_ARCH_LIST takes them; empty without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return ""
    found = {torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())}
    return ";".join(f"{major}.{minor}{'a' if major == 9 else ''}" for major, minor in sorted(found))


_require_gil()
setup(ext_modules=extensions(), cmdclass={"build_ext": Build})
