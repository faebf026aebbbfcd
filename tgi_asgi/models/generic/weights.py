"""Fills a module that has no weights: names and conversions come from `transformers`, packing is native.

Tensors that `transformers` only renames keep the file's own bytes, even if quantised; so do experts that it
stacks. Other conversions (joined or split projections) run through its own operations, as floats, one target
at a time.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import re
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tgi_asgi import ops
from tgi_asgi.errors import ModelLoadError
from tgi_asgi.models.generic.modules import GatedMlp, PackedModule
from tgi_asgi.models.loading import KEPT, NamedWeights
from tgi_asgi.ops.tensors import plain_tensor

# Tensors in older checkpoints that nothing reads: computed values and masks.
_UNUSED = re.compile(
    r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$|\.attn\.(bias|masked_bias)$|\.attention\.(bias|masked_bias)$"
    r"|\.attn\.causal_mask$|position_ids$|token_type_ids$"
)

_NATIVE = (PackedModule, GatedMlp)  # they hold packed weights, not tensors

Placed = ops.WeightSource | Tensor | Iterator[ops.WeightSource]
Place = Callable[[str, Placed], bool]  # see `Filler.fill`


@dataclass(slots=True)
class _Target:
    """One tensor of the module, and the file tensors that it is made from."""

    converter: Any = None
    sources: list[tuple[str, str]] = field(default_factory=list)  # (name, the converter's pattern)

    @property
    def is_stack(self) -> bool:
        """Whether it is a stack [n, rows, columns] of matrices, each one file tensor or several stacked."""
        from transformers.core_model_loading import Concatenate, MergeModulelist

        if self.converter is None or len(self.converter.target_patterns) > 1:
            return False
        steps = [(type(each), getattr(each, "dim", None)) for each in self.converter.operations]
        return steps in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)])

    def stacked(self) -> list[tuple[str, ...]]:
        """Return the file tensors of each matrix of a stack; empty if their numbers differ."""
        names: dict[str, list[str]] = {pattern: [] for pattern in self.converter.source_patterns}
        for name, pattern in self.sources:
            names.setdefault(pattern, []).append(name)
        columns = [found for found in names.values() if found]
        return list(zip(*columns, strict=True)) if len({len(each) for each in columns}) == 1 else []


def file_names(model: Any, names: Iterable[str]) -> dict[str, str]:
    """Return what a checkpoint calls the tensors of a module, by the module's names.

    Those that `transformers` makes of others (joins, splits, stacks) are left out.

    Args:
        names: Names of the checkpoint's tensors.
    """
    known = dict.fromkeys(model.state_dict(), True)
    renamed = _renamed(model, names, known)
    return {new: name for name, new, converter, _ in renamed if converter is None and new in known}


def _renamed(
    model: Any, names: Iterable[str], known: dict[str, bool], *, is_gguf: bool = False
) -> Iterator[tuple[str, str, Any, str | None]]:
    """Yield each tensor's name in the file and in the module, its converter and the pattern that found it.

    Args:
        known: The names of the module's tensors, as keys.
        is_gguf: Whether a GGUF file's reader has made the names, which are the module's where it can.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    mapping = get_model_conversion_mapping(model)
    renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
    converters = [each for each in mapping if isinstance(each, WeightConverter)]
    by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    prefix = model.base_model_prefix
    for name in sorted(names, key=dot_natural_key):
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, known)
        if name in known and (is_gguf or renamed not in known):
            renamed, pattern = rename_source_key(name, [], [], prefix, known)
        yield name, renamed, by_pattern[pattern] if pattern is not None else None, pattern


