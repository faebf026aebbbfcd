"""Maps a model's products to the LoRA adapters that may change them, and loads adapter files.

Names are those of `transformers`, as `peft` writes them, whatever file format the model itself has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from tgi_asgi import ops
from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats.peft import PeftAdapter, PeftTarget
from tgi_asgi.formats.safetensors import SafeTensor
from tgi_asgi.models.adapter_cut import TargetCut
from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.decoder import Decoder
from tgi_asgi.models.layers import Layer
from tgi_asgi.models.loading.open import ServedModel
from tgi_asgi.ops.arrays import Floats

_HEADER_BYTES = 2048  # per module, for the header entries of its two matrices and other metadata
# Why no adapter can change a module, by a part of its path.
_REASONS = {
    "experts": "experts of a mixture are not changed by adapters",
    "shared_expert": "the MLP beside a mixture's experts is not changed by adapters",
    "shared_mlp": "the MLP beside a mixture's experts is not changed by adapters",
    "vision_": "the encoder of images is not changed by adapters",
    "visual": "the encoder of images is not changed by adapters",
    "projector": "what turns images into embeddings is not changed by adapters",
    "embed": "an embedding is not changed by adapters",
    "wte": "an embedding is not changed by adapters",
    "lm_head": "the head is not changed by adapters",
    "kv_b_proj": "the product that expands latents to keys and values is not changed by adapters",
    ".in_proj_": "this product of recurrent layers is kept in another form and not changed by adapters",
}
# Of vision models before transformers 4.52: Gemma 3 and LLaVA, and Qwen 2-VL and 2.5-VL. Of Nemotron-H in the
# code that comes with its checkpoints.
_FORMER_PREFIXES = (
    ("language_model.model.", "model.language_model."),
    ("model.", "model.language_model."),
    ("visual.", "model.visual."),
    ("vision_tower.", "model.vision_tower."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
    ("backbone.", "model."),
)


class AdapterLayout(Protocol):
    """A device's layout of adapters: `ops.AdapterLayout` of a CPU, `CudaAdapterLayout` of a GPU."""

    targets: dict[str, ops.Target]
    max_rank: int
    rank_factor: int

    def pack(self, deltas: Mapping[str, ops.Delta], number: int = 0) -> Any: ...


_Layout = TypeVar("_Layout", bound=AdapterLayout)


@dataclass(frozen=True, slots=True)
class LoadedAdapter:
    """An adapter in memory.

    Attributes:
        digest: Digest of its files; adapters with equal digests compute the same.
        rank: Largest rank of its matrices.
    """

    weights: Any  # as the device's layout packs them; a row of a step names them
    digest: bytes
    rank: int
    num_bytes: int


