"""The only place that maps an error to a status and envelope, in each API's dialect.

`app.py` uses it for errors before the response has started, stream renderers for later ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import orjson

from tgi_asgi import errors
from tgi_asgi.api.asgi import Header
from tgi_asgi.errors import Field, InvalidRequest, TgiError

Envelope = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Rule:
    """How an error appears to clients: TGI's status and prefix, OpenAI's status, type and code."""

    native_status: int
    native_prefix: str
    status: int
    type: str
    code: str | None = None


_REFUSED = "invalid_request_error"
RULES: dict[type[TgiError], Rule] = {
    errors.InvalidRequest: Rule(422, "Input validation error: ", 400, _REFUSED),
    errors.ContextExceeded: Rule(422, "Input validation error: ", 400, _REFUSED),
    errors.TemplateError: Rule(422, "Template error: ", 400, _REFUSED),
    errors.ToolError: Rule(422, "Tool error: ", 400, _REFUSED),
    errors.ModelNotSupported: Rule(400, "", 400, _REFUSED, "model_not_supported"),
    errors.UnsupportedSuffix: Rule(422, "", 400, _REFUSED),
    errors.TooManyPrompts: Rule(422, "", 400, _REFUSED),
    errors.ImageTooLarge: Rule(413, "", 413, _REFUSED, "request_too_large"),
    errors.ImageTimeout: Rule(408, "", 408, _REFUSED, "image_timeout"),
    errors.Unauthorized: Rule(401, "", 401, "authentication_error", "invalid_api_key"),
    errors.Forbidden: Rule(403, "", 403, "permission_error"),
    errors.NotFound: Rule(404, "", 404, _REFUSED, "unknown_url"),
    errors.UnknownModel: Rule(404, "", 404, _REFUSED, "model_not_found"),
    errors.UnknownAdapter: Rule(404, "", 404, _REFUSED, "adapter_not_found"),
    errors.MethodNotAllowed: Rule(405, "", 405, _REFUSED, "method_not_allowed"),
    # Codex goes on by HTTP at once if the status is 426; after any other, it tries again for seconds.
    errors.NoWebSockets: Rule(426, "", 426, _REFUSED, "websocket_not_supported"),
    errors.PayloadTooLarge: Rule(413, "", 413, _REFUSED, "request_too_large"),
    errors.RequestTimeout: Rule(408, "", 400, _REFUSED, "request_timeout"),
    errors.UnsupportedMediaType: Rule(415, "", 415, _REFUSED),
    errors.Overloaded: Rule(429, "", 429, "rate_limit_error", "rate_limit_exceeded"),
    errors.Unavailable: Rule(503, "", 503, "server_error", "overloaded"),
    errors.GenerationFailed: Rule(
        424, "Request failed during generation: ", 500, "server_error", "generation_failed"
    ),
    errors.IncompleteGeneration: Rule(500, "", 500, "server_error", "incomplete_generation"),
    errors.RequestAborted: Rule(500, "", 500, "server_error", "request_aborted"),
    errors.ModelLoadError: Rule(503, "", 503, "server_error", "model_load_failed"),
    errors.NotInFamily: Rule(503, "", 503, "server_error", "model_load_failed"),
}
_INTERNAL = Rule(500, "", 500, "server_error", "internal_error")
_INTERNAL_MESSAGE = "Internal server error"


def rule_of(error: BaseException) -> Rule:
    """Return how an error appears to clients; an exception that is not a TgiError is a 500."""
    return next((RULES[kind] for kind in type(error).__mro__ if kind in RULES), _INTERNAL)


def message_of(error: BaseException) -> str:
    """Return the message for the client; exceptions that are not a TgiError reveal nothing."""
    return error.message if isinstance(error, TgiError) else _INTERNAL_MESSAGE


@dataclass(frozen=True)
class Dialect:
    """The conventions of the API that a request uses.

    Attributes:
        status, envelope: Functions that return an error's status and body.
        names: The API's field names, by the names that `Call` uses.
        nests_tools: Whether a tool's fields are nested in its `function`.
        request_id_header: Header for the request id in addition to `x-request-id`, if clients expect one; the
            bodies of errors then have the id, too.
        client_header: Header that only its clients send, if there is one.
    """

    envelope: Callable[[BaseException], Envelope]
    status: Callable[[BaseException], int] = lambda error: rule_of(error).status
    names: Mapping[str, str] = field(default_factory=dict)
    nests_tools: bool = False
    is_json_only: bool = False  # whether a body must be declared as JSON
    request_id_header: bytes | None = None
    client_header: bytes | None = None

    @property
    def is_openai(self) -> bool:
        """Whether errors have OpenAI's envelope."""
        return self.envelope is _openai_envelope

    def with_tgi_errors(self) -> Dialect:
        """Return the same dialect with TGI's statuses and error envelope, in which the error is a text."""
        return replace(self, envelope=_native_envelope, status=_native_status)

    def body(self, error: BaseException, request_id: str) -> Envelope:
        """Return the body that tells of a request's error."""
        shown = self.envelope(error)
        return shown if self.request_id_header is None else {**shown, "request_id": request_id}

    def field_name(self, path: Field) -> str:
        """Return a field in the notation of the API's clients: `tools[2].function.name`."""
        first, *rest = path
        if first == "tools" and self.nests_tools and len(rest) > 1:
            rest.insert(1, "function")
        tail = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in rest)
        return self.names.get(str(first), str(first)) + tail

    def translate(self, error: BaseException) -> None:
        """Rewrite a refusal to use the field names that the client knows."""
        if isinstance(error, InvalidRequest):
            error.name_field(self.field_name)

    @contextmanager
    def refusing(self, where: str) -> Iterator[None]:
        """Prefix a refusal with the part of the call that it concerns, if that is not all of it."""
        try:
            yield
        except InvalidRequest as error:
            if where:
                self.translate(error)
                error.message = f"{where}: {error.message}"
            raise


