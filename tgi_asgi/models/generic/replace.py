"""Replaces plain modules of a model by native ones: products, embeddings, heads, experts, norms, activations.

A norm, an activation, an embedding or a gated MLP is replaced if the native one gives the same on random rows
(`probes.py`), and a product if no other code reads its matrix.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import Tensor, nn

from tgi_asgi import ops
from tgi_asgi.models.generic import experts
from tgi_asgi.models.generic.backend import backend_of
from tgi_asgi.models.generic.experts import ExpertsLoader
from tgi_asgi.models.generic.modules import (
    Activation,
    Embedding,
    GatedMlp,
    Head,
    Linear,
    Mode,
    Norm,
    PackedModule,
)
from tgi_asgi.models.generic.probes import (
    activation_of,
    eps_of,
    factor_of,
    gated_activation,
    is_layer_norm,
    is_linear,
    norm_offset,
)
from tgi_asgi.models.generic.source_code import reads_weight
from tgi_asgi.models.generic.weights import Placed, owner_of
from tgi_asgi.ops.arrays import Floats
from tgi_asgi.ops.tensors import from_tensor


class Replaced:
    """The native modules inserted into a model, and the weights that they still need.

        filler = Filler(model, weights)            # first, as it matches names of the model's own modules
        replaced = Replaced(model, arithmetic)     # without weights
        filler.fill(replaced.place)
        replaced.finish()                          # with weights

    Attributes:
        head: The module's head, which computes only the requested rows; set by `finish`.
        mode: How all of the modules compute.
    """

    def __init__(self, model: Any, arithmetic: ops.Arithmetic) -> None:
        is_exact = isinstance(arithmetic, ops.Packing) and arithmetic.is_exact
        self.mode = Mode(backend_of(arithmetic), is_exact)
        self._model, self._arithmetic = model, arithmetic
        self._waiting: dict[str, dict[str, Any]] = {}  # tensors so far, by path and leaf
        self._modules: dict[str, PackedModule] = {}
        self._transposed: set[str] = set()
        self._experts: dict[str, ExpertsLoader] = {}
        self._mlps: dict[str, GatedMlp] = {}
        self._vocabulary = _vocabulary_of(model)
        for path, module in list(model.named_modules()):
            self._replace_mlp(path, module)
        made: dict[int, PackedModule | None] = {}  # by id of a module, which may have several paths
        for path, module in list(model.named_modules(remove_duplicate=False)):
            if id(module) not in made:
                made[id(module)] = self._make(path, module)
            self._replace(path, module, made[id(module)])

    def _replace_mlp(self, path: str, module: nn.Module) -> None:
        activation = gated_activation(module)
        if activation is not None:
            self._mlps[path] = GatedMlp(activation, self.mode)
            owner, leaf = owner_of(self._model, path)
            setattr(owner, leaf, self._mlps[path])

    def _replace(self, path: str, module: nn.Module, made: PackedModule | None) -> None:
        if made is None:
            return
        if id(module) in self._vocabulary:
            self._vocabulary.add(id(made))
        self._modules[path] = made
        owner, leaf = owner_of(self._model, path)
        setattr(owner, leaf, made)

    def _make(self, path: str, module: Any) -> PackedModule | None:
        """Return the native module for a product or an embedding; None for any other module."""
        match _kind_of(self._model, path, module, self._vocabulary):
            case _Kind.EXPERTS:
                self._experts[path] = ExpertsLoader(module, self._arithmetic, self.mode)
            case _Kind.LINEAR:
                return Linear(
                    module.out_features, module.in_features, has_bias=module.bias is not None,
                    mode=self.mode,
                )  # fmt: skip
            case _Kind.CONV1D:
                columns, rows = module.weight.shape
                self._transposed.add(path)
                return Linear(rows, columns, has_bias=True, mode=self.mode)
            case _Kind.EMBEDDING:
                rows, columns = module.weight.shape
                factor = factor_of(module)
                assert factor is not None
                return Embedding(rows, columns, factor=factor, mode=self.mode)
        return None

    def _wrap_head(self) -> Head:
        inner = self._model.get_output_embeddings()
        for path, module in self._model.named_modules():
            if module is inner:
                head = Head(inner)
                owner, leaf = owner_of(self._model, path)
                owner._modules[leaf] = head
                return head
        raise ValueError("the model has no head")

    def place(self, name: str, value: Placed) -> bool:
        """Accept a tensor that belongs to a native module; return False if it belongs to none."""
        path, _, leaf = name.rpartition(".")
        if path in self._experts:
            return self._experts[path].place(leaf, value)
        if isinstance(value, Iterator):
            return False
        owner, _, product = path.rpartition(".")
        if owner in self._mlps:
            self._place_mlp(owner, product, _source(value))
            return True
        module = self._modules.get(path)
        if module is None:
            return False
        source = _source(value)
        if path in self._transposed and leaf == "weight":
            source = from_tensor(experts.tensor_of(source).T.contiguous())
        waiting = self._waiting.setdefault(path, {})
        waiting[leaf] = source
        if module.bias is None or len(waiting) == 2:
            module.made = ops.linear_weight(
                waiting["weight"], self._arithmetic, bias=waiting.get("bias"),
                is_vocabulary=id(module) in self._vocabulary,
            )  # fmt: skip
            del self._waiting[path]
        return True

    def _place_mlp(self, path: str, product: str, source: ops.WeightSource) -> None:
        mlp, waiting = self._mlps[path], self._waiting.setdefault(path, {})
        if product == "down_proj":
            mlp.down = ops.linear_weight(source, self._arithmetic)
            return
        waiting[product] = source
        if len(waiting) == 2:
            mlp.gate_up = ops.gate_up_weight(waiting["gate_proj"], waiting["up_proj"], self._arithmetic)
            del self._waiting[path]

    def finish(self) -> None:
        """Replace norms and activations, and wrap the head."""
        self.finish_rows()
        self.head = self._wrap_head()

    def finish_rows(self) -> None:
        """Replace the norms and activations that compute the same as native ones; requires weights."""
        if not self.mode.backend.has_row_kernels:
            return
        for path, module in list(self._model.named_modules()):
            norm = _norm_of(module) if "norm" in type(module).__name__.lower() else None
            activation = activation_of(module) if norm is None else None
            owner, leaf = owner_of(self._model, path)
            if norm is not None:
                setattr(owner, leaf, Norm(norm))
            elif activation is not None:
                setattr(owner, leaf, Activation(activation))


def _norm_of(module: nn.Module) -> ops.NormWeight | None:
    """Return a norm that computes the same as this module, if there is one."""
    offset, eps = norm_offset(module), eps_of(module)
    if eps is None:
        return None
    if offset is not None:
        return ops.NormWeight(_floats(module.get_parameter("weight")) + np.float32(offset), eps)
    if not is_layer_norm(module):
        return None
    weight, bias = _floats(module.get_parameter("weight")), module._parameters.get("bias")
    return ops.NormWeight.layer(weight.size, eps, weight=weight, bias=None if bias is None else _floats(bias))


def _floats(vector: Tensor) -> Floats:
    found: Floats = vector.detach().float().contiguous().numpy()
    return found


def _source(value: ops.WeightSource | Tensor) -> ops.WeightSource:
    return value if isinstance(value, ops.WeightSource) else from_tensor(value)


class _Kind(enum.Enum):
    """The kind of native module that replaces a module."""

    EXPERTS = "experts"
    LINEAR = "linear"
    CONV1D = "conv1d"
    EMBEDDING = "embedding"


def _kind_of(model: Any, path: str, module: Any, vocabulary: set[int]) -> _Kind | None:
    if experts.is_experts(module):
        return _Kind.EXPERTS
    if is_linear(module):
        return None if reads_weight(model, path) else _Kind.LINEAR
    if _is_conv1d(module):
        return None if reads_weight(model, path) else _Kind.CONV1D
    is_table = isinstance(module, nn.Embedding) and id(module) in vocabulary and len(module._parameters) == 1
    return _Kind.EMBEDDING if is_table and factor_of(module) is not None else None


def vocabulary_sizes(model: Any) -> tuple[int, ...]:
    """Return the numbers of elements of the embeddings and the head."""
    weights = (getattr(module, "weight", None) for module in _vocabulary(model))
    return tuple({weight.numel() for weight in weights if weight is not None})


def _vocabulary_of(model: Any) -> set[int]:
    return {id(module) for module in _vocabulary(model)}


def _vocabulary(model: Any) -> list[nn.Module]:
    """Return the embeddings and the head.

    Encoder and decoder may have embeddings of their own, and so may layers (Gemma 3n and 4).
    """
    found = [model.get_output_embeddings(), model.get_input_embeddings()]
    found += [module for path, module in model.named_modules() if path.endswith("embed_tokens_per_layer")]
    if getattr(model.config, "is_encoder_decoder", False):
        parts = (model.get_encoder(), model.get_decoder())
        found += [getattr(part, "embed_tokens", None) or part.get_input_embeddings() for part in parts]
        found.append(getattr(model.base_model, "shared", None))
    return [module for module in found if module is not None]


def packed_names(model: Any) -> set[str]:
    """Return the names of the matrices that `Replaced` would pack, for a model not yet replaced."""
    vocabulary = _vocabulary_of(model)
    kinds = {path: _kind_of(model, path, module, vocabulary) for path, module in model.named_modules()}
    leaves = {_Kind.EXPERTS: experts.LEAVES}
    return {
        f"{path}.{leaf}"
        for path, kind in kinds.items()
        if kind is not None
        for leaf in leaves.get(kind, ("weight",))
    }


def _is_conv1d(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return type(module) is Conv1D
