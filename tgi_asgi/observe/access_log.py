"""One log line per request: what it was, its result, and its timing. An observer of `app.py`."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from tgi_asgi.errors import GenerationFailed, IncompleteGeneration, RequestAborted, TemplateError
from tgi_asgi.observe.logs import quoted
from tgi_asgi.observe.summary import RequestSummary
from tgi_asgi.types import EngineState

if TYPE_CHECKING:
    from tgi_asgi.api.exchange import Exchange

logger = logging.getLogger(__name__)

_FAILURES = (GenerationFailed, IncompleteGeneration)  # of a stream, too, which began with a 200
CLIENT_CLOSED = 499  # nginx's status for a client that disconnected before an answer


def log_access(exchange: Exchange, summary: RequestSummary) -> None:
    """Log a finished request; its numbers are extra fields of the record, for JSON logs."""
    status, route = exchange.status or CLIENT_CLOSED, exchange.route
    # Probes and scrapes come every few seconds and are logged at INFO only if they fail. A server that is
    # still loading its model has not failed.
    is_well = status < 400 or exchange.context.state is EngineState.LOADING
    is_quiet = is_well and exchange.method != "POST" and route is not None and route.is_quiet
    # 503 only says that the server is about to serve, or to end.
    has_failed = isinstance(exchange.error, _FAILURES) or (status >= 500 and status != 503)
    has_failed &= not isinstance(exchange.error, RequestAborted)  # the administrator ended it
    level = logging.DEBUG if is_quiet else logging.ERROR if has_failed else logging.INFO
    if logger.isEnabledFor(level):
        left = " (client left)" if exchange.is_disconnected and status != CLIENT_CLOSED else ""
        message = f"{exchange.method} {quoted(exchange.path)} {status}{left}"
        logger.log(level, "%s", message, extra=_fields(exchange, summary, status))


def _fields(exchange: Exchange, summary: RequestSummary, status: int) -> dict[str, object]:
    client = exchange.scope.get("client")
    fields: dict[str, object] = {
        "request_id": exchange.request_id,
        "client": client[0] if client else None,
        "status": status,
        "total_ms": _milliseconds(summary.total_s),
    }
    if exchange.channels:
        fields |= {
            "prompt_tokens": summary.prompt_tokens,
            "cached_tokens": summary.cached_tokens,
            "generated_tokens": summary.generated_tokens,
            "inference_ms": _milliseconds(summary.inference_s),
            **{f"{name}_ms": _milliseconds(end_s - begin_s) for name, begin_s, end_s in summary.phases},
            "finish": ",".join(summary.finishes),
        }
        if summary.first_token_s is not None:
            fields["first_token_ms"] = _milliseconds(summary.first_token_s)
    if exchange.tenant is not None:
        fields["tenant"] = exchange.tenant
    if exchange.error is not None:
        # A template's error may quote the messages, which must not be logged.
        quotes = isinstance(exchange.error, TemplateError)
        why = "no chat template, or it refused the messages" if quotes else str(exchange.error)[:500]
        fields["error"] = why
    return fields


def _milliseconds(seconds: float) -> float:
    return round(seconds * 1000, 1)
