"""Whether torch, where it still computes in a module, may give a token other bits in another batch."""

from __future__ import annotations

import inspect

from torch import nn

from tgi_asgi.models.generic.modules import PackedModule
from tgi_asgi.models.generic.rope import RotaryLookup

# Functions that torch rounds differently by an element's position in the tensor.
_POSITION_DEPENDENT = frozenset({"sin", "cos", "tanh"})


def all_products_are_native(model: nn.Module) -> bool:
    """Return whether torch multiplies by none of the model's matrices."""
    return all(
        isinstance(module, (PackedModule, nn.Embedding))
        or not any(value is not None and value.dim() > 1 for value in module._parameters.values())
        for module in model.modules()
    )


def applies_sines(base: nn.Module) -> bool:
    """Return whether torch's sine, cosine or hyperbolic tangent is applied to rows of several sequences."""
    for path, module in base.named_modules():
        if isinstance(module.__dict__.get("forward"), RotaryLookup) or path.startswith("pooler"):
            continue
        used = set(inspect.unwrap(type(module).forward).__code__.co_names)
        if used & _POSITION_DEPENDENT or "tanh" in type(module).__name__.lower():
            return True
    return False
