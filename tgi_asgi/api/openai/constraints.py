"""What a `/v1` request says its answer must match: response_format, structured_outputs, guided_*."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tgi_asgi.api.call import Constraint
from tgi_asgi.api.openai.schema import CommonRequest, ResponseFormat
from tgi_asgi.api.parse import refuse
from tgi_asgi.errors import InvalidRequest
from tgi_asgi.text.constrain import source as sources
from tgi_asgi.text.constrain.source import GrammarSource

_FORMATS = ("text", "json_object", "json_schema", "json", "regex")
_GUIDED = {  # vLLM's old names, and SGLang's
    "guided_json": "json", "guided_regex": "regex", "guided_choice": "choice", "guided_grammar": "grammar",
    "regex": "regex", "ebnf": "grammar",
}  # fmt: skip


def constraint_of(request: CommonRequest) -> Constraint | None:
    """Return what the answer must match, if anything.

    Raises:
        InvalidRequest: a field is of the wrong shape, or two of them constrain the answer.
    """
    wanted: dict[str, tuple[str, Any]] = {}
    given = request.structured_outputs
    if given is not None:
        wanted["structured_outputs"] = _structured(given)
    for name, kind in _GUIDED.items():
        value = getattr(request, name)
        if value is not None:
            wanted[name] = kind, value
    form = request.response_format
    if form is not None:
        checked = _response_format(form)
        if checked is not None:
            wanted["response_format"] = checked
    if not wanted:
        return None
    if len(wanted) > 1:
        first, second, *_ = wanted
        refuse(second, f"`{first}` and `{second}` exclude each other")
    [(param, (kind, value))] = wanted.items()
    is_strict = form is not None and form.json_schema is not None and form.json_schema.strict is True
    return constraint(param, kind, value, is_strict=is_strict)


def constraint(param: str, kind: str, value: Any, *, is_strict: bool = False) -> Constraint:
    """Return a constraint of a kind that `structured_outputs` knows, for the field that asked for it."""

    def make() -> GrammarSource:
        return sources.json_schema_of(value, is_strict=is_strict) if kind == "json" else _MAKERS[kind](value)

    return Constraint(param, make, f"`{param}`: ")


def _structured(given: dict[str, Any]) -> tuple[str, Any]:
    kinds = [kind for kind in _MAKERS if given.get(kind) not in (None, False)]
    if len(kinds) != 1:
        refuse(
            "structured_outputs",
            f"`structured_outputs` must have exactly one of {', '.join(_MAKERS)}; got {len(kinds)}",
        )
    return kinds[0], given[kinds[0]]


def _response_format(given: ResponseFormat) -> tuple[str, Any] | None:
    """Return the kind and its value, of OpenAI's spellings and of TGI's; None for plain text."""
    kind, value = given.type, given.value
    if kind not in _FORMATS:
        refuse("response_format.type", f"`response_format.type` must be one of {', '.join(_FORMATS)}")
    if kind == "text":
        return None
    if kind == "regex":
        if not isinstance(value, str):
            refuse("response_format.value", "`response_format.value` must be a string with type `regex`")
        return "regex", value
    if kind == "json_schema":
        wrapped = value.get("schema") if isinstance(value, dict) else value
        schema = given.json_schema.schema if given.json_schema is not None else wrapped
        if schema is None:
            refuse(
                "response_format.json_schema.schema",
                "`response_format.json_schema.schema` is required with type `json_schema`",
            )
        return "json", schema
    if value is None:
        if kind == "json":
            refuse("response_format.value", "`response_format.value` is required with type `json`")
        return "json_object", True
    return "json", value


def _text(make: Callable[[str], GrammarSource]) -> Callable[[Any], GrammarSource]:
    def checked(value: Any) -> GrammarSource:
        if not isinstance(value, str):
            raise InvalidRequest("a regex or a grammar must be a string")
        return make(value)

    return checked


def _choice(value: Any) -> GrammarSource:
    if not isinstance(value, list):
        raise InvalidRequest("a choice takes a list of strings")
    return sources.choice(value)


_MAKERS: dict[str, Callable[[Any], GrammarSource]] = {
    "json": sources.json_schema_of,
    "regex": _text(sources.regex),
    "choice": _choice,
    "grammar": _text(sources.ebnf),
    "json_object": lambda value: sources.any_object(),
}
