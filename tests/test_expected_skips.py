"""Every possible skip is on the list of expected skips, on any machine."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from tests.support import skips

ROOT = Path(__file__).parents[1]


def strings_of(node: ast.expr, tree: ast.Module) -> Iterator[str]:
    """Yield the strings that an expression may evaluate to, with `*` for each part known only at run time."""
    match node:
        case ast.Constant(value=str(text)):
            yield text
        case ast.JoinedStr(values=parts):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "*" for part in parts)
        case ast.IfExp(body=body, orelse=otherwise):
            yield from strings_of(body, tree)
            yield from strings_of(otherwise, tree)
        case ast.Name(id=name):
            for each in ast.walk(tree):
                if isinstance(each, ast.Assign) and any(
                    isinstance(target, ast.Name) and target.id == name for target in each.targets
                ):
                    yield from strings_of(each.value, tree)


def reasons_in(path: Path) -> Iterator[str]:
    """Yield the reason of each skip in a file.

    Raises:
        AssertionError: if a skip has no reason that can be read.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        if node.func.attr not in ("skip", "skipif", "importorskip"):
            continue
        named = [keyword.value for keyword in node.keywords if keyword.arg == "reason"]
        reason = named or (node.args if node.func.attr == "skip" else [])
        found = [text for each in reason[:1] for text in strings_of(each, tree) if text]
        assert found, f"{path}:{node.lineno} skips without a reason that can be read"
        yield from found


def reasons_match(reason: str, listed: str) -> bool:
    """Return whether a reason and a line's pattern can match the same text; both may contain `*`."""
    listed = listed.replace("[", "[[]")
    return fnmatchcase(reason, listed) or fnmatchcase(listed, reason.replace("[", "[[]"))


def is_listed(path: Path, reason: str) -> bool:
    """Return whether the list has a line for a file's skip; shared code may skip a test of any file."""
    name = path.relative_to(ROOT).as_posix()
    is_shared = not path.name.startswith("test_")
    return any(
        reasons_match(reason, line.reason) and (is_shared or fnmatchcase(name, line.test.partition("::")[0]))
        for line in skips.read(skips.LIST)
    )


FILES = sorted(
    path
    for path in (ROOT / "tests").rglob("*.py")
    if re.search(r"pytest\.(mark\.)?(importor)?skip", path.read_text(encoding="utf-8"))
)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_each_skip_is_listed_on_whatever_machine_it_happens(path: Path) -> None:
    assert [reason for reason in reasons_in(path) if not is_listed(path, reason)] == []


def test_each_line_of_the_list_is_for_a_skip_that_there_is() -> None:
    reasons = [reason for path in FILES for reason in reasons_in(path)]
    dead = [
        line
        for line in skips.read(skips.LIST)
        if not any(reasons_match(reason, line.reason) for reason in reasons)
    ]
    assert dead == []
