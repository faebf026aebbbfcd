"""`pip install .` as a user types it: in a clean environment, from what git tracks."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
(TORCH,) = (need for need in PROJECT["build-system"]["requires"] if need.startswith("torch"))


def test_the_makefile_pins_the_torch_that_pip_builds_with() -> None:
    assert f"\nTORCH ?= {TORCH}\n" in (ROOT / "Makefile").read_text(encoding="utf-8")


@pytest.mark.install
def test_pip_installs_a_server_that_runs_from_any_folder(tmp_path: Path) -> None:
    """Takes minutes and 2 GB: torch comes twice, into pip's build environment and into this one."""
    source, prefix, elsewhere = tmp_path / "source", tmp_path / "venv", tmp_path / "elsewhere"
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(lambda name: (ROOT / name).is_file(), listed.splitlines()):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, source / name)
    venv.create(prefix, with_pip=True)
    elsewhere.mkdir()
    # The CPU build, by its local version, in both environments: pip of late has a variable for each.
    constraint = tmp_path / "constraint.txt"
    constraint.write_text(f"{TORCH}+cpu\n", encoding="utf-8")
    names = ("PYTHONPATH", "VIRTUAL_ENV", "TGI_CUDA")
    environ = {name: value for name, value in os.environ.items() if name not in names}
    environ |= {"PIP_CONSTRAINT": str(constraint), "PIP_BUILD_CONSTRAINT": str(constraint)}

    def run(folder: Path, *command: str) -> str:
        done = subprocess.run(
            [prefix / "bin" / command[0], *command[1:]],
            cwd=folder, env=environ, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run(source, "python", "-m", "pip", "install", ".")
    assert re.fullmatch(r"tgi-asgi, version \S+\n", run(elsewhere, "tgi-asgi", "--version"))
    code = (
        "import torch, tgi_asgi._C as c, importlib.metadata as m; print(c.__file__, *m.requires('tgi-asgi'))"
    )
    shown = run(elsewhere, "python", "-c", code)
    assert shown.startswith(str(prefix))
    assert TORCH in shown.split()
    assert "No broken requirements" in run(elsewhere, "python", "-m", "pip", "check")
