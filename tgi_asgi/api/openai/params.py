"""Checks of the fields that requests for text share, and their conversion to a `Job`'s parameters.

Pure functions over decoded requests; every refusal names the field and the allowed values.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from tgi_asgi.api.job import Constraint, Conversation, Job, Text
from tgi_asgi.api.limits import MAX_IDS, Limits, Overflow, check_stops
from tgi_asgi.api.openai.schema import CommonRequest, ResponseFormat, TextRequest, Thinking
from tgi_asgi.api.parse import check_ranges, check_refused, refuse, refuse_field
from tgi_asgi.api.sampling import sampling
from tgi_asgi.model_info import ModelInfo
from tgi_asgi.settings import Settings
from tgi_asgi.text.constrain.source import KINDS

THINKING_BUDGETS = (
    "thinking_token_budget", "reasoning_budget_tokens", "thinking_budget_tokens", "thinking_budget",
)  # fmt: skip
_SAMPLING = (
    "temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "frequency_penalty",
    "presence_penalty", "logit_bias", "seed",
)  # fmt: skip
_FORMATS = ("text", "json_object", "json_schema", "json", "regex")
_GUIDED = {  # vLLM's old names, SGLang's, and llama.cpp's
    "guided_json": "json", "guided_regex": "regex", "guided_choice": "choice", "guided_grammar": "grammar",
    "regex": "regex", "ebnf": "grammar", "grammar": "grammar", "json_schema": "json",
}  # fmt: skip


def check_common(request: CommonRequest, limits: Limits, info: ModelInfo, *, is_compat: bool) -> None:
    """Check ranges, combinations and features of the fields that chats and completions share.

    Raises:
        InvalidRequest: if a field is wrong; `param` names the first one.
    """
    check_ranges(request, unbounded=("temperature",) if is_compat else ())
    if request.n is not None and request.n > limits.best_of:
        refuse_field("n", f"must be at most {limits.best_of}, got {request.n}")
    if request.stream_options is not None and not request.stream and not is_compat:
        refuse_field("stream_options", "is only allowed with `stream: true`")
    limit = request.max_tokens
    if limit is None:
        limit = getattr(request, "max_completion_tokens", None)
    check_renamed(request, dict.fromkeys(("max_new_tokens", "max_output_tokens"), ("max_tokens", limit)))
    check_shared(request, limits, info)
    check_refused(request)


def check_shared(request: TextRequest, limits: Limits, info: ModelInfo) -> None:
    """Check what ranges do not say about the fields that all requests for text share."""
    is_list = not isinstance(request.stop, str)
    check_stops(stop_strings(request.stop), limits.stops, "stop", is_list=is_list)
    stop_ids = request.stop_token_ids or ()
    if len(stop_ids) > MAX_IDS:
        refuse_field("stop_token_ids", f"takes at most {MAX_IDS} ids")
    check_ids(stop_ids, "stop_token_ids", info.vocab_size)
    if request.truncate_prompt_tokens == 0:
        refuse_field("truncate_prompt_tokens", "must be -1 or at least 1, got 0")


def check_renamed(request: TextRequest, renamed: Mapping[str, tuple[str, Any]]) -> None:
    """Refuse the names that other APIs have for a field, unless the field is given, too.

    Some clients send the names of several APIs at once (SillyTavern).

    Args:
        renamed: By the other name, this API's name for the field, and its value in the request.
    """
    for name, (own, value) in renamed.items():
        if value is None and getattr(request, name) not in (None, "", {"type": "text"}):
            refuse_field(name, f"is not a field of this API; use `{own}`", "unsupported_parameter")


def job_of(
    request: TextRequest,
    prompt: Conversation | Text,
    info: ModelInfo,
    settings: Settings,
    *,
    logprobs: int | None,
    constraint: Constraint | None,
) -> Job:
    """Return the job of one prompt of a checked request, as far as the fields that all requests share say.

    Raises:
        InvalidRequest: if `logit_bias` contains an invalid token id, or is an array without `--tgi-compat`.
    """
    given = {name: getattr(request, name) for name in _SAMPLING}
    if isinstance(request.logit_bias, list):
        if not settings.tgi_compat:
            refuse_field("logit_bias", "must be an object with token ids as keys, got an array")
        given["logit_bias"] = None
    return Job(
        prompt=prompt,
        sampling=sampling(info, info.sampling, logprobs=logprobs, **given),
        overflow=overflow_of(settings),
        keep_tokens="fitting" if request.truncate_prompt_tokens == -1 else request.truncate_prompt_tokens,
        min_tokens=request.min_tokens or 0,
        ignore_eos=bool(request.ignore_eos),
        stop_token_ids=frozenset(request.stop_token_ids or ()),
        stop=stop_strings(request.stop),
        include_stop=bool(request.include_stop_str_in_output or request.no_stop_trim),
        skip_special_tokens=request.skip_special_tokens is not False,
        constraint=constraint,
        priority=request.priority or 0,
        cache_salt=request.cache_salt,
    )


def stop_strings(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    """Return the strings of `stop`, which is one or a list."""
    return (stop,) if isinstance(stop, str) else tuple(stop or ())


def check_ids(ids: Sequence[Any], path: str, vocab_size: int) -> None:
    """Refuse anything but token ids of the model."""
    for i, token_id in enumerate(ids):
        if type(token_id) is not int or not 0 <= token_id < vocab_size:
            rule = f"must be a token id in 0..{vocab_size - 1}, got {str(token_id)[:40]}"
            refuse_field(f"{path}[{i}]", rule)


def overflow_of(settings: Settings) -> Overflow:
    """Return how `/v1` treats an answer that is too long for the context."""
    if settings.tgi_compat:
        return Overflow.TGI
    return Overflow.CLIPPED if settings.clip_max_tokens else Overflow.REFUSED


def thinking_budget(
    request: TextRequest, thinking: Thinking | bool | None = None
) -> int | Literal["any", "default"]:
    """Return a request's `Job.reasoning_budget`; a chat's switch of `thinking` may have it, too."""
    every = [getattr(request, name) for name in THINKING_BUDGETS]
    if isinstance(thinking, Thinking):
        every.append(thinking.budget_tokens)
    given: int | None = next((value for value in every if value is not None), None)
    if given is None:
        return "default"
    return "any" if given == -1 else given


def constraint_of(request: CommonRequest) -> Constraint | None:
    """Return the constraint on the answer of a chat or completion, if any; several fields can specify it."""
    form = request.response_format
    checked = None if form is None else _response_format(form)
    is_strict = form is not None and form.json_schema is not None and form.json_schema.strict is True
    return one_constraint(request, "response_format", checked, is_strict=is_strict)


def one_constraint(
    request: TextRequest, field: str, form: tuple[str, Any] | None, *, is_strict: bool
) -> Constraint | None:
    """Return the constraint of the shared fields, or the kind and value that `field` has, if any.

    Raises:
        InvalidRequest: if there are several, or one has the wrong form.
    """
    wanted: dict[str, tuple[str, Any]] = {}
    if request.structured_outputs is not None:
        wanted["structured_outputs"] = structured_of(request.structured_outputs)
    for name, kind in _GUIDED.items():
        value = getattr(request, name)
        if value is not None and (name, value) != ("grammar", ""):  # llama.cpp's default
            wanted[name] = kind, value
    if form is not None:
        wanted[field] = form
    if not wanted:
        return None
    # guidance's VLLMModel sends one grammar under vLLM's old name and its new one.
    (param, (kind, value)), *others = wanted.items()
    for other, constraint in others:
        if constraint[0] != kind or not _are_equal(constraint[1], value):
            refuse(other, f"`{param}` and `{other}` exclude each other")
    return Constraint.of(param, kind, value, is_strict=is_strict)


def _are_equal(one: Any, other: Any) -> bool:
    """Return whether two JSON values are equal. `==` would not do: in Python, `True` equals 1."""
    try:
        return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
    except RecursionError:  # nested almost as deeply as a body may be, and refused as a schema anyway
        return False


def structured_of(given: dict[str, Any]) -> tuple[str, Any]:
    """Return the kind and the value of the constraint in vLLM's `structured_outputs`.

    Raises:
        InvalidRequest: if there is not exactly one.
    """
    kinds = [kind for kind in KINDS if given.get(kind) not in (None, False)]
    if len(kinds) != 1:
        rule = f"must have exactly one of {', '.join(KINDS)}; got {len(kinds)}"
        refuse_field("structured_outputs", rule)
    [kind] = kinds
    if kind == "json_object" and given[kind] is not True:
        refuse_field("structured_outputs.json_object", "must be true or false")
    return kind, given[kind]


def _response_format(given: ResponseFormat) -> tuple[str, Any] | None:
    """Return the format's kind and value, however it is spelt; None for plain text."""
    kind, value = given.type, given.value
    if kind == "json_schema" and isinstance(value, dict):
        value = value.get("schema")
    if kind == "json_schema" and given.json_schema is not None:
        value = given.json_schema.schema
    if value is None and kind != "regex":
        value = given.schema
    match kind, value:
        case "text", _:
            return None
        case "regex", str():
            return "regex", value
        case "regex", _:
            refuse_field("response_format.value", "must be a string with type `regex`")
        case "json", None:
            refuse_field("response_format.value", "is required with type `json`")
        case "json_schema", None:
            refuse_field("response_format.json_schema.schema", "is required with type `json_schema`")
        case "json_object", None:
            return "json_object", True
        case (("json" | "json_object" | "json_schema"), _):
            return "json", value
    refuse_field("response_format.type", f"must be one of {', '.join(_FORMATS)}")
