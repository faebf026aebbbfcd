"""What a `/v1` request says its answer must match: response_format, structured_outputs, guided_*."""

from __future__ import annotations

from typing import Any

from tgi_asgi.api.call import Constraint
from tgi_asgi.api.openai.schema import CommonRequest, ResponseFormat
from tgi_asgi.api.parse import refuse
from tgi_asgi.text.constrain.source import KINDS

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
    return Constraint.of(param, kind, value, is_strict=is_strict)


def _structured(given: dict[str, Any]) -> tuple[str, Any]:
    kinds = [kind for kind in KINDS if given.get(kind) not in (None, False)]
    if len(kinds) != 1:
        refuse(
            "structured_outputs",
            f"`structured_outputs` must have exactly one of {', '.join(KINDS)}; got {len(kinds)}",
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
