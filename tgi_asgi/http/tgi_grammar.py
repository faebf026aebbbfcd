"""The native routes' `grammar`: its shapes, in TGI's words, to grammar text."""

from __future__ import annotations

from typing import Any, NoReturn

import msgspec

from tgi_asgi.errors import InvalidRequest
from tgi_asgi.http.tgi_schema import Grammar
from tgi_asgi.text.constrain import source as sources
from tgi_asgi.text.constrain.source import GrammarSource

PARAM = "parameters.grammar"


def native_grammar(grammar: Grammar, *, is_disabled: bool = False) -> GrammarSource:
    """Return what a request's grammar constrains the output to.

    Raises:
        InvalidRequest: grammars are switched off, the shape is wrong, or it is too large.
    """
    if is_disabled:
        _refuse("grammar is not supported", PARAM)
    value = grammar.value
    try:
        if grammar.type == "regex":
            if not isinstance(value, str):
                _refuse("grammar is not valid: a regex must be a string")
            return sources.regex(value)
        if grammar.type == "json_schema" and isinstance(value, dict):
            value = value.get("schema")
        return sources.json_schema(_schema(value))
    except InvalidRequest as error:
        if error.param is not None:
            raise
        raise InvalidRequest(f"grammar is not valid: {error.message}", param=f"{PARAM}.value") from None


def _schema(value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        try:
            value = msgspec.json.decode(value)
        except (msgspec.DecodeError, RecursionError) as error:
            _refuse(f"grammar is not valid: {error}")
    if not isinstance(value, dict):
        _refuse("grammar is not supported")
    return value


def _refuse(message: str, param: str = f"{PARAM}.value") -> NoReturn:
    raise InvalidRequest(message, param=param)
