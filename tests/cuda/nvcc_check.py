"""Compiles csrc/cuda with nvcc and checks the assembler's report: `make cuda-check`. Needs no GPU.

The check fails on a warning, a spill, a stack frame or more registers than noted below. If nvdisasm is found
(sass.py), it also fails on a retry loop on shared memory, a call, local memory, or a loop with more
instructions than noted. Results are cached by a hash of their inputs, so only changed files are compiled
again.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.cuda import sass

_ROOT = Path(__file__).parents[2]
_SOURCES = _ROOT / "csrc" / "cuda"
_CACHE = _ROOT / "build" / "cuda-check"
ARCHITECTURES = ("80", "90a")
_FLAGS = [
    "-std=c++17", "-O3", "-lineinfo", "-Werror", "all-warnings", "-Xcompiler", "-Wall,-Werror",
    "-Xptxas", "-v", "-D__CUDA_NO_HALF_OPERATORS__", "-D__CUDA_NO_HALF_CONVERSIONS__",
    "-D__CUDA_NO_BFLOAT16_CONVERSIONS__", "-D__CUDA_NO_HALF2_OPERATORS__",  # as torch builds extensions
    f"-I{_ROOT / 'csrc'}",
]  # fmt: skip

# Maximum registers per thread of each kernel: the number last measured plus a few for the next compiler.
# 65,536 divided by this number and by the block's threads is the number of blocks that an SM holds.
_REGISTERS = {
    "begin_step_kernel": 36,
    "embed_kernel": 32,
    "norm_kernel": 56,
    "activate_kernel": 56,
    "rope_kernel": 128,
    "plan_kernel": 40,
    "decode_kernel": 160,  # launch bounds: three blocks, or four
    "decode_kernel 256": 255,
    "decode_kernel fp8": 152,
    "merge_kernel": 104,
    "merge_kernel 256": 176,
    "gather_kernel": 40,
    "merge_parts_kernel": 60,
    "residual_add_kernel": 32,
    "prefill_kernel": 248,
    "prefill_kernel 256": 255,
    "linear_kernel": 128,
    "quant_linear_kernel": 128,
    "dequantise_kernel": 64,
    "quantise_tokens_kernel": 64,
    "quantise_groups_kernel": 40,
    "lora_down_kernel": 128,
    "lora_up_kernel": 160,
    "route_kernel": 68,
    "experts_plan_kernel": 48,
    "experts_stream_kernel": 128,
    "experts_tile_kernel": 208,
    "experts_sum_kernel": 64,
    "gated_add_kernel": 24,
    "part_stats_kernel": 60,
    "part_scores_kernel": 48,
    "sample_kernel": 64,
    "draft_slots_kernel": 44,
    "accept_drafts_kernel": 32,
    "token_logprobs_kernel": 44,
}
# For sm_90a, the architecture that the kernels are tuned for. Number of functions that may be called: in
# sampling, logarithms in double, which determine the winner, and divisions by penalties and temperatures,
# which match the CPU's bits.
_CALLS = {"part_stats_kernel": 5, "part_scores_kernel": 2, "sample_kernel": 4}
# Maximum instructions of a loop, ending at its farthest backward branch: the number last counted plus a
# tenth.
_LOOPS = {
    "begin_step_kernel": 8,
    "embed_kernel": 8,
    "norm_kernel": 41,
    "activate_kernel": 8,
    "rope_kernel": 8,
    "plan_kernel": 215,
    "decode_kernel": 1760,  # an item
    "decode_kernel fp8": 2280,
    "merge_kernel": 455,  # sixteen chunks
    "merge_kernel 256": 750,
    "gather_kernel": 8,
    "merge_parts_kernel": 195,
    "residual_add_kernel": 8,
    "prefill_kernel": 1260,  # a tile of keys
    "prefill_kernel fp8": 1500,
    "linear_kernel": 305,
    "quant_linear_kernel": 940,
    "dequantise_kernel": 8,
    "quantise_tokens_kernel": 8,
    "quantise_groups_kernel": 8,
    "lora_down_kernel": 565,
    "lora_up_kernel": 520,
    "route_kernel": 3150,
    "experts_plan_kernel": 940,
    "experts_stream_kernel": 1030,
    "experts_tile_kernel": 1130,
    "experts_sum_kernel": 140,
    "gated_add_kernel": 8,
    "part_stats_kernel": 235,
    "part_scores_kernel": 450,  # the race
    "sample_kernel": 5660,
    "draft_slots_kernel": 80,
    "accept_drafts_kernel": 140,  # the drafts of a sequence
    "token_logprobs_kernel": 305,
}
# Required contents of the intermediate code, by source: 16-byte copies, asynchronous copies, tensor cores.
_INSTRUCTIONS = {
    "attention_decode_bf16": (
        "cp.async.cg",
        "mma.sync.aligned.m16n8k16",
        "ldmatrix.sync.aligned.m8n8.x4.trans",
    ),
    "attention_prefill_bf16": (
        "cp.async.cg",
        "mma.sync.aligned.m16n8k16",
        "ldmatrix.sync.aligned.m8n8.x4.trans",
    ),
    "linear": ("cp.async.cg", "mma.sync.aligned.m16n8k16", "ld.shared.v4", "griddepcontrol.wait"),
    "attention_gather": ("ld.global.v4", "st.global.v4", "griddepcontrol.wait"),
    "attention_merge": ("ld.global.v4", "st.global.v4", "griddepcontrol.wait"),
    "residual_add": ("ld.global.v4", "st.global.v4", "griddepcontrol.wait"),
    "quant_linear_bf16": (
        "cp.async.cg",
        "mma.sync.aligned.m16n8k16",
        "ldmatrix.sync.aligned.m8n8.x4",
        "griddepcontrol.wait",
    ),
    "norm": ("ld.global.v4", "st.global.v4"),
    "activate": ("ld.global.v4", "st.global.v4"),
    "lora": ("ld.global.v4", "mma.sync.aligned.m16n8k16", "griddepcontrol.wait"),
    "experts_stream": ("cp.async.cg", "mma.sync.aligned.m16n8k16", "ld.shared.v4", "griddepcontrol.wait"),
    "experts_tile": ("cp.async.cg", "mma.sync.aligned.m16n8k16", "ld.shared.v4", "griddepcontrol.wait"),
    "experts": ("ld.global.v4", "st.global.v4", "griddepcontrol.wait"),
}


@dataclass(frozen=True, slots=True)
class Code:
    """A summary of a kernel's instructions, as counted by `sass.Sass`."""

    num_retries: int
    num_calls: int
    num_local: int
    longest_loop: int


