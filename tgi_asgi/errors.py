"""The exceptions of the whole project; `api/errors.py` alone maps them to statuses and envelopes.

TgiError
├── InvalidRequest          the request is wrong: `param` names the field
│   ├── ContextExceeded     prompt and answer do not fit into the context
│   ├── TemplateError       the chat template is absent, or refused the messages
│   ├── ToolError           tools or response_format cannot be honoured
│   ├── UnsupportedSuffix   a completion is to end before given text
│   └── TooManyPrompts      more prompts in a call than the server takes
├── Unauthorized            no key, or a wrong one
├── Forbidden               a feature that the operator has not enabled
├── NotFound                no such path
│   └── UnknownModel        a model that is not served
├── MethodNotAllowed        the path exists, the method does not
├── PayloadTooLarge         the body is over the limit
├── RequestTimeout          the body did not arrive in time
├── UnsupportedMediaType    not JSON, or an encoding that is not read
├── Overloaded              no permit is free; try again after `retry_after_s`
├── Unavailable             loading, draining or dead; try again after `retry_after_s`
├── GenerationFailed        the engine failed on this request
├── IncompleteGeneration    the engine stopped before this request's end
└── ModelLoadError          the model cannot be found, read or run (start-up only)
"""

from __future__ import annotations

from collections.abc import Callable

# A field by its place in a request, in the names that all APIs share: ("tools", 2, "name").
Field = tuple[str | int, ...]


class TgiError(Exception):
    """Base of every error that this project raises on purpose.

    `error_type` is the machine name that TGI's envelope carries; `str(error)` is the sentence for people.
    `failure` is the label under which metrics count it: what a client is told to mend is "validation" there,
    as in TGI, whatever its status.
    """

    error_type = "internal"
    failure = "validation"

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    def __str__(self) -> str:
        return self.message


class InvalidRequest(TgiError):
    """Raised when a request cannot be served as written; nothing was scheduled.

    Args:
        message: what was given, what is allowed and where.
        param: dotted path of the field at fault (`messages[2].content[0].type`), or None.
        code: OpenAI's machine name for the case (`context_length_exceeded`), or None.
        is_syntax: the body is not JSON at all (400 on the native routes, where the rest is 422).
        field: in the place of `param`, by code that serves several APIs: `spell` then puts what the client's
            API calls it where the message has `{field}`.
    """

    error_type = "validation"

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        is_syntax: bool = False,
        field: Field | None = None,
    ) -> None:
        super().__init__(message)
        self.param = param
        self.code = code
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


class TemplateError(InvalidRequest):
    """Raised when the model has no chat template, or the template raises on these messages."""

    error_type = "template_error"
    failure = "template"


class ToolError(InvalidRequest):
    """Raised when tools, tool_choice or response_format cannot be honoured together or at all."""

    error_type = "tool_error"


class UnsupportedSuffix(InvalidRequest):
    """Raised for a completion with a `suffix`; TGI has a name of its own for it."""

    error_type = "suffix not supported"


class TooManyPrompts(InvalidRequest):
    """Raised for a completion with more prompts than a call may have; likewise."""

    error_type = "batch size exceeded"


class Unauthorized(TgiError):
    """Raised when an API key is configured and the request carries none, or another."""

    error_type = "unauthorized"


class Forbidden(TgiError):
    """Raised when a request uses a feature that the operator has not enabled."""

    error_type = "forbidden"


class NotFound(TgiError):
    """Raised for an unknown path, or the id of nothing that there is."""

    error_type = "not_found"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class UnknownModel(NotFound):
    """Raised for a model that is not served; `name` is what was asked for."""

    def __init__(self, name: str) -> None:
        super().__init__(f"The model '{name}' does not exist.", param="model", code="model_not_found")
        self.name = name


class MethodNotAllowed(TgiError):
    """Raised when the path exists but not for this method; `allow` lists those that do."""

    error_type = "method_not_allowed"

    def __init__(self, message: str, *, allow: tuple[str, ...]) -> None:
        super().__init__(message)
        self.allow = allow


class PayloadTooLarge(TgiError):
    """Raised when a body is larger than `payload_limit` bytes."""

    error_type = "validation"


class RequestTimeout(TgiError):
    """Raised when a client takes too long to send its body."""

    error_type = "validation"


class UnsupportedMediaType(TgiError):
    """Raised for a content type or content encoding that a route does not read."""

    error_type = "validation"


class Overloaded(TgiError):
    """Raised when all permits are taken; the client may try again after `retry_after_s` seconds."""

    error_type = "overloaded"
    failure = "overloaded"

    def __init__(self, message: str = "Model is overloaded", *, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Unavailable(TgiError):
    """Raised while the model loads, the server drains, or the engine is dead."""

    error_type = "unavailable"
    failure = "unavailable"

    def __init__(self, message: str, *, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class GenerationFailed(TgiError):
    """Raised when the engine failed while it worked on this request."""

    error_type = "generation"
    failure = "generation"


class IncompleteGeneration(TgiError):
    """Raised when generation ended without a finish reason (shutdown in the middle of a request)."""

    error_type = "incomplete_generation"
    failure = "incomplete"


class ModelLoadError(TgiError):
    """Raised at start-up when the model cannot be found, read or run; the message says what to change."""

    error_type = "model_load"
    failure = "generation"
