"""What the source of a model's code says: the text of its classes, and the matrices that it reads itself."""

from __future__ import annotations

import ast
import functools
import inspect
import sys
from dataclasses import dataclass
from typing import Any

from torch import nn

from tgi_asgi.models.generic.weights import owner_of

_ASKED = frozenset({"dtype", "device", "shape"})  # attributes that `PackedModule` answers correctly


def class_source(kind: type[Any]) -> str:
    """Return the source of a class, or an empty string for torch's classes and classes without source."""
    if kind.__module__.startswith("torch."):
        return ""
    return _module_code(kind.__module__).classes.get(kind.__name__, "")


def reads_weight(model: nn.Module, path: str) -> bool:
    """Return whether the model's code reads this module's matrix, beyond its dtype, device and shape."""
    leaf = path.rpartition(".")[2]
    owner, _ = owner_of(model, path)
    return any(leaf in _module_code(name).reads for name in {type(model).__module__, type(owner).__module__})


@dataclass(frozen=True)
class _ModuleCode:
    """What is known of a Python module.

    Attributes:
        classes: The source of each class, by its name.
        reads: The names of modules whose `weight` or `bias` the code reads.
    """

    classes: dict[str, str]
    reads: frozenset[str]


@functools.lru_cache(maxsize=256)
def _module_code(name: str) -> _ModuleCode:
    """Parse a Python module once; `inspect.getsource` would do it for each of its classes."""
    module = sys.modules.get(name)
    try:
        source = "" if module is None else inspect.getsource(module)
    except (OSError, TypeError):
        source = ""
    tree, lines = ast.parse(source), source.splitlines(keepends=True)
    classes = {
        node.name: "".join(lines[node.lineno - 1 : node.end_lineno])
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }
    reads = _Reads()
    reads.visit(tree)
    return _ModuleCode(classes, frozenset(reads.names))


class _Reads(ast.NodeVisitor):
    """Finds `x.name.weight` and `x.name.bias`, but not if only their type or shape is asked for.

    `_init_weights` does not count, as it is not run here.
    """

    def __init__(self) -> None:
        self.names: set[str] = set()

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        if node.name != "_init_weights":
            self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        is_question = isinstance(node.func, ast.Name) and node.func.id == "isinstance"
        first = node.args[0] if node.args else None
        if is_question and isinstance(first, ast.Attribute) and isinstance(first.value, ast.Attribute):
            self.visit(first.value.value)
            return
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        inner = node.value
        if node.attr in _ASKED and isinstance(inner, ast.Attribute):
            self.visit(inner.value)
            return
        if node.attr in ("weight", "bias") and isinstance(inner, ast.Attribute):
            self.names.add(inner.attr)
        self.generic_visit(node)
