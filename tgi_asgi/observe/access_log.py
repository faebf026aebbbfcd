"""One log line per request: what it was, its result, and its timing. An observer of `app.py`."""

from __future__ import annotations

import logging

from tgi_asgi.errors import GenerationFailed, IncompleteGeneration, RequestAborted, TemplateError
from tgi_asgi.observe.logs import quoted
from tgi_asgi.observe.summary import ObservedRequest, RequestSummary
from tgi_asgi.types import EngineState

logger = logging.getLogger(__name__)

_FAILURES = (GenerationFailed, IncompleteGeneration)  # of a stream, too, which began with a 200
CLIENT_CLOSED = 499  # nginx's status for a client that disconnected before an answer


def log_access(request: ObservedRequest, summary: RequestSummary) -> None:
    """Log a finished request; its numbers are extra fields of the record, for JSON logs."""
    status, route = request.status or CLIENT_CLOSED, request.route
    # Probes and scrapes come every few seconds and are logged at INFO only if they fail. A server that is
    # still loading its model has not failed.
    is_well = status < 400 or request.context.state is EngineState.LOADING
    is_quiet = is_well and request.method != "POST" and route is not None and route.is_quiet
    # 503 only says that the server is about to serve, or to end.
    has_failed = isinstance(request.error, _FAILURES) or (status >= 500 and status != 503)
    has_failed &= not isinstance(request.error, RequestAborted)  # the administrator ended it
    level = logging.DEBUG if is_quiet else logging.ERROR if has_failed else logging.INFO
    if logger.isEnabledFor(level):
        left = " (client left)" if request.is_disconnected and status != CLIENT_CLOSED else ""
        message = f"{request.method} {quoted(request.path)} {status}{left}"
        logger.log(level, "%s", message, extra=_fields(request, summary, status))


def _fields(request: ObservedRequest, summary: RequestSummary, status: int) -> dict[str, object]:
    client = request.scope.get("client")
    fields: dict[str, object] = {
        "request_id": request.request_id,
        "client": client[0] if client else None,
        "status": status,
        "total_ms": _milliseconds(summary.total_s),
    }
    if request.channels:
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
    if request.tenant is not None:
        fields["tenant"] = request.tenant
    if request.error is not None:
        # A template's error may quote the messages, which must not be logged.
        quotes = isinstance(request.error, TemplateError)
        why = "no chat template, or it refused the messages" if quotes else str(request.error)[:500]
        fields["error"] = why
    return fields


def _milliseconds(seconds: float) -> float:
    return round(seconds * 1000, 1)
