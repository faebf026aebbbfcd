"""Which products of a `transformers` module adapters may change: those that see each token of a step once.

A product that sees other rows (some tokens in experts, images in a tower, one sequence at a time in most
recurrent layers) could not assign rows to sequences. This is probed, not guessed, with steps of random
tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from tgi_asgi import ops
from tgi_asgi.models.generic.modules import GatedMlp, Linear


def adaptable(module: nn.Module, run_step: Callable[[int], None]) -> dict[str, ops.Target]:
    """Return the products that see every token once, by path.

    Args:
        run_step: Function that computes a step of the given number of random tokens.
    """
    products = {path: each for path, each in module.named_modules() if isinstance(each, (Linear, GatedMlp))}
    kept = dict(products)
    for num_tokens in (5, 2):
        seen = _rows_seen(products, partial(run_step, num_tokens))
        kept = {path: each for path, each in kept.items() if seen.get(path) == [num_tokens]}
    return {name: target for path, each in kept.items() for name, target in _targets(path, each).items()}


def attach(module: nn.Module, layout: ops.AdapterLayout) -> None:
    """Enable the layout's adapters on the products that it contains."""
    for path, each in module.named_modules():
        if isinstance(each, (Linear, GatedMlp)) and any(
            name in layout.targets for name in _targets(path, each)
        ):
            each.adapters = layout


def _rows_seen(products: Mapping[str, nn.Module], run: Callable[[], None]) -> dict[str, list[int]]:
    """Return the number of rows of each call, by product."""
    seen: dict[str, list[int]] = {}

    def note(path: str) -> Callable[[Any, tuple[Tensor, ...]], None]:
        def hook(_: Any, args: tuple[Tensor, ...]) -> None:
            seen.setdefault(path, []).append(args[0].reshape(-1, args[0].shape[-1]).shape[0])

        return hook

    hooks = [each.register_forward_pre_hook(note(path)) for path, each in products.items()]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _targets(path: str, product: Linear | GatedMlp) -> dict[str, ops.Target]:
    if isinstance(product, Linear):
        return {path: ops.Target(product.packed, 0, product.packed.rows)}
    assert product.gate_up is not None and product.down is not None
    inner = product.gate_up.intermediate_size
    return {
        f"{path}.gate_proj": ops.Target(product.gate_up, 0, inner),
        f"{path}.up_proj": ops.Target(product.gate_up, inner, 2 * inner),
        f"{path}.down_proj": ops.Target(product.down, 0, product.down.rows),
    }