class AdapterLoader(Generic[_Layout]):
    """Loads adapters for one model.

        loader = AdapterLoader(ops.AdapterLayout(targets_of(model), max_rank=16))
        program = make_program(model, ..., adapters=loader.layout)
        loader.load(Path("/adapters/sql")).weights      # any thread

    Attributes:
        max_bytes: Approximate memory of an adapter that changes every product at the largest rank; of a
            shard's part, if the model is split.
    """

    def __init__(self, layout: _Layout) -> None:
        self.layout = layout
        targets, rank = layout.targets.values(), layout.max_rank
        self.max_bytes = 2 * rank * _elements_of_rank_one(targets, _held_elements) * layout.rank_factor
        elements = rank * _elements_of_rank_one(targets, _whole_elements)
        self._max_file_bytes = 4 * elements + _HEADER_BYTES * len(self.layout.targets)

    def load(self, directory: Path, number: int = 0) -> LoadedAdapter:
        """Read an adapter's directory; the files are closed when this returns.

        Args:
            number: What steps call it when they are sent to other shards.

        Raises:
            ModelLoadError: if a file is missing or damaged, belongs to another base model, or asks for
                something unsupported; the message names the tensor.
        """
        why = f": adapters of this model need no more with --max-lora-rank {self.layout.max_rank}"
        adapter = PeftAdapter(directory, self._max_file_bytes, why)
        try:
            targets = [self._renamed(target) for target in adapter.targets]
            for target in targets:
                self._check(target)
            deltas = {
                target.module: ops.Delta(
                    _floats(adapter, target.down), _floats(adapter, target.up), target.scale
                )
                for target in targets
            }
            weights = self.layout.pack(deltas, number)
        except (ModelLoadError, ValueError) as error:
            raise ModelLoadError(f"{directory}: {error}") from None
        finally:
            adapter.close()
        rank = max(target.rank for target in targets)
        return LoadedAdapter(weights, adapter.digest, rank, weights.num_bytes)

    def _renamed(self, target: PeftTarget) -> PeftTarget:
        """Return a target with today's name of its module, if the model only knows that one."""
        if target.module in self.layout.targets:
            return target
        for old, new in _FORMER_PREFIXES:
            name = new + target.module.removeprefix(old)
            if target.module.startswith(old) and name in self.layout.targets:
                return replace(target, module=name)
        return target

    def _check(self, target: PeftTarget) -> None:
        """Refuse a tensor that does not fit, before reading it."""
        known = self.layout.targets.get(target.module)
        if known is None:
            parts = target.module.lower()
            reason = next((each for part, each in _REASONS.items() if part in parts), None)
            raise ModelLoadError(
                f"tensor {target.down.name!r}: "
                + (reason or "the model has no such product, or none that adapters can change")
            )
        rows, columns = known.shape
        for tensor, shape in ((target.down, (target.rank, columns)), (target.up, (rows, target.rank))):
            if tensor.shape != shape:
                raise ModelLoadError(
                    f"tensor {tensor.name!r} has the shape {list(tensor.shape)}, this model's product needs "
                    f"{list(shape)}: is the adapter of another base?"
                )
        if target.rank > self.layout.max_rank:
            raise ModelLoadError(
                f"tensor {target.down.name!r} has the rank {target.rank}; --max-lora-rank allows "
                f"{self.layout.max_rank}"
            )


def _floats(adapter: PeftAdapter, tensor: SafeTensor) -> Floats:
    return ops.decode(ops.WeightSource(adapter.raw(tensor), tensor.dtype, tensor.shape))


def _held_elements(target: ops.Target) -> int:
    return target.stop - target.start + target.weight.columns


def _whole_elements(target: ops.Target) -> int:
    return _held_elements(target) if target.uncut is None else sum(target.uncut)


def _elements_of_rank_one(targets: Iterable[ops.Target], elements_of: Callable[[ops.Target], int]) -> int:
    """Return the number of elements of a rank-1 adapter on all products, counting fused products once."""
    groups: dict[int, list[ops.Target]] = {}
    for target in (part for each in targets for part in each.parts):
        groups.setdefault(id(target.weight), []).append(target)
    total = 0
    for group in groups.values():
        num_rows = max(target.stop for target in group)
        apart = [target for target in group if target.stop - target.start < num_rows]
        total += sum(map(elements_of, apart or group))
    return total


def targets_of(model: ServedModel) -> Mapping[str, ops.Target]:
    """Return the products of a model that adapters may change, by module path.

    Raises:
        ModelLoadError: if there are none; the message says why.
    """
    found: Mapping[str, ops.Target] = {}
    reason = "it has no product that they can change"
    if isinstance(model, Decoder):
        found = _decoder_targets(model)
    elif model.kind != "generic":
        reason = "it generates no text"
    elif model.config.encoder_decoder is not None:
        reason = model.config.sequential_reason
    elif model.config.sequential_reason:
        reason = (
            f"it runs by transformers' own code, one sequence at a time ({model.config.sequential_reason})"
        )
    else:
        from tgi_asgi.models.generic.steps import adapter_targets  # imports torch

        found = adapter_targets(model)
    if not found:
        raise ModelLoadError(f"{model.config.architecture} takes no adapters: {reason}")
    return found


