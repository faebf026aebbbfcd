"""Where log lines go: one line a record on stderr, as text or as JSON (`--json-output`).

A record's extra fields (`logger.info("...", extra={"status": 200})`) are fields of the JSON object, and
follow the message as `status=200` in text.
"""

from __future__ import annotations

import json
import logging
import sys
import time

from tgi_asgi.settings import Settings

_OWN = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}
_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warn": logging.WARNING, "error": logging.ERROR}


def configure(settings: Settings) -> None:
    """Send our records to stderr from the level that was asked for, and other libraries' warnings."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter() if settings.json_output else _TextFormatter())
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)  # libraries, the server's among them
    logging.getLogger("tgi_asgi").setLevel(_LEVELS[settings.log_level])


def _extra(record: logging.LogRecord) -> dict[str, object]:
    return {name: value for name, value in record.__dict__.items() if name not in _OWN}


def _timestamp(record: logging.LogRecord) -> str:
    seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    return f"{seconds}.{int(record.msecs):03d}Z"


class _TextFormatter(logging.Formatter):
    """`2026-01-31T12:00:00.000Z INFO message name=value`, then the traceback."""

    def format(self, record: logging.LogRecord) -> str:
        fields = "".join(f" {name}={value}" for name, value in _extra(record).items())
        line = f"{_timestamp(record)} {record.levelname} {record.getMessage()}{fields}"
        return line if record.exc_info is None else f"{line}\n{self.formatException(record.exc_info)}"


class _JsonFormatter(logging.Formatter):
    """One JSON object a line: timestamp, level, target, message, then the record's own fields."""

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, object] = {
            "timestamp": _timestamp(record),
            "level": record.levelname,
            "target": record.name,
            "message": record.getMessage(),
            **_extra(record),
        }
        if record.exc_info is not None:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields, ensure_ascii=False, default=str)
