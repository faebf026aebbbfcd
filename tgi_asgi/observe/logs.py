"""Log output: one line per record on stderr, as text or as JSON (`--json-output`).

A record's extra fields (`logger.info("...", extra={"status": 200})`) become fields of the JSON object; in
text they follow the message as `status=200`. Some logged text comes from clients. It is escaped so that it
cannot imitate a field or a line.
"""

from __future__ import annotations

import json
import logging
import sys
import textwrap
import time

from tgi_asgi.settings import Settings

_OWN = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}
_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warn": logging.WARNING, "error": logging.ERROR}


def configure(settings: Settings) -> None:
    """Log the server's records from the configured level, and other libraries' from WARNING, to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter() if settings.json_output else _TextFormatter())
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)  # all libraries, the HTTP server included
    set_level(settings.log_level)


def set_level(level: str) -> None:
    """Set the level of the server's own records: debug, info, warn or error."""
    logging.getLogger("tgi_asgi").setLevel(_LEVELS[level])


def _extra(record: logging.LogRecord) -> dict[str, object]:
    return {name: value for name, value in record.__dict__.items() if name not in _OWN}


def _timestamp(record: logging.LogRecord) -> str:
    seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    return f"{seconds}.{int(record.msecs):03d}Z"


def quoted(text: str) -> str:
    """Return a single plain word as is, anything else as a JSON string: one line with a visible end."""
    if text and text.isprintable() and not any(character in text for character in ' ="'):
        return text
    return json.dumps(text, ensure_ascii=not text.isprintable())


class _TextFormatter(logging.Formatter):
    """`2026-01-31T12:00:00.000Z INFO message name=value`, then the indented traceback, if any."""

    def format(self, record: logging.LogRecord) -> str:
        fields = "".join(f" {name}={quoted(str(value))}" for name, value in _extra(record).items())
        message = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in record.getMessage())
        line = f"{_timestamp(record)} {record.levelname} {message}{fields}"
        if not record.exc_info:  # asyncio's records have False
            return line
        return f"{line}\n{textwrap.indent(self.formatException(record.exc_info), '  ')}"


class _JsonFormatter(logging.Formatter):
    """One JSON object per line: timestamp, level, target, message, then the record's extra fields."""

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, object] = {
            "timestamp": _timestamp(record),
            "level": record.levelname,
            "target": record.name,
            "message": record.getMessage(),
            **_extra(record),
        }
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields, default=str)  # ASCII, and thus JSON in every encoding of stderr