def _decoder_targets(model: Decoder) -> dict[str, ops.Target]:
    """Return a decoder's products: single matrices, and fused ones under their usual names."""
    found = {name: ops.Target.whole(weight) for name, weight in model.products.items()}
    for index, layer in enumerate(model.layers):
        of_layer = {name: ops.Target.whole(weight) for name, weight in layer.products.items()}
        if layer.recurrent is not None:
            of_layer |= layer.recurrent.targets
        if layer.latent is not None:
            output = ops.Target(layer.output, 0, layer.config.hidden_size)
            of_layer |= {**layer.latent.targets, "self_attn.o_proj": output}
        elif layer.spec.attends:
            of_layer |= _attention_targets(layer)
        if layer.has_mlp:
            of_layer |= _mlp_targets(layer)
        found |= {f"model.layers.{index}.{name}": target for name, target in of_layer.items()}
    whole = dict(_under_path(model, name, target) for name, target in found.items())
    if model.config.cut is None:
        return whole
    cut = TargetCut(model.layers, model.config.cut)
    return {path: cut(target) for path, target in whole.items()}


def _attention_targets(layer: Layer) -> dict[str, ops.Target]:
    config, spec = layer.config, layer.spec
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    ends = (0, queries, queries + keys, queries + 2 * keys)
    found = {
        "self_attn.q_proj": ops.Target(layer.qkv, ends[0], ends[1]),
        "self_attn.k_proj": ops.Target(layer.qkv, ends[1], ends[2]),
        "self_attn.v_proj": ops.Target(layer.qkv, ends[2], ends[3]),
        "self_attn.qkv_proj": ops.Target(layer.qkv, 0, ends[3]),
        "self_attn.o_proj": ops.Target(layer.output, 0, config.hidden_size),
    }
    if not spec.has_cache or spec.values_are_keys:
        for name in ("k_proj", "v_proj", "qkv_proj"):
            del found[f"self_attn.{name}"]
    if spec.values_are_keys:
        both = np.tile(np.arange(keys), 2)
        found["self_attn.k_proj"] = ops.Target(layer.qkv, ends[1], ends[3], both)
    if layer.gate is not None and config.has_output_gate:
        del found["self_attn.qkv_proj"]
        found["self_attn.q_proj"] = _gated_queries(layer.qkv, layer.gate, config)
    return found


def _mlp_targets(layer: Layer) -> dict[str, ops.Target]:
    inner = layer.config.intermediate_size
    found = {
        "mlp.up_proj": ops.Target(layer.up, 0, inner),
        "mlp.down_proj": ops.Target(layer.down, 0, layer.config.hidden_size),
    }
    if isinstance(layer.up, ops.GateUpWeight):
        found |= {
            "mlp.gate_proj": ops.Target(layer.up, 0, inner),
            "mlp.up_proj": ops.Target(layer.up, inner, 2 * inner),
            "mlp.gate_up_proj": ops.Target(layer.up, 0, 2 * inner),
        }
    return found


def _gated_queries(qkv: ops.QkvWeight, gate: ops.LinearWeight, config: ModelConfig) -> ops.Target:
    """Return `q_proj` where each head's rows are those of its queries, then those of its gates."""
    heads = np.arange(2 * config.num_heads * config.head_dim).reshape(config.num_heads, 2, config.head_dim)
    queries, gates = heads[:, 0].reshape(-1), heads[:, 1].reshape(-1)
    return ops.Target(qkv, 0, len(queries), queries, (ops.Target(gate, 0, len(gates), gates),))


def _under_path(model: Decoder, name: str, target: ops.Target) -> tuple[str, ops.Target]:
    """Return a target's module path in the model's checkpoint, and the target in its order of rows."""
    path = model.checkpoint.module(name).replace("model.", f"{model.path}.", 1)
    order = model.checkpoint.row_order(model.config, name)
    return path, target if order is None else replace(target, order=order)
