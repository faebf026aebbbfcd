"""Decode a JSON body into a msgspec struct, and name a wrong field by its dotted path.

Types are strict and checked while decoding. Ranges are annotated as JSON Schema keywords (`range_of`):
`check_ranges` enforces them in a fixed order and wording, and the OpenAPI document shows them.
"""

from __future__ import annotations

import re
import typing
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cache
from typing import Annotated, Any, NoReturn, TypeVar

import msgspec
from msgspec import Meta, Struct

from tgi_asgi.errors import InvalidRequest

T = TypeVar("T")

NO_IMAGES = "the model reads nothing but text"  # why an image is refused
ONLY_USERS = "only the user's messages may have images"
OMITTED_IMAGE = "[image omitted]"  # stands for an image in the result of a tool
_MAX_SAID = 300  # characters of msgspec's message, which repeats a wrong name whole
MAX_ECHOED_CHARS = 256  # of a client's name that is sent back, in every chunk of a stream

# An escaped backslash or a whole pair, which are skipped; or else a half of a surrogate pair.
_SURROGATE = re.compile(rb"\\\\|\\ud[89ab]..\\ud[c-f]|(?P<half>\\ud[89a-f])", re.IGNORECASE)
_AT = re.compile(r"^(.*) - at (?:`key` in )?`\$\.?(.*?)(?:\[\.{3}\])?`$", re.DOTALL)
_MISSING = re.compile(r"^Object missing required field `(.*)`$")


def decode_json(body: bytes, decoder: msgspec.json.Decoder[T]) -> T:
    """Decode `body` strictly: types are not coerced, unknown fields are ignored.

    Raises:
        InvalidRequest: with `is_syntax` if the body is not JSON; otherwise `param` names the wrong field.
    """
    try:
        # msgspec skips unknown fields without validating their bytes.
        body.decode("utf-8")
        return decoder.decode(body)
    except UnicodeDecodeError:
        raise InvalidRequest("The request body is not valid UTF-8", is_syntax=True) from None
    except RecursionError:
        raise InvalidRequest("The request body is nested too deeply", is_syntax=True) from None
    except msgspec.ValidationError as error:
        raise invalid_field(str(error)) from None
    except msgspec.DecodeError as error:
        why = str(error)
        if any(found["half"] for found in _SURROGATE.finditer(body)):
            # Clients cut texts between the two halves of an emoji; msgspec calls some such bodies truncated.
            why = "a string has half of a surrogate pair (\\ud800 to \\udfff)"
        raise InvalidRequest(f"The request body is not valid JSON: {why}", is_syntax=True) from None


def invalid_field(message: str) -> InvalidRequest:
    """Translate msgspec's message (`Expected ... - at `$.a[0].b``), with the field's path in `param`."""
    path = ""
    if match := _AT.match(message):
        message, path = match.groups()
    if match := _MISSING.match(message):
        path = f"{path}.{match[1]}" if path else match[1]
        return InvalidRequest(f"`{path}` is required", param=path)
    message = message[:1].lower() + message[1:_MAX_SAID]
    if path:
        return InvalidRequest(f"`{path}`: {message}", param=path)
    return InvalidRequest(f"The request body: {message}")


def refuse(param: str, message: str, code: str | None = None) -> NoReturn:
    """Refuse the request because of one field; see `refuse_field` if the message starts with its name."""
    raise InvalidRequest(message, param=param, code=code)


def refuse_field(param: str, rule: str, code: str | None = None) -> NoReturn:
    """Refuse the request because of one field, whose name starts the message."""
    refuse(param, f"`{param}` {rule}", code)


_REFUSED = "x-refused"  # keyword of fields that the OpenAPI document leaves out; its value is why
# Fields that are refused if they are set to anything, because ignoring them would mislead.
Refused = Annotated[Any, Meta(extra_json_schema={_REFUSED: "is not supported by this server"})]
Foreign = Annotated[Any, Meta(extra_json_schema={_REFUSED: "is not a field of this API"})]
# A field of other APIs that is refused unless it asks for nothing else; its own API's code decides.
Undocumented = Annotated[Any, Meta(extra_json_schema={_REFUSED: None})]


