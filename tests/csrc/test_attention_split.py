"""How a step's attention is split: every chunk that is read occurs once, and masked chunks do not occur."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_members_share_the_chunks_that_a_rule_leaves(tmp_path: Path) -> None:
    program = tmp_path / "attention_split"
    sources = [ROOT / "tests" / "csrc" / "attention_split.cpp", ROOT / "csrc" / "cpu" / "step" / "step.cpp"]
    flags = ["-O1", "-std=c++20", "-Wall", "-Werror", f"-I{ROOT / 'csrc'}"]
    subprocess.run(["c++", *flags, *map(str, sources), "-o", str(program)], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert done.stdout == "300 steps\n"
