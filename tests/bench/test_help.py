"""That each program of bench/ says what it does, and does nothing else, if it is asked for help."""

from __future__ import annotations

import ast
import runpy
import sys
from pathlib import Path

import pytest

from bench.report import RESULTS

# Another interpreter runs it, which has llama-cpp-python.
APART = "llama_logits"
PROGRAMS = sorted(
    path.stem
    for path in RESULTS.parent.glob("*.py")
    if '__name__ == "__main__"' in path.read_text(encoding="utf-8") and path.stem not in ("__main__", APART)
)


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("name", PROGRAMS)
def test_help_is_the_docstring(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    monkeypatch.setattr(Path, "write_text", lambda path, *_, **__: pytest.fail(f"{path} is written"))
    with pytest.raises(SystemExit) as end:
        runpy.run_module(f"bench.{name}", run_name="__main__")
    assert end.value.code in (None, 0)
    text = ast.get_docstring(ast.parse((RESULTS.parent / f"{name}.py").read_text(encoding="utf-8")))
    assert text is not None
    assert text in capsys.readouterr().out