@dataclass(frozen=True, slots=True)
class Kernel:
    """The assembler's report on a kernel for one architecture."""

    source: str
    name: str
    architecture: str
    registers: int
    shared_bytes: int
    stack_bytes: int
    spill_bytes: int
    code: Code | None = None  # of sm_90a, if nvdisasm is available

    def complaints(self) -> Iterator[str]:
        """Yield a line for each bound that the kernel exceeds."""
        if self.stack_bytes or self.spill_bytes:
            yield (
                f"{self.name} for {self.architecture} has {self.stack_bytes} bytes of stack and spills "
                f"{self.spill_bytes}"
            )
        bound = self._noted(_REGISTERS)
        if bound is None:
            yield f"{self.name} has no bound of registers in {Path(__file__).name}"
        elif self.registers > bound:
            yield (
                f"{self.name} for {self.architecture} takes {self.registers} registers, more than the "
                f"{bound} noted"
            )
        if self.code is not None:
            yield from self._complaints_of(self.code)

    def _complaints_of(self, code: Code) -> Iterator[str]:
        who = f"{self.name} for {self.architecture}"
        if code.num_retries:
            yield f"{who} retries {code.num_retries} additions in shared memory, which has none of 64 bits"
        if code.num_calls > (self._noted(_CALLS) or 0):
            yield f"{who} calls {code.num_calls} functions: a division, or one in double"
        if code.num_local:
            yield f"{who} has {code.num_local} loads and stores of local memory"
        bound = self._noted(_LOOPS)
        if bound is None:
            yield f"{self.name} has no bound of a loop in {Path(__file__).name}"
        elif code.longest_loop > bound:
            yield f"{who} has a loop of {code.longest_loop} instructions, more than the {bound} noted"

    def _noted(self, bounds: Mapping[str, int]) -> int | None:
        base = self.name.partition("<")[0]
        kinds = [f"{base} {kind}" for kind in ("256", "fp8") if kind in self.name]
        return next((bounds[kind] for kind in (*kinds, base) if kind in bounds), None)


