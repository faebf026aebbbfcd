"""Runs a module on zeros in place of its weights, to find out what it asks for.

Its code gets values, because some of it needs them, such as which experts are chosen; but a matrix takes no
memory, and no time.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_PRODUCTS = frozenset({
    nn.functional.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm, torch.bmm,
    Tensor.bmm, torch.addmm, torch.baddbmm, torch.einsum,
})  # fmt: skip
_FACTORS = frozenset({Tensor.mul_, Tensor.div_})  # RWKV divides its matrices in place
_CHUNK = "chunk_size"


class NotProbed(Exception):
    """Raised when a module cannot run without weights."""


def run_on_zeros(model: nn.Module, num_tokens: int, **more: Any) -> Any:
    """Call a module on a few tokens, with `more` arguments; each parameter is a single zero, expanded.

    Raises:
        NotProbed: if the module raises.
    """
    ids = torch.zeros(1, num_tokens, dtype=torch.long)
    positions = torch.arange(num_tokens)[None]
    given = {"input_ids": ids, "position_ids": positions, "use_cache": False, **more}
    try:
        with _unchanged(model), _short_scans(model, num_tokens), _ExpandedZeros():
            _fill_with_zeros(model)
            return model(**arguments(model, **given))
    except Exception as error:
        raise NotProbed(f"{type(error).__name__}: {error}") from error


def arguments(model: nn.Module, **given: Any) -> dict[str, Any]:
    """Return the arguments that a module's `forward` accepts, or may pass on to its decoder."""
    parameters = inspect.signature(model.forward).parameters
    takes_any = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    return {name: value for name, value in given.items() if takes_any or name in parameters}


def _fill_with_zeros(model: nn.Module) -> None:
    zero = torch.zeros(1)
    for module in model.modules():
        for name, value in module._parameters.items():
            if value is not None:
                module._parameters[name] = nn.Parameter(zero.expand(value.shape), requires_grad=False)


@contextlib.contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Restore modules' attributes, parameters and buffers afterwards.

    RWKV notes in an attribute that it has rescaled its weights, and rotary tables may be replaced.
    """
    before = [
        (values, dict(values))
        for module in model.modules()
        for values in (vars(module), module._parameters, module._buffers)
    ]
    try:
        yield
    finally:
        for values, own in before:
            values.clear()
            values.update(own)


@contextlib.contextmanager
def _short_scans(model: nn.Module, num_tokens: int) -> Iterator[None]:
    """Let scans compute these tokens only: they pad them to a chunk, of up to 256 tokens.

    A chunk's size is an attribute of a module (Mamba 2's) or the default of a function's argument (that of
    delta nets). Use within `_unchanged`, which restores the attributes.
    """
    for module in model.modules():
        if isinstance(vars(module).get(_CHUNK), int):
            vars(module)[_CHUNK] = num_tokens
    before = [(function, function.__defaults__) for function in _scans(model)]
    try:
        for function, defaults in before:
            names = _names_with_defaults(function)
            function.__defaults__ = tuple(
                num_tokens if name == _CHUNK else value for name, value in zip(names, defaults, strict=True)
            )
        yield
    finally:
        for function, defaults in before:
            function.__defaults__ = defaults


def _scans(model: nn.Module) -> Iterator[Any]:
    """Yield the functions with chunks in the files in which the classes of a model's modules are written."""
    for file in {type(module).__module__ for module in model.modules()}:
        functions = filter(inspect.isfunction, vars(sys.modules[file]).values())
        plain: set[Any] = {inspect.unwrap(each) for each in functions}  # without their decorators
        yield from (each for each in plain if _CHUNK in _names_with_defaults(each))


def _names_with_defaults(function: Any) -> tuple[str, ...]:
    """Return the names of the arguments that `__defaults__` has values for."""
    code, count = function.__code__, len(function.__defaults__ or ())
    names: tuple[str, ...] = code.co_varnames[: code.co_argcount]
    return names[len(names) - count :]


class _ExpandedZeros(TorchFunctionMode):
    """Keeps torch from copying matrices that are expanded zeros to full ones: their products are zeros."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        if func in _FACTORS and _is_expanded(args[0]):
            return args[0]  # torch refuses to write to it
        if func not in _PRODUCTS or not any(map(_is_expanded, (*args, *named.values()))):
            return func(*args, **named)
        if func is nn.functional.linear and len(args) > 1:  # nearly all of them
            rows, matrix = args[:2]
            return rows.new_zeros(*rows.shape[:-1], matrix.shape[0])
        shapes = func(*map(_on_meta, args), **{name: _on_meta(value) for name, value in named.items()})
        return torch.zeros_like(shapes, device="cpu")


def _on_meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) else value


def _is_expanded(value: Any) -> bool:
    """Return whether a value is a matrix that is a single number in memory."""
    return isinstance(value, Tensor) and value.dim() > 1 and not any(value.stride())
