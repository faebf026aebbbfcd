"""How a step's attention is split: every chunk that is read occurs once, and masked chunks do not occur."""

from __future__ import annotations

import subprocess

from tests.support.cpp_program import compiled


def test_members_share_the_chunks_that_a_rule_leaves() -> None:
    sources = ("tests/csrc/attention_split.cpp", "csrc/cpu/step/attention_split.cpp")
    program = compiled("attention_split", *sources, flags=["-O1", "-Wall", "-Werror"])
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert done.stdout == "300 steps\n"