def find_nvcc() -> str | None:
    """Return nvcc's path: the system's, else the one of PyPI's wheels (the extra `nvcc`), else None."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    folders = [
        f"{home}/bin",
        *sorted(map(str, Path(sysconfig.get_paths()["purelib"]).glob("nvidia/cu1?/bin"))),
    ]
    return shutil.which("nvcc") or shutil.which("nvcc", path=os.pathsep.join(folders))


def accepts_compiler(nvcc: str) -> bool:
    """Return whether nvcc supports the host's compiler; its headers refuse newer ones than they know."""
    run = subprocess.run([nvcc, "-E", "-x", "cu", os.devnull], capture_output=True, text=True)
    return "unsupported GNU version" not in run.stderr


def compile_all(nvcc: str) -> tuple[list[Kernel], list[str]]:
    """Compile every source, a few at a time; return the kernels and the complaints."""
    sources = sorted(_SOURCES.glob("*.cu"))
    with ThreadPoolExecutor(os.cpu_count()) as executor:
        results = list(executor.map(lambda source: _compile(nvcc, source), sources))
    kernels = [kernel for result, _ in results for kernel in result]
    complaints = [complaint for _, result in results for complaint in result]
    complaints += [complaint for kernel in kernels for complaint in kernel.complaints()]
    return kernels, complaints


def table(kernels: list[Kernel]) -> str:
    """Render the kernels as lines of text."""
    lines = [f"{'kernel':<44} {'arch':>5} {'registers':>9} {'shared':>7} {'loop':>5} {'calls':>5}"]
    lines += [
        f"{kernel.name:<44} {kernel.architecture:>5} {kernel.registers:>9} {kernel.shared_bytes:>7}"
        + ("" if kernel.code is None else f" {kernel.code.longest_loop:>5} {kernel.code.num_calls:>5}")
        for kernel in sorted(kernels, key=lambda kernel: (kernel.source, kernel.name, kernel.architecture))
    ]
    return "\n".join(lines)


def _compile(nvcc: str, source: Path) -> tuple[list[Kernel], list[str]]:
    version = subprocess.check_output([nvcc, "--version"], text=True)
    readers = (Path(__file__), Path(sass.__file__))
    texts = [path.read_text() for path in (*_closure(source), *readers)] + [str(sass.find_nvdisasm())]
    kept = _CACHE / f"{source.stem}-{hashlib.sha256(repr((version, texts)).encode()).hexdigest()[:16]}.json"
    if not kept.exists():
        _CACHE.mkdir(parents=True, exist_ok=True)
        kernels, complaints = _run(nvcc, source)
        partial = kept.with_suffix(f".{os.getpid()}.tmp")
        partial.write_text(json.dumps([[asdict(kernel) for kernel in kernels], complaints]))
        partial.replace(kept)
    kernels, complaints = json.loads(kept.read_text())
    codes = [None if kernel["code"] is None else Code(**kernel["code"]) for kernel in kernels]
    return [
        Kernel(**kernel | {"code": code}) for kernel, code in zip(kernels, codes, strict=True)
    ], complaints


def _closure(source: Path) -> list[Path]:
    """Return the source and the files of csrc that it includes."""
    found, waiting = [], [source]
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found.append(path)
        for name in re.findall(r'^#include "([^"]+)"', path.read_text(), re.MULTILINE):
            waiting += [near for near in (path.parent / name, _ROOT / "csrc" / name) if near.exists()][:1]
    return sorted(found)


def _run(nvcc: str, source: Path) -> tuple[list[Kernel], list[str]]:
    targets = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in ARCHITECTURES]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [
                nvcc,
                *_FLAGS,
                *targets,
                "--keep",
                "--keep-dir",
                folder,
                "-c",
                str(source),
                "-o",
                f"{folder}/out.o",
            ],
            capture_output=True,
            text=True,
        )
        code = "".join(path.read_text() for path in Path(folder).glob("*.ptx"))
        codes = {} if done.returncode else _disassemble(Path(folder))
    if done.returncode != 0:
        return [], [f"{source.name} does not compile:\n{done.stdout}{done.stderr}"]
    needed = _INSTRUCTIONS.get(source.stem, ())
    missing = [f"{source.name} compiles to no {word}" for word in needed if word not in code]
    return list(_parse(source.name, done.stderr, codes)), missing


def _disassemble(folder: Path) -> dict[tuple[str, str], Code]:
    """Return the code in the cubin for sm_90a that nvcc kept, by mangled name and architecture."""
    nvdisasm, architecture = sass.find_nvdisasm(), ARCHITECTURES[-1]
    if nvdisasm is None:
        return {}
    # Some versions of nvcc name it after the virtual architecture (compute_90a), others after the real one
    # (sm_90a).
    (cubin,) = folder.glob(f"*_{architecture}.cubin")
    return {
        (kernel.name, architecture): Code(
            kernel.num_retries, kernel.num_calls, kernel.num_local, kernel.longest_loop
        )
        for kernel in sass.disassemble(nvdisasm, cubin)
    }


