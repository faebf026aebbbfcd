"""The JSON-Schema-Test-Suite: if a schema is accepted as strict, no invalid instance passes.

The suite is in the source package of `jsonschema`, which pip fetches into build/ if it is missing.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tgi_asgi.errors import InvalidRequest
from tgi_asgi.text.constrain.compiler import GrammarCompiler
from tgi_asgi.text.constrain.grammar import Grammar
from tgi_asgi.text.constrain.source import COMPACT, SPACED, GrammarSource, inline_json

RELEASE = "jsonschema==4.26.0"
STORE = Path(__file__).parents[2] / "build" / "json_schema_suite"
MAX_ORDERS = 100  # of an instance's properties that are tried
# Valid instances that a grammar excludes, by the suite's file.
NARROWED = {
    "additionalProperties": "an object with listed properties gets no others; without a type it is an object",
    "properties": "as for additionalProperties",
    "required": "as for additionalProperties",
    "ref": "as for additionalProperties",
    "anyOf": "as for additionalProperties, in each branch",
    "const": "numbers are written as in the schema: 1, not 1.0",
    "enum": "numbers are written as in the schema",
    "type": "an integer has no fraction",
    "bignum": "an integer has at most 19 digits",
    "format": "formats are enforced, not annotations",
    "email": "no quoted local parts and no IP addresses",
    "hostname": "the last label begins with a letter",
    "uri": "no user names, IPv6 addresses, or unknown schemes without //",
    "ipv6": "no embedded IPv4 addresses",
    "date-time": "no leap seconds",
    "time": "no leap seconds",
    "float-overflow": "no exponents",
    "vocabulary": "keywords are enforced for any `$schema`",
    "ecmascript-regex": "U+FEFF does not count as white space",
}
# Invalid instances that pass.
LEAKS = {("ecmascript-regex", '"\ufeff"')}  # U+FEFF does not count as white space


@pytest.fixture(scope="module")
def json_schema_suite() -> Path:
    """Return the archive that contains the suite, fetched once."""
    archive = STORE / (RELEASE.replace("==", "-") + ".tar.gz")
    if not archive.exists():
        command = ["download", "--no-deps", "--no-binary", "jsonschema", "--dest", str(STORE), RELEASE]
        subprocess.run([sys.executable, "-m", "pip", *command], check=True)
    return archive


@pytest.fixture(scope="module")
def groups(json_schema_suite: Path) -> list[tuple[str, dict[str, Any]]]:
    """Return the suite's groups of tests, each with the name of its file."""
    result = []
    with tarfile.open(json_schema_suite) as tar:
        for member in tar:
            if "/json/tests/draft2020-12/" in member.name and member.name.endswith(".json"):
                file = tar.extractfile(member)
                assert file is not None
                result += [(Path(member.name).stem, group) for group in json.load(file)]
    return result


def spellings(value: Any) -> Iterator[Any]:
    """Yield a value with its properties in several orders, because a grammar has only one."""
    if isinstance(value, list):
        for items in itertools.product(*(itertools.islice(spellings(item), 8) for item in value)):
            yield list(items)
    elif isinstance(value, dict):
        for names in itertools.permutations(value):
            for items in itertools.product(*(itertools.islice(spellings(value[name]), 8) for name in names)):
                yield dict(zip(names, items, strict=True))
    else:
        yield value


def is_allowed(grammar: Grammar, separators: Mapping[str, Any], instance: Any) -> bool:
    """Return whether a grammar accepts an instance, in any order, with its characters escaped or not."""
    marks = (separators.get("item_separator", ","), separators.get("key_separator", ":"))
    for value in itertools.islice(spellings(instance), MAX_ORDERS):
        for is_ascii in (False, True):
            text = json.dumps(value, separators=marks, ensure_ascii=is_ascii).encode()
            matcher = grammar.matcher()._backend
            if matcher.try_consume_tokens(list(text)) == len(text) and matcher.is_accepting():
                return True
    return False


@pytest.mark.parametrize("separators", [COMPACT, SPACED], ids=["compact", "spaced"])
def test_of_a_strict_schema_that_is_accepted_nothing_invalid_passes(
    compiler: GrammarCompiler, groups: list[tuple[str, dict[str, Any]]], separators: Mapping[str, Any]
) -> None:
    count: Counter[str] = Counter()
    for file, group in groups:
        try:
            source, ignored = inline_json(group["schema"], separators)
            grammar = compiler.compile(GrammarSource("start: " + source))
        except InvalidRequest as error:
            assert re.search(r"`|Unsatisfiable|keywords that cannot be enforced", error.message)
            continue
        count["schemas"] += 1
        assert not ignored
        for test in group["tests"]:
            instance = test["data"]
            where = f"{file}: {group['description']}: {test['description']}: {instance!r}"
            if is_allowed(grammar, separators, instance):
                assert test["valid"] or (file, json.dumps(instance, ensure_ascii=False)) in LEAKS, where
                count["valid"] += 1
            elif test["valid"]:
                assert file in NARROWED, where
    assert count["schemas"] >= 210  # of 438; the others are refused, naming a keyword
    assert count["valid"] >= 535  # of 595


def test_a_schema_that_is_not_strict_is_served_without_what_cannot_be_enforced(
    compiler: GrammarCompiler, groups: list[tuple[str, dict[str, Any]]]
) -> None:
    count: Counter[str] = Counter()
    for file, group in groups:
        try:
            source, ignored = inline_json(group["schema"], COMPACT, is_strict=False)
            grammar = compiler.compile(GrammarSource("start: " + source))
        except InvalidRequest as error:  # the schema matches no answer
            assert "Unsatisfiable" in error.message, (group["schema"], error.message)
            continue
        count["schemas"] += 1
        for test in group["tests"]:
            is_right = is_allowed(grammar, COMPACT, test["data"]) == test["valid"]
            where = f"{file}: {group['description']}: {test['description']}: {test['data']!r}"
            assert is_right or ignored or file in NARROWED, where
            count["right"] += is_right
    assert count["schemas"] >= 425
    assert count["right"] >= 1_495  # of 1,855
