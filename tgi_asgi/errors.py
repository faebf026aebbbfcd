"""The exceptions of the whole project; only `api/errors.py` maps them to statuses and envelopes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# Path of a field in a request, in names that all APIs share: ("tools", 2, "name").
Field = tuple[str | int, ...]

_MAX_SHOWN = 200  # characters of a client's text in a message


class TgiError(Exception):
    """Base of every error that the project raises on purpose; `str(error)` is the message for people.

    Each class sets `error_type`, the machine-readable name in TGI's envelope, and `failure`, the label under
    which metrics count it. As in TGI, errors that the client can fix count as "validation", whatever their
    status.

    Args:
        message: What was given, what is allowed and where.
        param: Dotted path of the offending field (`messages[2].content[0].type`), or None.
        code: OpenAI's machine-readable name of the case (`context_length_exceeded`), or None for the class's
            own.
    """

    error_type = "internal"
    failure = "validation"

    def __init_subclass__(cls, error_type: str | None = None, failure: str | None = None) -> None:
        cls.error_type = error_type or cls.error_type
        cls.failure = failure or cls.failure

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[Any, ...]:
        """Make errors picklable across processes, whatever arguments their constructors take."""
        return _restored, (type(self), self.message, self.__dict__)


def _restored(kind: type[TgiError], message: str, state: dict[str, Any]) -> TgiError:
    error = kind.__new__(kind, message)
    error.__dict__.update(state)
    error.args = (message,)
    return error


class InvalidRequest(TgiError, error_type="validation"):
    """Raised when a request cannot be served as written: usually before anything is computed for it.

    Some faults show only while it runs: images that take too much memory once decoded, a grammar that cannot
    go on, an answer that is too large to keep until it is sent.

    Args:
        is_syntax: Whether the body is not JSON at all (400 on the native routes, where other cases are 422).
        field: Path of the field, given instead of `param` by code that serves several APIs. `name_field` then
            replaces `{field}` in the message with the client API's name for it.
    """

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        is_syntax: bool = False,
        field: Field | None = None,
    ) -> None:
        super().__init__(message, param=param, code=code)
        self.is_syntax = is_syntax
        self.field = field

    def name_field(self, name_of: Callable[[Field], str]) -> None:
        """Name the field as the client's API does, in `param` and in the message."""
        if self.field is not None:
            self.param, self.field = name_of(self.field), None
            self.message = self.message.replace("{field}", self.param)


class ContextExceeded(InvalidRequest):
    """Raised when a prompt, or a prompt with the tokens requested after it, exceeds the model's context.

    The request has `num_tokens` tokens; `max_tokens` are allowed.
    """

    def __init__(self, message: str, num_tokens: int, max_tokens: int) -> None:
        super().__init__(message, code="context_length_exceeded", field=("prompt",))
        self.num_tokens = num_tokens
        self.max_tokens = max_tokens


class TemplateError(InvalidRequest, error_type="template_error", failure="template"):
    """Raised when the model has no chat template, or the template raises on these messages."""


class ToolError(InvalidRequest, error_type="tool_error"):
    """Raised when tools, tool_choice or response_format cannot be honoured together or at all."""


class ModelNotSupported(InvalidRequest, error_type="model_not_supported"):
    """Raised when the served model cannot do what is asked: embed, score or generate."""


class UnsupportedSuffix(InvalidRequest, error_type="suffix not supported"):
    """Raised for a completion with a `suffix`; TGI has its own error type for it."""


class TooManyPrompts(InvalidRequest, error_type="batch size exceeded"):
    """Raised for a completion with more prompts than a call may have; TGI has its own error type for it."""


class ImageTooLarge(InvalidRequest):
    """Raised when the images fetched for a request have more bytes than a body may have."""


class ImageTimeout(InvalidRequest):
    """Raised when the images of a request could not be fetched in time."""


class Unauthorized(TgiError, error_type="unauthorized"):
    """Raised when an API key is configured and the request has none or a wrong one."""


class Forbidden(TgiError, error_type="forbidden"):
    """Raised when a request uses a feature that the administrator has not enabled."""


class NotFound(TgiError, error_type="not_found"):
    """Raised for an unknown path or an unknown id."""


class UnknownModel(NotFound):
    """Raised when a requested model is not served; `name` is the requested name."""

    def __init__(self, name: str) -> None:
        message = f"The model '{name[:_MAX_SHOWN]}' does not exist."
        super().__init__(message, param="model", code="model_not_found")
        self.name = name


class UnknownAdapter(NotFound):
    """Raised when a requested adapter is not served; `name` is the requested name, from the field `param`."""

    def __init__(self, name: str, *, param: str) -> None:
        message = f"The adapter '{name[:_MAX_SHOWN]}' does not exist."
        super().__init__(message, param=param, code="adapter_not_found")
        self.name = name


class MethodNotAllowed(TgiError, error_type="method_not_allowed"):
    """Raised when the path exists but not for this method; `allow` lists the allowed methods."""

    def __init__(self, message: str, *, allow: tuple[str, ...]) -> None:
        super().__init__(message)
        self.allow = allow


class NoWebSockets(TgiError, error_type="method_not_allowed"):
    """Raised for a WebSocket: all APIs of this server are plain HTTP."""


class PayloadTooLarge(TgiError, error_type="validation"):
    """Raised when a body is larger than `payload_limit` bytes."""


class RequestTimeout(TgiError, error_type="validation"):
    """Raised when a client takes too long to send its body."""


class UnsupportedMediaType(TgiError, error_type="validation"):
    """Raised for a content type or content encoding that a route does not accept."""


class Overloaded(TgiError, error_type="overloaded", failure="overloaded"):
    """Raised when requests together reach a limit; the client may retry after `retry_after_s` seconds.

    Such limits are the permits, an API key's requests per minute, the bytes of bodies, images and unsent
    answers, and the adapters in memory. It is also raised when a prompt has waited for too long, or another
    API key's request takes its permit.
    """

    def __init__(self, message: str = "Model is overloaded", *, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Unavailable(TgiError, error_type="unavailable", failure="unavailable"):
    """Raised while the model or a named adapter loads, while the server drains, or when the engine is dead.

    In a cluster, also when no replica can be reached.
    """

    def __init__(self, message: str, *, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class GenerationFailed(TgiError, error_type="generation", failure="generation"):
    """Raised when the engine fails while processing this request."""


class IncompleteGeneration(TgiError, error_type="incomplete_generation", failure="incomplete"):
    """Raised when generation ended without a finish reason (shutdown in the middle of a request)."""


class RequestAborted(IncompleteGeneration):
    """Raised when an administrator has aborted the request; clients should not send it again."""


class ModelLoadError(TgiError, error_type="model_load", failure="generation"):
    """Raised at start-up when the model cannot be found, read or run; the message says what to change."""


class NotInFamily(ModelLoadError):
    """Raised when a native family does not implement what a configuration says; `transformers` may."""


def check(holds: bool, message: str) -> None:
    """Raise `ModelLoadError` unless a condition holds."""
    if not holds:
        raise ModelLoadError(message)
