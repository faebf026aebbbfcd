"""llguidance's checks of grammars and schemas, with a limit of time, and its messages in our own words."""

from __future__ import annotations

import hashlib
import json
import math
import re
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from tgi_asgi.errors import InvalidRequest

MAX_CHECKS_S = 5.0  # an agent's 200 tools take one or two the first time, and 10,000 arguments half a minute
_MAX_KNOWN = 1024  # schemas; agents send hundreds of tools with every request

_PLACE = re.compile(r"^at \d+\(\d+\): (failed to compile JSON schema: )?")
_WORDS = (
    (re.compile(r"^Unimplemented keys: "), "keywords that cannot be enforced: "),
    (
        re.compile(r"^oneOf constraints are not supported.*"),
        "`oneOf` of schemas that one value may match together",
    ),
    (re.compile(r"^NoExtension(Bias)?$"), "no text can match it"),
    (
        re.compile(r"^parser error: Too many items.*ff_tokens.*"),
        "the text that must follow is too long, or has no end",
    ),
    (  # the compiler turns a number's bounds into a regex with a group for each digit
        re.compile(r"^the regex .* maximum number of nested parentheses.*"),
        "a `pattern` with too many nested parentheses, or a bound of a number with too many digits",
    ),
    (re.compile(r"^min/maxProperties"), "`minProperties` and `maxProperties` are"),
    (re.compile(r"^Unknown format: (.*)"), r"`format` \1 cannot be enforced"),
    (re.compile(r"^Resource '(.*)' is not present.*"), r"`$ref` \1 is not part of the schema"),
)


def reason_of(message: str) -> str:
    """Return the compiler's message on one line, with keywords in the terms of JSON Schema."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    if not lines:
        return "unknown error"
    reason = _PLACE.sub("", lines[0])
    if reason.endswith("regex parse error:"):  # followed by the pattern, the position and the reason
        cause = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), "")
        reason = f"the regex (`pattern`) {''.join(lines[1:2])} is not supported: {cause}"
    for pattern, words in _WORDS:
        reason = pattern.sub(words, reason)
    return reason[:300]


@contextmanager
def refuse_panics() -> Iterator[None]:
    """Refuse input on which the compiler, written in Rust, panics; its panics are not `Exception`s.

    Raises:
        InvalidRequest: if it has panicked.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise InvalidRequest("grammar is not valid: the compiler cannot read it") from None


class _Clock(threading.local):
    ends_s = math.inf


_clock = _Clock()


@contextmanager
def limited_checks() -> Iterator[None]:
    """Let this thread check schemas and patterns for `MAX_CHECKS_S` of its own processor time.

    Each argument of each tool may be checked alone. Beyond the limit, a check refuses what is not known yet.
    """
    _clock.ends_s = time.thread_time() + MAX_CHECKS_S
    try:
        yield
    finally:
        _clock.ends_s = math.inf


def checked(grammar: Mapping[str, Any], limits: Any = None) -> tuple[bool, list[str]]:
    """Return whether a grammar is refused, and the compiler's messages, without a vocabulary.

    Raises:
        InvalidRequest: if the compiler panics, or the time of `limited_checks` is used up.
    """
    from llguidance import LLMatcher

    if time.thread_time() > _clock.ends_s:
        raise InvalidRequest(f"checking the schemas takes more than {MAX_CHECKS_S:g} s")
    with refuse_panics():
        return LLMatcher.validate_grammar_with_warnings(json.dumps(grammar), limits=limits)


def problem_of(schema: Mapping[str, Any]) -> str | None:
    """Return why a schema cannot be compiled, or None."""
    is_refused, messages = _validate(json.dumps(schema))
    return reason_of(messages[0]) if is_refused else None


def warnings_of(schema: Mapping[str, Any]) -> list[str]:
    """Return the compiler's warnings about parts of a schema that it would ignore.

    Raises:
        InvalidRequest: if it would not compile the schema at all.
    """
    is_refused, messages = _validate(json.dumps({**schema, "x-guidance": {"lenient": True}}))
    if is_refused:
        raise InvalidRequest(reason_of(messages[0]))
    return messages


_known: dict[bytes, tuple[bool, list[str]]] = {}  # by a schema's digest; the least recently used comes first
_known_lock = threading.Lock()


def _validate(schema: str) -> tuple[bool, list[str]]:
    """Return whether a schema is refused, and messages; compiles it in 0.1 to 5 ms, unless it is known."""
    digest = hashlib.blake2b(schema.encode(), digest_size=16).digest()
    with _known_lock:
        found = _known.pop(digest, None)
        if found is not None:
            _known[digest] = found
            return found
    found = _compiled(schema)
    with _known_lock:
        _known[digest] = found
        if len(_known) > _MAX_KNOWN:
            del _known[next(iter(_known))]
    return found


def _compiled(schema: str) -> tuple[bool, list[str]]:
    """Compile a schema without a vocabulary."""
    from llguidance import LLParserLimits

    limits = LLParserLimits(initial_lexer_fuel=300_000, max_grammar_size=200_000, verbose_errors=False)
    return checked({"grammars": [{"json_schema": json.loads(schema)}]}, limits)