class Filler:
    """Passes each tensor of a checkpoint to the module that needs it.

        Filler(model, weights).fill(place)

    It must be created before any module is replaced, because names are matched against the module's current
    ones.

    Args:
        is_unused: Function that returns whether a tensor without a place, given by its name in the file, may
            be ignored.
    """

    def __init__(
        self,
        model: Any,
        weights: NamedWeights,
        *,
        is_unused: Callable[[str], bool] = lambda name: False,
    ) -> None:
        self._model, self._weights, self._is_unused = model, weights, is_unused
        state = model.state_dict()
        self._shapes = {name: tuple(value.shape) for name, value in state.items()}
        self._tables = {name for name, value in state.items() if not value.is_floating_point()}
        self._tied: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", None) or {})
        self._targets = self._plan()

    def _plan(self) -> dict[str, _Target]:
        known = dict.fromkeys(self._shapes, True)
        targets: dict[str, _Target] = {}
        names = self._weights.names()
        for name, renamed, converter, pattern in _renamed(
            self._model, names, known, is_gguf=self._weights.is_gguf
        ):
            if renamed not in known:
                self._check_unused(name)
                continue
            target = targets.setdefault(renamed, _Target())
            if pattern is not None and target.converter is None:
                target.converter = copy.deepcopy(converter)
            target.sources.append((name, pattern or name))
        return targets

    def _check_unused(self, name: str) -> None:
        """Refuse a tensor that the module has no place for, unless it is known to be unused."""
        ignored: Iterable[str] = getattr(self._model, "_keys_to_ignore_on_load_unexpected", None) or ()
        if _UNUSED.search(name) or any(re.search(pattern, name) for pattern in ignored):
            return
        if self._is_unused(name):
            return
        raise ModelLoadError(
            f"the model's files hold the tensor {name!r}, which {type(self._model).__name__} of transformers "
            "has no place for: the model would compute something else"
        )

    def fill(self, place: Place) -> None:
        """Load everything.

        Args:
            place: Function that accepts tensors of native modules and returns False for others. For a stack
                of matrices it receives an iterator over them, each as the file has it, which it may leave
                unused.

        Raises:
            ModelLoadError: if a tensor is missing, does not fit, or has no place.
        """
        given: set[str] = set()
        for name, target in self._targets.items():
            given.update(self._fill(place, name, target))
        self._tie(place, given)
        self._check_missing(given)

    def _fill(self, place: Place, name: str, target: _Target) -> Iterable[str]:
        """Load a target; return the names of the tensors made, as a conversion may make several."""
        if target.converter is None:
            if len(target.sources) > 1:
                raise ModelLoadError(f"{[each for each, _ in target.sources]} all map to {name!r}")
            source = target.sources[0][0]
            is_stack = len(self._shapes[name]) == 3 and self._weights.parts(source) == [source]
            if not (is_stack and place(name, self._slices(name, source))):
                self._give(place, name, self._stored(name, source))
            return [name]
        if self._fits_stack(name, target) and place(name, self._matrices(target)):
            return [name]
        converted = self._convert(name, target)
        for made, tensor in converted.items():
            self._give(place, made, tensor)
        return converted

    def names(self) -> list[str]:
        """Return the module's tensor names for which the files have a tensor, directly or by tying."""
        tied = [name for name, other in self._tied.items() if other in self._targets]
        return list(dict.fromkeys([*self._targets, *tied]))

    def source(self, name: str) -> ops.WeightSource:
        """Return the files' tensor for a tensor of the module, or for the one that it is tied to.

        Raises:
            ModelLoadError: if there is none, or it is made from several.
        """
        target = self._targets.get(name) or self._targets.get(self._tied.get(name, ""))
        if target is None:
            raise ModelLoadError(_missing(name))
        if target.converter is not None or len(target.sources) > 1:
            raise ModelLoadError(f"{name!r} is made from {[each for each, _ in target.sources]}")
        return self._weights.get(target.sources[0][0], self._shapes[name])

    def packed_tensors(self, packed: Container[str]) -> list[tuple[str, int]]:
        """Return formats and numbers of elements that the module will hold: `Weights.stored` for its tensors.

        Args:
            packed: Names of the tensors that are packed; torch keeps the others as float32.
        """
        stored = self._weights.stored()

        def counted(name: str, target: _Target) -> Iterator[tuple[str, int]]:
            keeps_bytes = target.converter is None or target.is_stack
            for source, _ in target.sources:
                parts = self._weights.parts(source)
                if name in packed and (keeps_bytes or parts == [source]):
                    yield from (stored[part] for part in parts)
                else:  # converted tensors are decoded first
                    yield "F32" if name in packed else KEPT, math.prod(self._weights.shape(source))

        found = [each for name, target in self._targets.items() for each in counted(name, target)]
        for name, source in self._tied.items():
            if name in self._targets or source not in self._targets:
                continue
            has_bias = any(f"{each.removesuffix('weight')}bias" in self._shapes for each in (name, source))
            if (name in packed) != (source in packed) or (name in packed and has_bias):  # see `_tie`
                found += counted(name, self._targets[source])
        return found

    def _stored(self, name: str, source: str) -> ops.WeightSource | Tensor:
        """Return a tensor of the file as it is; the module says whether it is a table of integers."""
        if name in self._tables:
            return torch.from_numpy(self._weights.integers(source, self._shapes[name]).copy())
        return self._weights.get(source, self._shapes[name])

    def _fits_stack(self, name: str, target: _Target) -> bool:
        """Return whether a target is a stack of matrices that fit; `_convert` says why others do not."""
        if not target.is_stack:
            return False
        found = set()
        rows = target.stacked()
        for each in rows:
            shapes = [self._weights.shape(source) for source in each]
            if any(len(shape) != 2 or shape[1] != shapes[0][1] for shape in shapes):
                return False
            found.add((len(rows), sum(shape[0] for shape in shapes), shapes[0][1]))
        return found == {self._shapes[name]}

    def _slices(self, name: str, source: str) -> Iterator[ops.WeightSource]:
        """Yield the matrices of a stack that the files have as one tensor."""
        shape = self._shapes[name]
        for index in range(shape[0]):
            found = self._weights.get(source, shape, slice(index, index + 1))
            yield dataclasses.replace(found, shape=shape[1:])

    def _matrices(self, target: _Target) -> Iterator[ops.WeightSource]:
        for names in target.stacked():
            parts = [self._weights.get(name, self._weights.shape(name)) for name in names]
            yield ops.stack_rows(parts)

    def _convert(self, name: str, target: _Target) -> dict[str, Tensor]:
        for source, pattern in target.sources:
            target.converter.add_tensor(name, source, pattern, lambda source=source: self._tensor(source))
        try:
            made = target.converter.convert(name, model=self._model, config=self._model.config)
        except ModelLoadError:
            raise
        except Exception as error:
            raise ModelLoadError(
                f"{name!r} cannot be converted from {target.sources[0][0]!r}: {error}"
            ) from error
        found = {key: value[0] if isinstance(value, list) else value for key, value in made.items()}
        for key, value in found.items():
            if key not in self._shapes or tuple(value.shape) != self._shapes[key]:
                raise ModelLoadError(
                    f"{key!r} has shape {list(value.shape)} after conversion, "
                    f"not {list(self._shapes.get(key, ()))}"
                )
        return found

    def _tensor(self, name: str) -> Tensor:
        """Return a tensor of the file in the dtype that it has there."""
        shape = self._weights.shape(name)
        return plain_tensor(self._weights.get(name, shape).in_order()).reshape(shape)

    def _give(self, place: Place, name: str, value: ops.WeightSource | Tensor) -> None:
        if place(name, value):
            return
        tensor = value if isinstance(value, Tensor) else plain_tensor(value.in_order())
        owner, leaf = owner_of(self._model, name)
        wanted = getattr(owner, leaf)
        tensor = tensor.reshape(wanted.shape)
        # 16 bits round what a class computes when it is created. MiniMax's tables of decays then contradict
        # each other, and a text continued from a state differs from one computed at once.
        is_made = leaf in owner._buffers and not wanted.is_meta
        if is_made and torch.equal(wanted.to(tensor.dtype), tensor):
            return
        tensor = tensor.to(wanted.dtype, copy=True)
        if leaf in owner._buffers:
            owner._buffers[leaf] = tensor
        else:
            owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)

    def _tie(self, place: Place, given: set[str]) -> None:
        """Fill tensors that the class ties, and the file lacks, from the tensors that they are tied to."""
        for name, source in self._tied.items():
            if name in given or source not in given:
                continue
            owner, leaf = _holder(self._model, name)
            other, other_leaf = _holder(self._model, source)
            both = isinstance(owner, PackedModule) and isinstance(other, PackedModule)
            if both and leaf == "weight" and owner.bias is None and other.bias is None:
                owner.made = other.made
            elif isinstance(owner, GatedMlp) and isinstance(other, GatedMlp):
                setattr(owner, leaf, getattr(other, other_leaf))
            elif not isinstance(owner, _NATIVE) and not isinstance(other, _NATIVE):
                owner._parameters[leaf] = getattr(other, other_leaf)
            else:
                source = self._targets[source].sources[0][0]
                self._give(place, name, self._weights.get(source, self._shapes[name]))
            given.add(name)

    def _check_missing(self, given: set[str]) -> None:
        ignored: Sequence[str] = getattr(self._model, "_keys_to_ignore_on_load_missing", None) or ()
        buffers = {name for name, _ in self._model.named_buffers()}
        for name in self._shapes:
            if name in given or name in buffers:
                continue
            is_unneeded = any(re.search(pattern, name) for pattern in ignored)
            if not self._compute(name, is_listed=is_unneeded) and not is_unneeded:
                raise ModelLoadError(_missing(name))

    def _compute(self, name: str, *, is_listed: bool) -> bool:
        """Fill a tensor that the class computes, such as a table of sines; return False if it does not.

        What the class draws at random stays without values: if it is used, the self-check fails.

        Args:
            is_listed: Whether the class says that files may lack the tensor. Otherwise only tables that have
                a function of their own are computed.
        """
        owner, leaf = _holder(self._model, name)
        value = owner._parameters.get(leaf)
        if value is None or not value.is_meta or not (is_listed or hasattr(owner, "create_weight")):
            return False
        made = []
        for seed in range(2):
            with torch.random.fork_rng(devices=[]):  # the host's only
                torch.manual_seed(seed)
                empty = torch.full(value.shape, torch.nan, dtype=value.dtype)
                owner._parameters[leaf] = nn.Parameter(empty, requires_grad=False)
                self._model._init_weights(owner)
            made.append(getattr(owner, leaf))
        is_computed = torch.equal(made[0], made[1])
        if not is_computed:
            owner._parameters[leaf] = value
        return is_computed


def _missing(name: str) -> str:
    return f"there is no tensor {name!r} in the model's files, which the model needs"


def _holder(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return the module that holds a tensor, and its attribute: a gated MLP has no modules of its own."""
    parent, _, product = name.rpartition(".")[0].rpartition(".")
    module = model.get_submodule(parent)
    if isinstance(module, GatedMlp):
        return module, "down" if product == "down_proj" else "gate_up"
    return owner_of(model, name)


def owner_of(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return the module that owns a tensor, and the tensor's name there."""
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf
