"""The exceptions of the whole project; `api/errors.py` alone maps them to statuses and envelopes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# A field by its place in a request, in the names that all APIs share: ("tools", 2, "name").
Field = tuple[str | int, ...]


class TgiError(Exception):
    """Base of every error that this project raises on purpose; `str(error)` is the sentence for people.

    A class says its `error_type`, the machine name in TGI's envelope, and `failure`, the label under which
    metrics count it: what a client is told to mend is "validation" there, as in TGI, whatever its status.

    Args:
        message: what was given, what is allowed and where.
        param: dotted path of the field at fault (`messages[2].content[0].type`), or None.
        code: OpenAI's machine name for the case (`context_length_exceeded`), or None for the class's own.
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
        """Let errors go from process to process, whatever their constructors take."""
        return _restored, (type(self), self.message, self.__dict__)


def _restored(kind: type[TgiError], message: str, state: dict[str, Any]) -> TgiError:
    error = kind.__new__(kind, message)
    error.__dict__.update(state)
    error.args = (message,)
    return error


class InvalidRequest(TgiError, error_type="validation"):
    """Raised when a request cannot be served as written; nothing was scheduled.

    Args:
        is_syntax: the body is not JSON at all (400 on the native routes, where the rest is 422).
        field: in the place of `param`, by code that serves several APIs: `spell` then puts what the client's
            API calls it where the message has `{field}`.
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

    def spell(self, name_of: Callable[[Field], str]) -> None:
        """Name the field as the client's API does."""
        if self.field is not None:
            self.param, self.field = name_of(self.field), None
            self.message = self.message.replace("{field}", self.param)


class ContextExceeded(InvalidRequest):
    """Raised when a prompt, or what is asked for behind it, does not fit into the model's context.

    `num_tokens` are given, `most` allowed.
    """

    def __init__(self, message: str, num_tokens: int, most: int) -> None:
        super().__init__(message, code="context_length_exceeded", field=("prompt",))
        self.num_tokens = num_tokens
        self.most = most


class TemplateError(InvalidRequest, error_type="template_error", failure="template"):
    """Raised when the model has no chat template, or the template raises on these messages."""


class ToolError(InvalidRequest, error_type="tool_error"):
    """Raised when tools, tool_choice or response_format cannot be honoured together or at all."""


class ModelNotSupported(InvalidRequest, error_type="model_not_supported"):
    """Raised for what the served model cannot do: to embed, to score, or to generate."""


class UnsupportedSuffix(InvalidRequest, error_type="suffix not supported"):
    """Raised for a completion with a `suffix`; TGI has a name of its own for it."""


class TooManyPrompts(InvalidRequest, error_type="batch size exceeded"):
    """Raised for a completion with more prompts than a call may have; likewise."""


class ImageTooLarge(InvalidRequest):
    """Raised when the pictures that a request has fetched have more bytes than a body may have."""


class ImageTimeout(InvalidRequest):
    """Raised when the pictures of a request could not be fetched in time."""


class Unauthorized(TgiError, error_type="unauthorized"):
    """Raised when an API key is configured and the request carries none, or another."""


class Forbidden(TgiError, error_type="forbidden"):
    """Raised when a request uses a feature that the operator has not enabled."""


class NotFound(TgiError, error_type="not_found"):
    """Raised for an unknown path, or the id of nothing that there is."""


class UnknownModel(NotFound):
    """Raised for a model that is not served; `name` is what was asked for."""

    def __init__(self, name: str) -> None:
        super().__init__(f"The model '{name}' does not exist.", param="model", code="model_not_found")
        self.name = name


class UnknownAdapter(NotFound):
    """Raised for an adapter that is not served; `name` is what was asked for, in the field `param`."""

    def __init__(self, name: str, *, param: str) -> None:
        super().__init__(f"The adapter '{name}' does not exist.", param=param, code="adapter_not_found")
        self.name = name


class MethodNotAllowed(TgiError, error_type="method_not_allowed"):
    """Raised when the path exists but not for this method; `allow` lists those that do."""

    def __init__(self, message: str, *, allow: tuple[str, ...]) -> None:
        super().__init__(message)
        self.allow = allow


class PayloadTooLarge(TgiError, error_type="validation"):
    """Raised when a body is larger than `payload_limit` bytes."""


class RequestTimeout(TgiError, error_type="validation"):
    """Raised when a client takes too long to send its body."""


class UnsupportedMediaType(TgiError, error_type="validation"):
    """Raised for a content type or content encoding that a route does not read."""


class Overloaded(TgiError, error_type="overloaded", failure="overloaded"):
    """Raised when all permits are taken; the client may try again after `retry_after_s` seconds."""

    def __init__(self, message: str = "Model is overloaded", *, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Unavailable(TgiError, error_type="unavailable", failure="unavailable"):
    """Raised while the model loads, the server drains, or the engine is dead."""

    def __init__(self, message: str, *, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class GenerationFailed(TgiError, error_type="generation", failure="generation"):
    """Raised when the engine failed while it worked on this request."""


class IncompleteGeneration(TgiError, error_type="incomplete_generation", failure="incomplete"):
    """Raised when generation ended without a finish reason (shutdown in the middle of a request)."""


class RequestAborted(IncompleteGeneration):
    """Raised when an operator has ended the request; clients should not send it again."""


class ModelLoadError(TgiError, error_type="model_load", failure="generation"):
    """Raised at start-up when the model cannot be found, read or run; the message says what to change."""


class NotInFamily(ModelLoadError):
    """Raised where a family of ours does not compute what a configuration says; `transformers` may."""
