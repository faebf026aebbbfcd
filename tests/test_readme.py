"""The README's table and commands against settings and Makefile; the listings of pages against the files."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from tgi_asgi.settings import Settings

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def _row(spec: dataclasses.Field[Any]) -> str:
    flags = (f"--{spec.name.replace('_', '-')}", *spec.metadata.get("flags", ()))
    words = {"None": "", "()": "", "True": "on", "False": "off"}
    default = words.get(str(spec.default), f"`{spec.default}`")
    text = spec.metadata["help"]
    if choices := spec.metadata.get("choices"):
        text += f" One of {', '.join(f'`{choice}`' for choice in choices)}."
    return f"| {', '.join(f'`{flag}`' for flag in flags)} | {default} | {text} |"


@pytest.mark.parametrize("spec", dataclasses.fields(Settings), ids=lambda spec: spec.name)
def test_the_table_has_each_setting_as_it_is(spec: dataclasses.Field[Any]) -> None:
    assert _row(spec) in README.splitlines(), "README.md wants the row on the left"


def test_the_worked_example_is_the_file_that_runs() -> None:
    page = (ROOT / "docs/adding-a-model.md").read_text(encoding="utf-8")
    file = ROOT / "tgi_asgi/models/families/granite.py"
    assert f"```python\n{file.read_text(encoding='utf-8')}```" in page
    tests = (ROOT / "tests/support/families.py").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("    ") and '"granite"' in line]
    assert len(rows) == 2 and all(row in tests.splitlines() for row in rows)


@pytest.mark.parametrize("target", ["serve", "test"])
def test_the_two_commands_are_targets_of_the_makefile(target: str) -> None:
    assert f"```\nmake {target}\n```" in README
    assert f"\n{target}: " in (ROOT / "Makefile").read_text(encoding="utf-8")