def check_refused(request: Struct) -> None:
    """Refuse fields of the types `Refused` and `Foreign` that are set to anything."""
    for name, rule in _refused(type(request)):
        value = getattr(request, name)
        if value is not False and value not in (None, "", []):  # 0 equals False, and may mean something
            refuse_field(name, rule, "unsupported_parameter")


@cache
def _refused(kind: type[Struct]) -> list[tuple[str, str]]:
    found = [(name, keywords.get(_REFUSED)) for name, keywords in _keywords(kind)]
    return [(name, rule) for name, rule in found if rule is not None]


def without_refused(schema: dict[str, Any]) -> dict[str, Any]:
    """Return an object's JSON schema without the properties that are refused."""
    properties: dict[str, Any] = schema.get("properties", {})
    kept = {name: each for name, each in properties.items() if _REFUSED not in each}
    return {**schema, "properties": kept} if properties else schema


def range_of(**keywords: float) -> Meta:
    """Return the bounds of a number, for `check_ranges` and the OpenAPI document."""
    return Meta(extra_json_schema=dict(keywords))


Int = Annotated[int, range_of(minimum=-(2**63), maximum=2**64 - 1)]
Natural = Annotated[int, range_of(minimum=0, maximum=2**63 - 1)]
Positive = Annotated[int, range_of(minimum=1, maximum=2**63 - 1)]
Penalty = Annotated[float, range_of(minimum=-2, maximum=2)]
Fraction = Annotated[float, range_of(minimum=0, maximum=1)]
Share = Annotated[float, range_of(exclusiveMinimum=0, maximum=1)]
Salt = Annotated[str, Meta(min_length=1)]  # vLLM's: only requests with the same salt share cached prefixes


def check_ranges(request: Struct, where: str = "", *, unbounded: Collection[str] = ()) -> None:
    """Refuse a request's first number out of range, and names that are too long to echo.

    `where` is prepended to the field names; fields in `unbounded` have no maximum.
    """
    for name, low, high, is_open in _ranges(type(request)):
        value = getattr(request, name)
        if name in unbounded:
            high = float("inf")
        if value is None or (low < value <= high if is_open else low <= value <= high):
            continue
        if low == float("-inf") or high >= 2**63 - 1:
            rule = f"above {low}" if is_open else f"at least {low}"
            rule = f"at most {high}" if value > high else rule
        else:
            rule = f"in {'(' if is_open else '['}{low}, {high}]"
        refuse_field(where + name, f"must be {rule}, got {value}")
    for name in ("model", "request_id"):
        value = getattr(request, name, None)
        if value is not None and len(value) > MAX_ECHOED_CHARS:
            refuse_field(name, f"must have at most {MAX_ECHOED_CHARS} characters, got {len(value)}")


@cache
def _ranges(kind: type[Struct]) -> list[tuple[str, float, float, bool]]:
    """Return (field, minimum, maximum, whether the minimum is excluded) from the struct's annotations."""
    found = []
    for name, keywords in _keywords(kind):
        is_open = "exclusiveMinimum" in keywords
        low = keywords.get("exclusiveMinimum" if is_open else "minimum")
        if low is not None:
            found.append((name, low, keywords.get("maximum", float("inf")), is_open))
    return found


def _keywords(kind: type[Struct]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the keywords that the annotations of a struct's fields add to its JSON schema."""
    for name, hint in typing.get_type_hints(kind, include_extras=True).items():
        for part in (hint, *typing.get_args(hint)):
            for meta in getattr(part, "__metadata__", ()):
                if isinstance(meta, Meta) and meta.extra_json_schema:
                    yield name, meta.extra_json_schema


def string_of(item: Mapping[str, Any], name: str, path: str) -> str:
    """Return a required string field of an object."""
    value = item.get(name)
    if not isinstance(value, str):
        refuse_field(f"{path}.{name}", "must be a string")
    return value


def kind_of(item: object, path: str, kinds: Sequence[str]) -> str:
    """Return the `type` of a message part, which must be one of `kinds`."""
    kind = item.get("type") if isinstance(item, dict) else None
    if kind not in kinds:
        known = f"one of {', '.join(kinds)}" if len(kinds) > 1 else f"`{kinds[0]}`: the model reads no other"
        refuse_field(f"{path}.type", f"must be {known}, got {str(kind)[:40]!r}", "invalid_value")
    return str(kind)
