"""Probes of plain modules: what one computes, found by running it on random rows instead of by its name.

A probe gives a module small weights, compares its result with the expected one, and puts its own weights
back, which may be on the meta device. `replace.py` replaces modules accordingly, `common.py` reads a decoder.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from tgi_asgi.ops import direct

_EPS_NAMES = ("variance_epsilon", "eps", "epsilon", "norm_eps")
_MLP = frozenset({"gate_proj", "up_proj", "down_proj"})


def is_linear(module: nn.Module) -> bool:
    """Return whether a module is an `nn.Linear`, even under another name (Falcon)."""
    if type(module) is nn.Linear:
        return True
    if not isinstance(module, nn.Linear):
        return False
    if _has_more_than(module, {"weight", "bias"}):
        return False
    generator = torch.Generator().manual_seed(0)
    rows, weight = torch.randn(2, 16, generator=generator), torch.randn(24, 16, generator=generator)
    bias = None if module.bias is None else torch.randn(24, generator=generator)
    found = _run_with(module, rows, weight=weight, bias=bias)
    return _is_close(found, nn.functional.linear(rows, weight, bias), atol=1e-4)


def gated_activation(module: nn.Module) -> str | None:
    """Return the name of a gated MLP's activation; None if the module is not a gated MLP.

    The module runs with three small products instead of its own.
    """
    children = dict(module.named_children())
    if not _MLP <= set(children) <= {*_MLP, "act_fn"}:
        return None
    own: list[Any] = [children[name] for name in _MLP]
    if any(type(child) is not nn.Linear or child.bias is not None for child in own):
        return None
    generator = torch.Generator().manual_seed(0)
    shapes = {"gate_proj": (24, 16), "up_proj": (24, 16), "down_proj": (16, 24)}
    weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    x = torch.randn(1, 5, 16, generator=generator)
    try:
        for name, weight in weights.items():
            small = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            small._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
            module._modules[name] = small
        found = _run_with(module, x)
    finally:
        module._modules.update(children)
    gate, up = x @ weights["gate_proj"].T, x @ weights["up_proj"].T
    for name, function in direct.ACTIVATION_FUNCTIONS.items():
        if _is_close(found, (function(gate) * up) @ weights["down_proj"].T, atol=1e-4):
            return name
    return None


def factor_of(module: nn.Embedding) -> float | None:
    """Return the factor by which an embedding multiplies its rows; None if it does something else."""
    padding = module.padding_idx
    small = torch.randn(4, module.weight.shape[1], generator=torch.Generator().manual_seed(0))
    try:
        module.padding_idx = None
        found = _run_with(module, torch.arange(4)[None], weight=small)
    finally:
        module.padding_idx = padding
    if found is None or found.shape != (1, *small.shape):
        return None
    factor = float((found[0] * small).sum() / (small * small).sum())
    return factor if torch.allclose(found[0], factor * small, rtol=1e-6, atol=0) else None


def norm_offset(module: nn.Module) -> float | None:
    """Return what an RMSNorm adds to its weight, 0 or 1; None if the module is not an RMSNorm."""
    weight, eps = module._parameters.get("weight"), eps_of(module)
    if weight is None or weight.dim() != 1 or eps is None or _has_more_than(module, {"weight"}):
        return None
    generator = torch.Generator().manual_seed(0)
    rows = _rows_to_norm(weight.numel(), generator)
    scale = torch.rand(weight.shape, generator=generator)
    found = _run_with(module, rows, weight=scale)
    normed = rows * torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + eps)
    for offset in (0.0, 1.0):
        if _is_close(found, normed * (scale + offset), rtol=1e-5, atol=1e-7):
            return offset
    return None


def is_layer_norm(module: nn.Module) -> bool:
    """Return whether a module is a LayerNorm over the last dimension, with a weight and maybe a bias."""
    weight, bias, eps = module._parameters.get("weight"), module._parameters.get("bias"), eps_of(module)
    if weight is None or weight.dim() != 1 or eps is None or _has_more_than(module, {"weight", "bias"}):
        return False
    generator = torch.Generator().manual_seed(0)
    rows = _rows_to_norm(weight.numel(), generator) + 1e-3
    scale = torch.rand(weight.shape, generator=generator)
    offset = None if bias is None else torch.rand(weight.shape, generator=generator)
    found = _run_with(module, rows, weight=scale, **({} if bias is None else {"bias": offset}))
    expected = nn.functional.layer_norm(rows, weight.shape, scale, offset, eps)
    return _is_close(found, expected, rtol=1e-5, atol=1e-6)


def activation_of(module: nn.Module) -> str | None:
    """Return the name of the activation function that a module is; None if `ops` does not have it."""
    if _has_more_than(module, set()):
        return None
    x = torch.linspace(-30, 30, 4096).reshape(2, 2048)  # beyond the limits of clipped ones
    found = _run_with(module, x.clone())  # some write to their input
    for name, function in direct.ACTIVATION_FUNCTIONS.items():
        if _is_close(found, function(x), rtol=1e-5, atol=1e-6):
            return name
    return None


def eps_of(module: nn.Module) -> float | None:
    """Return a norm's epsilon; None if it names none."""
    found = next((getattr(module, name) for name in _EPS_NAMES if hasattr(module, name)), None)
    return found if isinstance(found, float) else None


def _rows_to_norm(columns: int, generator: torch.Generator) -> Tensor:
    """Return rows in three dimensions, in which other norms (GroupNorm) do not look like norms of rows."""
    rows = torch.randn(2, 3, columns, generator=generator)
    rows[1] *= 1e-3  # small enough for eps to matter
    return rows


def _has_more_than(module: nn.Module, parameters: set[str]) -> bool:
    """Return whether a module has other parameters, buffers or modules, or not exactly one input."""
    return (
        not set(module._parameters) <= parameters
        or any(value is not None for value in module._buffers.values())
        or bool(list(module.children()))
        or _num_inputs(module) != 1
    )


def _num_inputs(module: nn.Module) -> int:
    return len(inspect.signature(module.forward).parameters)


def _run_with(module: nn.Module, x: Tensor, **parameters: Tensor | None) -> Tensor | None:
    """Return a module's result with other parameters; None if its class does not run like this."""
    own = dict(module._parameters)
    try:
        for name, value in parameters.items():
            module._parameters[name] = None if value is None else nn.Parameter(value, requires_grad=False)
        with torch.no_grad():
            found = module(x)
    except Exception:  # the class requires other arguments or sizes, and may raise anything
        return None
    finally:
        module._parameters.clear()
        module._parameters.update(own)
    return found if isinstance(found, Tensor) else None


def _is_close(found: Tensor | None, expected: Tensor, *, atol: float, rtol: float = 1e-5) -> bool:
    return (
        found is not None
        and found.shape == expected.shape
        and torch.allclose(found, expected, rtol=rtol, atol=atol)
    )
