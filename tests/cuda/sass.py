"""A kernel's machine code: parses nvdisasm's output to find undesired instructions.

nvdisasm comes with the CUDA toolkit, from PyPI (the extra `test`) and with Triton's wheel. A retry loop on
shared memory indicates an addition that shared memory lacks, a call indicates a division or a function in
double, and loads and stores of local memory indicate that the registers did not suffice.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

_FUNCTION = re.compile(r"^\.text\.(\w+):")
_LABEL = re.compile(r"^\s*(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[T\d]+ )?\s*([A-Z][\w.]*)([^;]*);")
_TARGET = re.compile(r"`\((\.L_x_\d+)\)")


@dataclass(slots=True)
class Sass:
    """A kernel's instructions."""

    name: str  # mangled
    opcodes: list[str] = field(default_factory=list)
    loops: list[tuple[int, int]] = field(default_factory=list)  # first and last instruction

    @property
    def num_retries(self) -> int:
        """Number of compare-and-swap instructions on shared memory."""
        return sum(code.startswith(("ATOMS.CAS", "ATOMS.CAST")) for code in self.opcodes)

    @property
    def num_calls(self) -> int:
        return sum(code.startswith("CALL") for code in self.opcodes)

    @property
    def num_local(self) -> int:
        """Number of loads and stores of local memory."""
        return sum(code.partition(".")[0] in ("LDL", "STL") for code in self.opcodes)

    @property
    def longest_loop(self) -> int:
        """Number of instructions from the target of the farthest backward branch to that branch."""
        return max((last - first + 1 for first, last in self.loops), default=0)


def find_nvdisasm() -> str | None:
    """Return the disassembler's path, or None if there is none."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    packages = Path(sysconfig.get_paths()["purelib"])
    folders = [
        f"{home}/bin",
        *(
            str(found)
            for each in ("nvidia/cu1?/bin", "triton/backends/nvidia/bin")
            for found in packages.glob(each)
        ),
    ]
    return shutil.which("nvdisasm") or shutil.which("nvdisasm", path=os.pathsep.join(folders))


def disassemble(nvdisasm: str, cubin: Path) -> list[Sass]:
    """Return the kernels of a cubin."""
    return list(parse(subprocess.check_output([nvdisasm, "-c", str(cubin)], text=True)))


def parse(text: str) -> Iterator[Sass]:
    """Yield the kernels in nvdisasm's output."""
    for part in re.split(r"^(?=\.text\.\w+:)", text, flags=re.MULTILINE)[1:]:
        header = _FUNCTION.match(part)
        assert header is not None
        kernel, labels = Sass(header[1]), dict[str, int]()
        for line in part.splitlines()[1:]:
            label, instruction = _LABEL.match(line), _INSTRUCTION.search(line)
            if label is not None:
                labels[label[1]] = len(kernel.opcodes)
            elif instruction is not None:
                target = _TARGET.search(instruction[2])
                if instruction[1].startswith("BRA") and target is not None and target[1] in labels:
                    kernel.loops.append((labels[target[1]], len(kernel.opcodes)))
                kernel.opcodes.append(instruction[1])
        yield kernel
