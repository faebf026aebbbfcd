"""Builds both extensions against torch's CUDA wheel and resolves every symbol (`make cuda-link`; no GPU).

    python -m tests.cuda.link_check          # the torch that the Makefile pins
    python -m tests.cuda.link_check 2.11.0   # that of a certain GPU machine

A CUDA torch cannot be imported without NVIDIA's libraries (gigabytes), but its headers and libraries suffice
to compile and link. setup.py therefore runs under the installed torch, with the include and library paths of
the unpacked wheel. The linker allows undefined symbols in a shared library; this check requires each to be
defined in one of the libraries that the loader would open.
"""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
import sysconfig
import tempfile
import time
import zipfile
from collections import Counter
from pathlib import Path

from tests.cuda.nvcc_check import find_nvcc

_ROOT = Path(__file__).parents[2]
_FOLDER = _ROOT / "build" / "cuda-link"
_MB = 1_000_000


def pinned_version() -> str:
    """Return the version of the Makefile's torch."""
    found = re.search(r"^TORCH \?= torch==(\S+)$", (_ROOT / "Makefile").read_text(), re.MULTILINE)
    if found is None:
        raise SystemExit("the Makefile pins no torch")
    return found[1]


def unpacked_torch(version: str) -> Path:
    """Return the `torch` folder of PyPI's wheel: headers, libraries and version; fetched once (0.5 GB)."""
    whole = _FOLDER / version
    torch = whole / "torch"
    if not (torch / "version.py").exists():
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "-d", folder]
            # `===` is not satisfied by a CPU build, which has a local version.
            subprocess.run([*command, f"torch==={version}"], check=True)
            (wheel,) = Path(folder).glob("torch-*.whl")
            with zipfile.ZipFile(wheel) as archive:
                needed = [
                    name for name in archive.namelist() if name.startswith(("torch/include/", "torch/lib/"))
                ]
                archive.extractall(whole, needed)
                archive.extract("torch/version.py", whole)  # last: marks the folder as complete
    return torch


def build(torch_folder: Path) -> None:
    """Run setup.py in this process, with the headers and libraries of `torch_folder`."""
    import torch
    from torch.utils import cpp_extension

    version = runpy.run_path(str(torch_folder / "version.py"))
    torch.version.cuda = version["cuda"]
    cpp_extension._TORCH_PATH = str(torch_folder)
    cpp_extension.TORCH_LIB_PATH = str(torch_folder / "lib")
    os.environ |= {"TGI_CUDA": "1"}
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "9.0a")
    os.chdir(_ROOT)
    sys.path.insert(0, str(_ROOT))
    sys.argv = ["setup.py", "build_ext", "--build-lib", str(_FOLDER)]
    runpy.run_path("setup.py", run_name="__main__")


def unresolved(library: Path, folders: list[Path]) -> tuple[list[str], Counter[str]]:
    """Look up each undefined symbol of a library in the libraries that it needs, and in the interpreter.

    Args:
        folders: Folders with needed libraries that the compiler does not find by itself.

    Returns:
        The symbols that none defines, and the number of symbols that each library defines.
    """
    providers = {"Python": _defined(Path(sys.executable))}
    if shared := sysconfig.get_config_var("INSTSONAME"):
        python = Path(sysconfig.get_config_var("LIBDIR"), shared)
        providers["Python"] |= _defined(python) if python.exists() else set()
    complaints = []
    for name in re.findall(r"\(NEEDED\).*\[(.+)\]", _output("readelf", "-d", library)):
        path = next((folder / name for folder in folders if (folder / name).exists()), None)
        path = path or Path(_output("c++", f"-print-file-name={name}").strip())
        if path.exists():
            providers[name] = _defined(path)
        else:
            complaints.append(f"the needed library {name} is nowhere")
    found: Counter[str] = Counter()
    for line in _output("nm", "-D", "--undefined-only", library).splitlines():
        kind, symbol = line.split()[-2:]
        if kind != "U":  # weak symbols may be missing
            continue
        home = next((name for name, symbols in providers.items() if symbol in symbols), None)
        if home is None:
            complaints.append(symbol)
        else:
            found[home] += 1
    return complaints, found


def _defined(path: Path) -> set[str]:
    """Return the symbols that a library defines, with and without their versions."""
    names = [line.split()[-1] for line in _output("nm", "-D", "--defined-only", path).splitlines()]
    return {name.replace("@@", "@") for name in names} | {name.partition("@")[0] for name in names}


def _toolkit(nvcc: str) -> Path:
    """Return the toolkit's folder; nvcc itself may be a wrapper elsewhere."""
    done = subprocess.run([nvcc, "--dryrun", "-c", "none.cu"], capture_output=True, text=True)
    found = re.search(r"^#\$ TOP=(.*)", done.stdout + done.stderr, re.MULTILINE)
    if found is None:
        raise SystemExit("nvcc does not say where its toolkit is")
    return Path(found[1])


def _output(*command: object) -> str:
    return subprocess.check_output([str(word) for word in command], text=True)


def main() -> int:
    """Fetch the wheel, build, look up the symbols, print the results, and return the exit status."""
    if sys.argv[1:2] == ["build"]:
        build(Path(sys.argv[2]))
        return 0
    nvcc = find_nvcc()
    if nvcc is None:
        print("cuda-link: there is no nvcc here; nothing was checked")
        return 0
    torch = unpacked_torch((sys.argv[1:] or [pinned_version()])[0])
    start = time.monotonic()
    subprocess.run([sys.executable, "-m", "tests.cuda.link_check", "build", torch], check=True, cwd=_ROOT)
    print(f"cuda-link: built in {(time.monotonic() - start) / 60:.1f} min")
    folders = [torch / "lib", *_toolkit(nvcc).glob("lib*")]
    is_whole = True
    for name in ("_C", "_cuda"):
        (library,) = (_FOLDER / "tgi_asgi").glob(f"{name}.*.so")
        complaints, found = unresolved(library, folders)
        homes = ", ".join(f"{home} {count}" for home, count in found.most_common())
        print(f"cuda-link: {library.name}, {library.stat().st_size / _MB:.1f} MB: symbols of {homes}")
        for complaint in complaints:
            print(f"cuda-link: {library.name}: {complaint}", file=sys.stderr)
        is_whole = is_whole and not complaints
    return 0 if is_whole else 1


if __name__ == "__main__":
    sys.exit(main())
