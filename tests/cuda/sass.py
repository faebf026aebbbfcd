"""What a kernel is for the hardware: nvdisasm's text, read for what must not be in it.

nvdisasm comes with the CUDA toolkit, by PyPI (the extra `test`) and with Triton's wheel. Retry loops on
shared memory stand for an addition that it does not have, calls for a division or a function in double,
loads and stores of local memory for registers that did not suffice.
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
        """Instructions that compare and swap in shared memory."""
        return sum(code.startswith(("ATOMS.CAS", "ATOMS.CAST")) for code in self.opcodes)

    @property
    def num_calls(self) -> int:
        return sum(code.startswith("CALL") for code in self.opcodes)

    @property
    def num_local(self) -> int:
        """Loads and stores of local memory."""
        return sum(code.partition(".")[0] in ("LDL", "STL") for code in self.opcodes)

    @property
    def longest_loop(self) -> int:
        """Instructions from where the farthest branch back goes to that branch."""
        return max((last - first + 1 for first, last in self.loops), default=0)


def find_nvdisasm() -> str | None:
    """Return the disassembler's path; None: there is none."""
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
    """Yield the kernels of what nvdisasm prints."""
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
