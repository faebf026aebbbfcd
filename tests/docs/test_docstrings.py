"""The examples in docstrings: their calls fit the signatures of the classes and functions that they name."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "tgi_asgi"
FILES = sorted(PACKAGE.rglob("*.py"))
_EXAMPLE = re.compile(r"^\n((?: {4}.*\n|\n)+)", re.MULTILINE)  # indented after an empty line
_REST = re.compile(r"(?<=[(,]) ?\.\.\.(?=[),])")  # `...` for arguments that the example leaves out
_Kind = inspect.Parameter
_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
_ANYTHING = inspect.Signature([_Kind("a", _Kind.VAR_POSITIONAL), _Kind("k", _Kind.VAR_KEYWORD)])


def _of_arguments(given: ast.arguments, num_bound: int) -> inspect.Signature:
    names = [each.arg for each in (*given.posonlyargs, *given.args)]
    num_required = len(names) - len(given.defaults)
    has_default = {name: at >= num_required for at, name in enumerate(names)}
    optional = zip(given.kwonlyargs, given.kw_defaults, strict=True)
    parameters = [
        *_parameters(has_default, _Kind.POSITIONAL_OR_KEYWORD),
        *([_Kind(given.vararg.arg, _Kind.VAR_POSITIONAL)] if given.vararg is not None else []),
        *_parameters({each.arg: default is not None for each, default in optional}, _Kind.KEYWORD_ONLY),
        *([_Kind(given.kwarg.arg, _Kind.VAR_KEYWORD)] if given.kwarg is not None else []),
    ]
    return inspect.Signature(parameters[num_bound:])


def _parameters(has_default: dict[str, bool], kind: inspect._ParameterKind) -> list[inspect.Parameter]:
    return [_Kind(name, kind, default=None if has else _Kind.empty) for name, has in has_default.items()]


def _of_class(node: ast.ClassDef) -> inspect.Signature | None:
    """Return what a class takes; None if nothing can be made of it, as of a protocol."""
    for each in node.body:
        if isinstance(each, ast.FunctionDef) and each.name == "__init__":
            return _of_arguments(each.args, 1)
    if any(ast.unparse(base) == "Protocol" for base in node.bases):
        return None
    decorators = " ".join(map(ast.unparse, node.decorator_list))
    if node.bases or "dataclass" not in decorators:
        return _ANYTHING
    fields = {
        each.target.id: each.value is not None and ast.unparse(each.value) != "field(repr=False)"
        for each in node.body
        if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name)
        if not ast.unparse(each.annotation).startswith("ClassVar")
    }
    is_by_name = "kw_only=True" in decorators
    return inspect.Signature(
        _parameters(fields, _Kind.KEYWORD_ONLY if is_by_name else _Kind.POSITIONAL_OR_KEYWORD)
    )


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def _signatures() -> dict[str, list[inspect.Signature | None]]:
    """Return the signatures of all classes and module functions by name; two may have the same name."""
    found: dict[str, list[inspect.Signature | None]] = {}
    for path in FILES:
        for node in _tree(path).body:
            if isinstance(node, ast.ClassDef):
                found.setdefault(node.name, []).append(_of_class(node))
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                found.setdefault(node.name, []).append(_of_arguments(node.args, 0))
    return found


def _documented(node: _Documented) -> Iterator[_Documented]:
    """Yield a module, class or function and those that are defined directly in it."""
    yield node
    for each in node.body:
        if isinstance(each, _Documented):
            yield from _documented(each)


def _calls(path: Path) -> Iterator[ast.Call]:
    """Yield the calls in the examples of a file's docstrings."""
    for node in _documented(_tree(path)):
        for example in _EXAMPLE.findall(f"{ast.get_docstring(node) or ''}\n"):
            code = _REST.sub("**_rest", textwrap.dedent(example))
            try:
                tree = ast.parse(f"async def example():\n{textwrap.indent(code, ' ')}")
            except SyntaxError:
                continue  # a picture, or words
            yield from (each for each in ast.walk(tree) if isinstance(each, ast.Call))


def _fits(call: ast.Call, signature: inspect.Signature | None) -> bool:
    if signature is None:
        return False
    is_whole = all(each.arg is not None for each in call.keywords)
    is_whole = is_whole and not any(isinstance(each, ast.Starred) for each in call.args)
    given = {each.arg: each.value for each in call.keywords if each.arg is not None}
    try:
        (signature.bind if is_whole else signature.bind_partial)(*call.args, **given)
    except TypeError:
        return False
    return True


def _is_known_call(call: ast.Call) -> bool:
    """Return whether a call names a class or function of the package, and is not of an unknown object's."""
    name = ast.unparse(call.func).rpartition(".")[2]
    return name in _signatures() and (name[:1].isupper() or isinstance(call.func, ast.Name))


def test_examples_call_what_exists() -> None:
    calls = [(path.name, call) for path in FILES for call in _calls(path)]
    known = [(name, call) for name, call in calls if _is_known_call(call)]
    assert len(known) > 80, "the examples are no longer found"
    wrong = [
        f"{name}: {ast.unparse(call)}"
        for name, call in known
        if not any(_fits(call, each) for each in _signatures()[ast.unparse(call.func).rpartition(".")[2]])
    ]
    assert not wrong
