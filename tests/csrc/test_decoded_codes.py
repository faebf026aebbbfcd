"""Codes that are decoded once for many tokens: the bits of products are those of the codes as stored.

Some processors run this code in no other test: those that decode no codes (`kUnpackingIsSlow` in
kernel_sets.cpp), and for tiles those without bfloat16, which have no set that models them.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from tgi_asgi import ops

ROOT = Path(__file__).parents[2]
STEP = ROOT / "csrc" / "cpu" / "step"


def test_products_of_decoded_codes_have_the_bits_of_those_of_stored_codes(tmp_path: Path) -> None:
    program = tmp_path / "decoded_codes"
    own = ROOT / "tests" / "csrc" / "decoded_codes.cpp"
    sources = [own, STEP / "formats.cpp", STEP.parent / "platform.cpp"]
    flags = ["-O1", "-std=c++20", "-ffp-contract=off", "-Wall", "-Wno-psabi", "-Werror", f"-I{ROOT / 'csrc'}"]
    subprocess.run(["c++", *flags, *map(str, sources), "-o", str(program)], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    formats = sum(each.is_quantised and each.has_kernel for each in ops.FORMATS.values())
    assert done.stdout == f"{formats} formats\n"
