"""Codes that are decoded once for many tokens: the bits of products are those of the codes as stored.

Some processors run this code in no other test: those that decode no codes (`kUnpackingIsSlow` in
kernel_sets.cpp), and for tiles those without bfloat16, which have no set that models them.
"""

from __future__ import annotations

import subprocess

from tests.support.cpp_program import compiled
from tgi_asgi import ops

SOURCES = ["tests/csrc/decoded_codes.cpp", "csrc/cpu/step/formats.cpp", "csrc/cpu/platform.cpp"]


def test_products_of_decoded_codes_have_the_bits_of_those_of_stored_codes() -> None:
    flags = ["-O1", "-ffp-contract=off", "-Wall", "-Wno-psabi", "-Werror"]
    program = compiled("decoded_codes", *SOURCES, flags=flags)
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    formats = sum(each.is_quantised and each.has_kernel for each in ops.FORMATS.values())
    assert done.stdout == f"{formats} formats\n"