_ENTRY = re.compile(
    r"Compiling entry function '(\w+)' for 'sm_(\w+)'.*?"
    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?"
    r"Used (\d+) registers(?:.*?(\d+) bytes smem)?[^\n]*",
    re.DOTALL,
)


def _parse(source: str, text: str, codes: Mapping[tuple[str, str], Code]) -> Iterator[Kernel]:
    for part in re.split(r"(?=ptxas info *: Compiling entry)", text):
        found = _ENTRY.search(part)
        if found is None:
            continue
        mangled, architecture, stack, stores, loads, registers, shared = found.groups()
        yield Kernel(
            source, _demangle(mangled), architecture, int(registers), int(shared or 0), int(stack),
            int(stores) + int(loads), codes.get((mangled, architecture)),
        )  # fmt: skip


def _demangle(name: str) -> str:
    """Return a kernel's name without namespaces and parameters: decode_kernel<bf16, bf16, 128>."""
    text = subprocess.check_output(["c++filt", name], text=True).strip()
    text = re.sub(r"\(anonymous namespace\)::|tgi::cuda::|^void |\(int\)", "", text)
    return text.partition("(")[0]


def check_bindings(nvcc: str) -> list[str]:
    """Parse the CUDA bindings with the host's compiler and the headers of the installed torch.

    A torch without CUDA ships the headers of c10/cuda except one, which only says how torch was built.
    """
    from torch.utils.cpp_extension import include_paths

    toolkit = re.search(r"^#\$ TOP=(.*)", _dry_run(nvcc), re.MULTILINE)
    if toolkit is None:
        return ["nvcc does not say where its headers are"]
    with tempfile.TemporaryDirectory() as folder:
        stub = Path(folder, "c10/cuda/impl/cuda_cmake_macros.h")
        stub.parent.mkdir(parents=True)
        stub.write_text("#pragma once\n#define C10_CUDA_BUILD_SHARED_LIBS\n")
        includes = [f"-I{_ROOT / 'csrc'}"]
        # The folders of the toolkit and of the wheels.
        folders = (f"targets/{platform.machine()}-linux/include", "include")
        includes += [f"-isystem{toolkit[1]}/{folder}" for folder in folders]
        includes += [
            f"-isystem{path}" for path in (*include_paths(), sysconfig.get_paths()["include"], folder)
        ]
        sources = sorted((_ROOT / "csrc/bindings/cuda").glob("*.cpp"))
        with ThreadPoolExecutor(os.cpu_count()) as executor:
            results = executor.map(lambda source: _parse_adapter(source, includes), sources)
            return [complaint for complaint in results if complaint]


def _parse_adapter(source: Path, includes: list[str]) -> str:
    import torch

    flags = ["-std=c++20", "-fsyntax-only", "-fvisibility=hidden", "-DTGI_CUDA", "-Wall", "-Werror"]
    texts = [torch.__version__, *flags, *(path.read_text() for path in _closure(source))]
    kept = _CACHE / f"{source.stem}-{hashlib.sha256(repr(texts).encode()).hexdigest()[:16]}.parsed"
    if kept.exists():
        return ""
    done = subprocess.run(["g++", *flags, *includes, str(source)], capture_output=True, text=True)
    if done.returncode != 0:
        return f"{source.name} does not compile:\n{done.stderr[:4000]}"
    _CACHE.mkdir(parents=True, exist_ok=True)
    kept.touch()
    return ""


def _dry_run(nvcc: str) -> str:
    done = subprocess.run([nvcc, "--dryrun", "-c", "none.cu"], capture_output=True, text=True)
    return done.stdout + done.stderr


def main() -> int:
    """Compile, print the table, and return the exit status."""
    nvcc = find_nvcc()
    if nvcc is None:
        print("cuda-check: there is no nvcc here; nothing was checked")
        return 0
    kernels, complaints = compile_all(nvcc)
    print(table(kernels))
    if sass.find_nvdisasm() is None:
        print("cuda-check: no nvdisasm here (PyPI: nvidia-cuda-nvdisasm): no instruction was looked at")
    complaints += check_bindings(nvcc)
    for complaint in complaints:
        print(complaint, file=sys.stderr)
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
