"""Log lines: text and JSON, extra fields, tracebacks, levels."""

from __future__ import annotations

import io
import json
import logging

import pytest

from tgi_asgi.observe import logs
from tgi_asgi.settings import Settings

pytestmark = pytest.mark.usefixtures("restored_loggers")


def test_json_lines_carry_the_fields_of_the_record(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(Settings(json_output=True))
    logging.getLogger("tgi_asgi.x").info("GET %s", "/é\n", extra={"status": 200, "error": ValueError("no")})
    (line,) = capsys.readouterr().err.splitlines()
    record = json.loads(line)
    assert record.pop("timestamp").endswith("Z")
    assert record == {
        "level": "INFO", "target": "tgi_asgi.x", "message": "GET /é\n", "status": 200, "error": "no",
    }  # fmt: skip


def test_an_exception_is_one_json_line(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(Settings(json_output=True))
    try:
        raise ValueError("inner")
    except ValueError:
        logging.getLogger("tgi_asgi").exception("failed")
    (line,) = capsys.readouterr().err.splitlines()
    assert "ValueError: inner" in json.loads(line)["exception"]


@pytest.mark.parametrize("is_json", [True, False])
def test_a_record_may_say_that_there_is_no_exception(
    capsys: pytest.CaptureFixture[str], is_json: bool
) -> None:
    logs.configure(Settings(json_output=is_json))
    # As asyncio reports a task that was destroyed while it was pending.
    logging.getLogger("asyncio").error("Task was destroyed", exc_info=False)
    (line,) = capsys.readouterr().err.splitlines()
    assert "Task was destroyed" in line


def test_json_lines_are_json_in_every_encoding_of_the_output(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    latin_1 = io.TextIOWrapper(written, "latin-1", "backslashreplace", write_through=True)
    monkeypatch.setattr("sys.stderr", latin_1)
    logs.configure(Settings(json_output=True))
    logging.getLogger("tgi_asgi").info("é \U0001f600 \ud800")
    assert json.loads(written.getvalue())["message"] == "é \U0001f600 \ud800"


def test_text_lines_put_fields_behind_the_message(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(Settings())
    logging.getLogger("tgi_asgi").warning("slow", extra={"seconds": 2})
    assert capsys.readouterr().err.endswith("Z WARNING slow seconds=2\n")


@pytest.mark.parametrize(
    ("value", "written"),
    [
        ("req-7", "req-7"),
        ("clé:1\\", "clé:1\\"),
        ("a status=200", '"a status=200"'),
        ("status=200", '"status=200"'),
        ('"', r'"\""'),
        ("a\nb", r'"a\nb"'),
        ("a\u2028b\x1b[1m\u00a0é", r'"a\u2028b\u001b[1m\u00a0\u00e9"'),
        ("clé 1", '"clé 1"'),
        ("", '""'),
        (None, "None"),
    ],
)
def test_no_value_looks_like_another_field(
    capsys: pytest.CaptureFixture[str], value: str | None, written: str
) -> None:
    logs.configure(Settings())
    logging.getLogger("tgi_asgi").warning("x", extra={"id": value, "status": 429})
    assert capsys.readouterr().err.endswith(f"Z WARNING x id={written} status=429\n")


def test_no_text_looks_like_another_line(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(Settings())
    forged = "\n2026-01-31T12:00:00.000Z INFO GET / 200\u2028\x85"
    try:
        raise ValueError(forged)
    except ValueError:
        logging.getLogger("tgi_asgi").exception("é %s failed", forged)
    first, *traceback = capsys.readouterr().err.splitlines()
    assert first.endswith(r"é \n2026-01-31T12:00:00.000Z INFO GET / 200\u2028\x85 failed")
    assert len(traceback) > 3
    assert all(line.startswith("  ") for line in traceback if line)


def test_levels_hold_for_us_and_libraries_only_warn(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(Settings(log_level="error"))
    logging.getLogger("tgi_asgi").warning("hidden")
    logs.configure(Settings(log_level="debug"))
    logging.getLogger("tgi_asgi").debug("shown")
    logging.getLogger("hypercorn.error").info("hidden as well")
    assert [line.split()[-1] for line in capsys.readouterr().err.splitlines()] == ["shown"]
