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
TORCH = re.search(r"^TORCH \?= (\S+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)


def test_the_package_is_built_without_torch_and_runs_with_any() -> None:
    assert not [need for need in PROJECT["build-system"]["requires"] if need.startswith("torch")]
    assert re.search(r"^torch>=", (ROOT / "requirements.txt").read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.install
def test_pip_installs_a_server_that_runs_from_any_folder(tmp_path: Path) -> None:
    """Takes minutes and 1 GB, of which torch is most."""
    source, prefix, elsewhere = tmp_path / "source", tmp_path / "venv", tmp_path / "elsewhere"
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(lambda name: (ROOT / name).is_file(), listed.splitlines()):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, source / name)
    venv.create(prefix, with_pip=True)
    elsewhere.mkdir()
    assert TORCH is not None
    constraint = tmp_path / "constraint.txt"  # the CPU build, by its local version
    constraint.write_text(f"{TORCH[1]}+cpu\n", encoding="utf-8")
    names = ("PYTHONPATH", "VIRTUAL_ENV", "TGI_CUDA")
    environ = {name: value for name, value in os.environ.items() if name not in names}
    environ["PIP_CONSTRAINT"] = str(constraint)

    def run(folder: Path, *command: str) -> str:
        done = subprocess.run(
            [prefix / "bin" / command[0], *command[1:]],
            cwd=folder, env=environ, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run(source, "python", "-m", "pip", "install", ".")
    assert re.fullmatch(r"tgi-asgi, version \S+\n", run(elsewhere, "tgi-asgi", "--version"))
    code = "import sys, tgi_asgi._C as c; print(c.__file__, c.kernel_set(), 'torch' in sys.modules)"
    shown = run(elsewhere, "python", "-c", code).split()
    assert shown[0].startswith(str(prefix))
    assert shown[2] == "False", "the extension needs no torch"
    assert "No broken requirements" in run(elsewhere, "python", "-m", "pip", "check")