def error_event(error: BaseException, dialect: Dialect) -> bytes:
    """Return an error as an event of a stream that has already begun."""
    return b"data: " + orjson.dumps(dialect.envelope(error)) + b"\n\n"


def headers_of(error: BaseException) -> list[Header]:
    """Return the headers that an error adds to its response."""
    match error:
        case errors.Overloaded() | errors.Unavailable():
            # SDKs give up at once above 120 seconds, and retry rapidly without the header.
            return [(b"retry-after", b"%d" % min(max(error.retry_after_s, 1), 120))]
        case errors.Unauthorized():
            return [(b"www-authenticate", b"Bearer")]
        case errors.MethodNotAllowed():
            return [(b"allow", ", ".join(error.allow).encode("ascii"))]
        case errors.NoWebSockets():
            # The handshake ends its connection, and a 426 must name a protocol.
            return [(b"upgrade", b"HTTP/1.1"), (b"connection", b"close, upgrade")]
        case errors.RequestAborted():
            return [(b"x-should-retry", b"false")]  # OpenAI's and Anthropic's SDKs check it before they retry
        case errors.PayloadTooLarge() | errors.RequestTimeout():
            return [(b"connection", b"close")]
    return []


def _native_status(error: BaseException) -> int:
    is_syntax = isinstance(error, InvalidRequest) and error.is_syntax
    return 400 if is_syntax else rule_of(error).native_status


def _native_envelope(error: BaseException) -> Envelope:
    is_syntax = isinstance(error, InvalidRequest) and error.is_syntax
    prefix = "" if is_syntax else rule_of(error).native_prefix
    kind = error.error_type if isinstance(error, TgiError) else TgiError.error_type
    return {"error": prefix + message_of(error), "error_type": kind}


def _openai_envelope(error: BaseException) -> Envelope:
    rule = rule_of(error)
    return {
        "error": {
            "message": message_of(error),
            "type": rule.type,
            "param": error.param if isinstance(error, TgiError) else None,
            "code": (error.code if isinstance(error, TgiError) else None) or rule.code,
        }
    }


def _tgi_chunk_envelope(error: BaseException) -> Envelope:
    message = _native_envelope(error)["error"]
    return {"error": {"message": message, "http_status_code": _native_status(error)}}


_NATIVE_NAMES = {
    "prompt": "inputs",
    "max_tokens": "parameters.max_new_tokens",
    "logprobs": "parameters.top_n_tokens",
}
NATIVE = Dialect(_native_envelope, _native_status, _NATIVE_NAMES, is_json_only=True)
# Events in the streams of TGI's own /v1. TGI's code was 422 whatever the error.
TGI_CHUNKS = Dialect(_tgi_chunk_envelope, _native_status, _NATIVE_NAMES)
OPENAI = Dialect(_openai_envelope, nests_tools=True)
CHAT = Dialect(_openai_envelope, names={"prompt": "messages", "logprobs": "top_logprobs"}, nests_tools=True)
