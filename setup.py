"""Build tgi_asgi._C from csrc/ with torch's extension builder and ninja; pyproject.toml has all the rest.

What is installed wants the torch that it was compiled against: another's C++ interface would not fit.

Environment: MAX_JOBS limits parallel compilers; TGI_CUDA=1 demands the CUDA kernels, TGI_CUDA=0 leaves them
out; TORCH_CUDA_ARCH_LIST chooses their targets. TGI_SANITIZE=1 builds with the address and the undefined
behaviour sanitizer (`make sanitize`).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from glob import glob
from pathlib import Path

import torch
from setuptools import setup
from torch.utils import cpp_extension
from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

# fma where it is written and nowhere else: rows must have the same bits in every tile shape. torch 2.13's
# headers use one C++20 feature, which GCC grants to C++17 with a warning.
CXX_FLAGS = [
    "-O3", "-std=c++17", "-g0", "-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-Wno-c++20-extensions",
]  # fmt: skip
SANITIZE_FLAGS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
NVCC_FLAGS = ["-O3", "-std=c++17", "-lineinfo", "--fmad=true"]
DEFAULT_ARCHITECTURES = "8.0;9.0a;9.0+PTX"
CUDA_FOLDER = "/usr/local/cuda"


def use_whole_toolkit() -> None:
    """Where the nvcc on the path is only a wrapper, torch takes a folder without headers for the toolkit."""
    folders = (cpp_extension.CUDA_HOME, CUDA_FOLDER)
    whole = (f for f in folders if f and os.path.exists(os.path.join(f, "include", "cuda_runtime.h")))
    cpp_extension.CUDA_HOME = next(whole, cpp_extension.CUDA_HOME)


def nvcc_major() -> int | None:
    """Return the major version of the nvcc that torch would call, or None."""
    if cpp_extension.CUDA_HOME is None:
        return None
    nvcc = os.path.join(cpp_extension.CUDA_HOME, "bin", "nvcc")
    try:
        text = subprocess.check_output([nvcc, "--version"], text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    found = re.search(r"release (\d+)\.", text)
    return int(found.group(1)) if found else None


def cuda_decision(sources: list[str]) -> tuple[bool, str]:
    """Return whether the CUDA kernels are built, and the reason in words."""
    wish = os.environ.get("TGI_CUDA", "")
    if wish == "0":
        return False, "TGI_CUDA=0"
    if torch.version.cuda is None:
        reason = "this torch has no CUDA"
    elif nvcc_major() != int(torch.version.cuda.split(".")[0]):
        reason = f"no nvcc {torch.version.cuda.split('.')[0]}.x found for torch's CUDA {torch.version.cuda}"
    elif not sources:
        reason = "no CUDA sources"
    else:
        return True, f"torch's CUDA {torch.version.cuda} and its nvcc found"
    if wish == "1":
        raise SystemExit(f"TGI_CUDA=1, but {reason}")
    return False, reason


def extension() -> CppExtension:
    """Describe the extension: every .cpp of csrc/cpu and csrc/bindings, and .cu where CUDA is built."""
    sources = glob("csrc/cpu/**/*.cpp", recursive=True) + glob("csrc/bindings/*.cpp")
    cuda_sources = glob("csrc/cuda/*.cu") + glob("csrc/bindings/cuda/*.cpp")
    use_whole_toolkit()
    has_cuda, reason = cuda_decision(cuda_sources)
    print(f"tgi_asgi._C: {'CPU and CUDA' if has_cuda else 'CPU only'} ({reason})", flush=True)
    common = {"include_dirs": [os.path.abspath("csrc")], "name": "tgi_asgi._C"}
    if not has_cuda:
        flags = {"cxx": CXX_FLAGS}
        if os.environ.get("TGI_SANITIZE") == "1":
            flags = {"cxx": [*CXX_FLAGS, "-O1", "-g1", "-fno-omit-frame-pointer", *SANITIZE_FLAGS]}
            common["extra_link_args"] = SANITIZE_FLAGS
        return CppExtension(sources=sorted(sources), extra_compile_args=flags, **common)
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", architectures_here() or DEFAULT_ARCHITECTURES)
    flags = {"cxx": [*CXX_FLAGS, "-DTGI_CUDA"], "nvcc": NVCC_FLAGS}
    return CUDAExtension(sources=sorted(sources + cuda_sources), extra_compile_args=flags, **common)


def architectures_here() -> str:
    """Return the targets of the GPUs that can be seen, as TORCH_CUDA_ARCH_LIST has them; none: empty."""
    if not torch.cuda.is_available():
        return ""
    found = {torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())}
    return ";".join(f"{major}.{minor}{'a' if major == 9 else ''}" for major, minor in sorted(found))


class Build(BuildExtension):
    """Keeps the objects in the tree: an editable install would compile them anew in a temporary folder."""

    def initialize_options(self) -> None:
        super().initialize_options()
        version = f"{sys.implementation.cache_tag}-torch{torch.__version__}"
        self.build_temp = os.path.abspath(os.path.join("build", version))


def dependencies() -> list[str]:
    """Return what the package needs at run time."""
    return [Path("requirements.txt").read_text(encoding="utf-8"), f"torch=={torch.__version__.split('+')[0]}"]


setup(ext_modules=[extension()], cmdclass={"build_ext": Build}, install_requires=dependencies())
