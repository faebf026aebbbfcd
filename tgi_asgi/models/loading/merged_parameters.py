"""Which tensors of a base model an adapter's `target_parameters` change: above all, those of experts.

`peft` wraps a module once for each of its parameters that an adapter changes, and a file names the wrappers,
not the parameters:

    target_parameters            gate_up_proj, down_proj
    the file                     mlp.experts.base_layer.lora_A    of the first parameter, the inmost
                                 mlp.experts.lora_A               of the last one
    the base                     mlp.experts.0.gate_proj.weight, mlp.experts.0.up_proj.weight, ...

A stack of experts has its matrices side by side: [rank * experts, columns] and [rows, rank * experts]. In the
first, an expert's rows are adjacent; in the second, its columns are as far apart as there are experts
(`ParamWrapper.get_delta_weight`, peft 0.21).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import accumulate
from math import prod
from typing import NamedTuple

from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats.peft import PeftAdapter, PeftTarget
from tgi_asgi.formats.weight_files import Checkpoint

_WRAPPED = ".base_layer"
# The parameters of experts, in their module's order, and what checkpoints call their tensors: one for each
# expert, or all experts in one.
_OF_EXPERTS = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
_EACH = {"gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")), "down_proj": (("down_proj",), ("w2",))}
_ALL = {"gate_up_proj": ".input_linear.weight", "down_proj": ".output_linear.weight"}


class Part(NamedTuple):
    """A tensor of the base, and which of a target's matrices change it.

    Attributes:
        expert: Its expert; None if the tensor has all experts, or there are none.
        first: The first of the target's rows that are the tensor's, if it is one expert's.
        num_rows: All of the target's rows, if the tensor is one expert's.
    """

    name: str
    num_matrices: int = 1
    expert: int | None = None
    first: int = 0
    num_rows: int = 0


class Parameters:
    """The parameters of a base model that an adapter changes.

    Args:
        name_in: Returns the base's name of a tensor, None if it has none.
    """

    def __init__(self, base: Checkpoint, adapter: PeftAdapter, name_in: Callable[[str], str | None]) -> None:
        self._base = base
        self._adapter = adapter
        self._name_in = name_in

    def resolve(self, target: PeftTarget) -> tuple[PeftTarget, list[Part]]:
        """Return a target with its scale, and the tensors that it changes: none if it is not a parameter.

        Raises:
            ModelLoadError: if the base has no such parameter.
        """
        module = target.module
        while module.endswith(_WRAPPED):
            module = module.removesuffix(_WRAPPED)
        num_outer = (len(target.module) - len(module)) // len(_WRAPPED)
        names = ("weight",) if self._find(f"{module}.weight") is not None else _OF_EXPERTS
        found = [(path, parts) for path in self._targeted(module, names) if (parts := self._parts(path))]
        if not found and names == ("weight",) and not num_outer:
            return self._adapter.of_parameter(target, module, 1), []
        if num_outer >= len(found):
            raise ModelLoadError(
                f"tensor {target.down.name!r}: the base model has no parameter that target_parameters names "
                "there, or stores it as codes"
            )
        path, parts = found[-1 - num_outer]
        return self._adapter.of_parameter(target, path, parts[0].num_matrices), parts

    def _targeted(self, module: str, names: tuple[str, ...]) -> Iterator[str]:
        """Return the paths of a module's parameters that the adapter names, in the module's order."""
        for path in (f"{module}.{name}" for name in names):
            if any(path == end or path.endswith(f".{end}") for end in self._adapter.parameters):
                yield path

    def _find(self, name: str) -> str | None:
        return self._name_in(name) or self._name_in(name.replace(".mlp.", ".block_sparse_moe."))

    def _parts(self, path: str) -> list[Part]:
        module, _, name = path.rpartition(".")
        whole = self._find(path)
        if whole is None and name in _ALL:
            whole = self._find(module.rpartition(".")[0] + _ALL[name])
        if whole is not None:
            shape = self._base.tensor(whole).shape
            return [Part(whole, shape[0] if len(shape) == 3 else 1)]
        for products in _EACH.get(name, ()):
            if experts := self._experts(module, products):
                return [
                    part
                    for index, names in enumerate(experts)
                    for part in self._of(index, names, len(experts))
                ]
        return []

    def _experts(self, module: str, products: tuple[str, ...]) -> list[list[str]]:
        """Return the names of each expert's products."""
        experts: list[list[str]] = []
        while True:
            names = [self._find(f"{module}.{len(experts)}.{product}.weight") for product in products]
            found = [name for name in names if name is not None]
            if len(found) < len(names):
                return experts
            experts.append(found)

    def _of(self, expert: int, names: list[str], num_experts: int) -> Iterator[Part]:
        """Return the parts of an expert, whose products are one below the other in the parameter."""
        ends = list(accumulate(prod(self._base.tensor(name).shape[:1]) for name in names))
        for name, first in zip(names, [0, *ends], strict=False):
            yield Part(name, num_experts, expert, first, ends[-1])
