"""The only place that knows what status and envelope an error has, in each API's dialect.

Called by the border of `app.py` for errors before the response has started, and by stream renderers after.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

import orjson

from tgi_asgi import errors
from tgi_asgi.errors import TgiError
from tgi_asgi.http.asgi import Header


class Dialect(enum.Enum):
    """Whose manners an answer has: TGI's native routes', OpenAI's, or Anthropic's."""

    NATIVE = "native"
    OPENAI = "openai"
    ANTHROPIC = "anthropic"


@dataclass(frozen=True, slots=True)
class _Rule:
    native_status: int
    native_prefix: str
    openai_status: int
    openai_type: str
    openai_code: str | None = None


_RULES: dict[type[TgiError], _Rule] = {
    errors.InvalidRequest: _Rule(422, "Input validation error: ", 400, "invalid_request_error"),
    errors.TemplateError: _Rule(422, "Template error: ", 400, "invalid_request_error"),
    errors.ToolError: _Rule(422, "Tool error: ", 400, "invalid_request_error"),
    errors.UnsupportedSuffix: _Rule(422, "", 400, "invalid_request_error"),
    errors.TooManyPrompts: _Rule(422, "", 400, "invalid_request_error"),
    errors.Unauthorized: _Rule(401, "", 401, "authentication_error", "invalid_api_key"),
    errors.Forbidden: _Rule(403, "", 403, "permission_error"),
    errors.NotFound: _Rule(404, "", 404, "invalid_request_error", "unknown_url"),
    errors.MethodNotAllowed: _Rule(405, "", 405, "invalid_request_error", "method_not_allowed"),
    errors.PayloadTooLarge: _Rule(413, "", 413, "invalid_request_error", "request_too_large"),
    errors.RequestTimeout: _Rule(408, "", 400, "invalid_request_error", "request_timeout"),
    errors.UnsupportedMediaType: _Rule(415, "", 415, "invalid_request_error"),
    errors.Overloaded: _Rule(429, "", 429, "rate_limit_error", "rate_limit_exceeded"),
    errors.Unavailable: _Rule(503, "", 503, "server_error", "overloaded"),
    errors.GenerationFailed: _Rule(
        424, "Request failed during generation: ", 500, "server_error", "generation_failed"
    ),
    errors.IncompleteGeneration: _Rule(500, "", 500, "server_error", "incomplete_generation"),
    errors.ModelLoadError: _Rule(503, "", 503, "server_error", "model_load_failed"),
}
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
_INTERNAL = _Rule(500, "", 500, "server_error", "internal_error")
_INTERNAL_MESSAGE = "Internal server error"


def status_of(error: BaseException, dialect: Dialect) -> int:
    """Return the HTTP status of an error; anything that is not ours is a 500."""
    if dialect is not Dialect.NATIVE:
        return _rule(error).openai_status
    if isinstance(error, errors.InvalidRequest) and error.is_syntax:
        return 400
    return _rule(error).native_status


def envelope(error: BaseException, dialect: Dialect) -> dict[str, Any]:
    """Return the JSON object that tells a client of an error; foreign exceptions tell it nothing."""
    rule = _rule(error)
    message = error.message if isinstance(error, TgiError) else _INTERNAL_MESSAGE
    if dialect is Dialect.NATIVE:
        is_syntax = isinstance(error, errors.InvalidRequest) and error.is_syntax
        kind = error.error_type if isinstance(error, TgiError) else TgiError.error_type
        return {"error": message if is_syntax else rule.native_prefix + message, "error_type": kind}
    if dialect is Dialect.ANTHROPIC:
        other = "api_error" if rule.openai_status >= 500 else "invalid_request_error"
        kind = _ANTHROPIC_TYPES.get(rule.openai_status, other)
        described: dict[str, Any] = {"type": kind, "message": message}
        if isinstance(error, errors.InvalidRequest) and error.code == "thread_unsupported_request":
            described["details"] = {"error_code": error.code, "unsupported": [error.param]}
        return {"type": "error", "error": described}
    return {
        "error": {
            "message": message,
            "type": rule.openai_type,
            "param": getattr(error, "param", None),
            "code": getattr(error, "code", None) or rule.openai_code,
        }
    }


def headers_of(error: BaseException) -> list[Header]:
    """Return the headers that an error adds to its response."""
    match error:
        case errors.Overloaded() | errors.Unavailable():
            # SDKs give up at once on more than 120 seconds, and hammer without any.
            return [(b"retry-after", b"%d" % min(max(error.retry_after_s, 1), 120))]
        case errors.Unauthorized():
            return [(b"www-authenticate", b"Bearer")]
        case errors.MethodNotAllowed():
            return [(b"allow", ", ".join(error.allow).encode("ascii"))]
        case errors.PayloadTooLarge() | errors.RequestTimeout():
            return [(b"connection", b"close")]
    return []


def error_event(error: BaseException, dialect: Dialect) -> bytes:
    """Return an error as one event of a stream that has already begun."""
    return b"data: " + orjson.dumps(envelope(error, dialect)) + b"\n\n"


def _rule(error: BaseException) -> _Rule:
    for kind in type(error).__mro__:
        rule = _RULES.get(kind)
        if rule is not None:
            return rule
    return _INTERNAL
