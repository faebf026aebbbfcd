"""Every error class has a status and an envelope in both dialects."""

from __future__ import annotations

import inspect
import json
from typing import Any

import msgspec
import pytest

from tgi_asgi import errors
from tgi_asgi.api.anthropic.render import ANTHROPIC
from tgi_asgi.api.errors import NATIVE, OPENAI, RULES, error_event, headers_of
from tgi_asgi.api.parse import decode_json


def every_class() -> list[type[errors.TgiError]]:
    return [
        kind
        for _, kind in inspect.getmembers(errors, inspect.isclass)
        if issubclass(kind, errors.TgiError) and kind is not errors.TgiError
    ]


def make(kind: type[errors.TgiError]) -> errors.TgiError:
    if kind is errors.ContextExceeded:
        return errors.ContextExceeded("why", 10, 5)
    if kind is errors.UnknownAdapter:
        return errors.UnknownAdapter("why", param="model")
    return kind("why", allow=("GET",)) if kind is errors.MethodNotAllowed else kind("why")


@pytest.mark.parametrize("kind", every_class())
def test_each_class_is_mapped(kind: type[errors.TgiError]) -> None:
    assert kind in RULES
    error = make(kind)
    openai = OPENAI.envelope(error)
    assert list(openai["error"]) == ["message", "type", "param", "code"]
    assert openai["error"]["message"] == error.message
    assert openai["error"]["code"] is None or isinstance(openai["error"]["code"], str)
    native = NATIVE.envelope(error)
    assert list(native) == ["error", "error_type"]
    assert native["error"].endswith(error.message) and "why" in error.message
    assert native["error_type"] == kind.error_type
    for dialect in (NATIVE, OPENAI, ANTHROPIC):
        assert 400 <= dialect.status(error) < 600


@pytest.mark.parametrize(
    ("error", "native", "openai"),
    [
        (errors.InvalidRequest("x"), 422, 400),
        (errors.InvalidRequest("x", is_syntax=True), 400, 400),
        (errors.TemplateError("x"), 422, 400),
        (errors.ToolError("x"), 422, 400),
        (errors.Unauthorized("x"), 401, 401),
        (errors.Forbidden("x"), 403, 403),
        (errors.NotFound("x"), 404, 404),
        (errors.MethodNotAllowed("x", allow=("GET",)), 405, 405),
        (errors.ImageTimeout("x"), 408, 408),
        (errors.ImageTooLarge("x"), 413, 413),
        (errors.NoWebSockets("x"), 426, 426),
        (errors.PayloadTooLarge("x"), 413, 413),
        (errors.RequestTimeout("x"), 408, 400),
        (errors.UnsupportedMediaType("x"), 415, 415),
        (errors.Overloaded(), 429, 429),
        (errors.Unavailable("x"), 503, 503),
        (errors.GenerationFailed("x"), 424, 500),
        (errors.IncompleteGeneration("x"), 500, 500),
        (errors.RequestAborted("x"), 500, 500),
        (errors.ModelLoadError("x"), 503, 503),
        (ValueError("secret"), 500, 500),
    ],
)
def test_statuses(error: BaseException, native: int, openai: int) -> None:
    assert NATIVE.status(error) == native
    assert OPENAI.status(error) == openai


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.Unavailable("x"), "overloaded"),
        (errors.GenerationFailed("x"), "generation_failed"),
        (errors.IncompleteGeneration("x"), "incomplete_generation"),
        (errors.RequestAborted("x"), "request_aborted"),
        (errors.ModelLoadError("x"), "model_load_failed"),
        (ValueError("secret"), "internal_error"),
    ],
)
def test_what_the_server_did_wrong_has_a_code_that_programs_can_tell_apart(
    error: BaseException, code: str
) -> None:
    shown = OPENAI.envelope(error)["error"]
    assert (shown["type"], shown["code"]) == ("server_error", code)


def test_what_a_client_did_wrong_is_an_invalid_request_to_anthropics_clients() -> None:
    for error in (errors.UnsupportedMediaType("x"), errors.MethodNotAllowed("x", allow=("POST",))):
        assert ANTHROPIC.envelope(error)["error"]["type"] == "invalid_request_error"
    assert ANTHROPIC.envelope(errors.GenerationFailed("x"))["error"]["type"] == "api_error"


def test_native_messages_have_tgis_prefixes() -> None:
    def text(error: BaseException) -> Any:
        return NATIVE.envelope(error)["error"]

    assert text(errors.InvalidRequest("x")) == "Input validation error: x"
    assert text(errors.InvalidRequest("x", is_syntax=True)) == "x"
    assert text(errors.TemplateError("x")) == "Template error: x"
    assert text(errors.ToolError("x")) == "Tool error: x"
    assert text(errors.GenerationFailed("x")) == "Request failed during generation: x"
    assert text(errors.Overloaded()) == "Model is overloaded"


def test_foreign_exceptions_tell_nothing() -> None:
    for dialect in (NATIVE, OPENAI, ANTHROPIC):
        assert "secret" not in json.dumps(dialect.envelope(ValueError("secret")))


@pytest.mark.parametrize(("given", "sent"), [(0, b"1"), (7, b"7"), (900, b"120")])
def test_retry_after_is_what_clients_obey(given: int, sent: bytes) -> None:
    for error in (errors.Overloaded(retry_after_s=given), errors.Unavailable("x", retry_after_s=given)):
        assert headers_of(error) == [(b"retry-after", sent)]


def test_an_error_event_is_one_whole_event() -> None:
    event = error_event(errors.GenerationFailed("a\nb"), OPENAI)
    assert event.startswith(b'data: {"error":{')
    assert event.endswith(b"}\n\n")
    assert event.count(b"\n") == 2


@pytest.mark.parametrize(
    ("body", "is_half"),
    [
        (rb'{"a": "\ud83d"}', True),
        (rb'{"a": "\ud83d\n"}', True),
        (rb'{"a": "\uDE00x"}', True),
        (rb'{"a": "\ud83d\ud83d\ude00"}', True),
        (rb'{"a": "\ud83d\ude00', False),
        (rb'{"a": "\\ud83d"', False),
    ],
)
def test_half_of_a_surrogate_pair_is_named(body: bytes, is_half: bool) -> None:
    with pytest.raises(errors.InvalidRequest) as found:
        decode_json(body, msgspec.json.Decoder())
    assert ("surrogate" in found.value.message) == is_half
