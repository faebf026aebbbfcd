"""Decoders of the common shape: detected in a module, rebuilt natively, and compared with its code.

The shape is that of `models/decoder.py`. Nothing is read from a configuration: sizes come from the module,
rotary frequencies from its buffers, windows and scales from discovery, and norms are probed for what they
compute. Then both versions run: one layer of each kind with its true weights, between the model's own
embedding, last norm and head. Only if the results are equal is the model computed like a native family, as
one recorded program.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tgi_asgi import ops
from tgi_asgi.errors import ModelLoadError
from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.decoder import Decoder
from tgi_asgi.models.family import Model, record
from tgi_asgi.models.generic.canonical_weights import CanonicalWeights
from tgi_asgi.models.generic.discover import AttentionLayer
from tgi_asgi.models.generic.probes import activation_of, eps_of, norm_offset
from tgi_asgi.models.generic.weights import owner_of
from tgi_asgi.models.generic.zeros import arguments
from tgi_asgi.models.layer_spec import LayerSpec, RopeScaling, RopeSpec
from tgi_asgi.models.loading import NamedWeights
from tgi_asgi.ops.tensors import plain_tensor

logger = logging.getLogger(__name__)

_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_HEAD_NORMS = {"q_norm", "k_norm"}
_MLP = {"gate_proj", "up_proj", "down_proj"}
_LENGTH = 29  # number of tokens run through both versions
_SOME_ROWS = 512  # rows of the embedding and the head: enough for the comparison
_BLOCK = 16
_LARGEST = 1e-3  # allowed difference of logits, relative to the largest logit


class CommonDecoder:
    """A module that appears to be a decoder of the common shape.

        common = CommonDecoder.find(module, layers, max_positions)
        if common is not None and (config := common.verified(weights)) is not None:
            model = common.load(config, weights, arithmetic)

    Attributes:
        config: Configuration read from the module's sizes and buffers.
    """

    def __init__(self, module: Any, layers: Sequence[AttentionLayer], max_positions: int) -> None:
        self._module, self._max_positions = module, max_positions
        self._decoder = module.get_decoder()
        self._offset = self._norm_offset()
        self.config = self._read(layers)

    @classmethod
    def find(cls, module: Any, layers: Sequence[AttentionLayer], max_positions: int) -> CommonDecoder | None:
        """Return the module as such a decoder; None if it is not one."""
        try:
            return cls(module, layers, max_positions)
        except (_NotCommon, AttributeError, ModelLoadError, NotImplementedError) as reason:
            logger.debug("%s is not of the common shape: %s", type(module).__name__, reason)
            return None

    def _read(self, layers: Sequence[AttentionLayer]) -> ModelConfig:
        decoder, head = self._decoder, self._module.get_output_embeddings()
        _expect({"embed_tokens", "layers", "norm"} <= set(dict(decoder.named_children())), "other parts")
        _expect(
            len(decoder.layers) == len(layers), "the number of attention calls is not the number of layers"
        )
        _expect(type(head) is nn.Linear and head.bias is None, "another head")
        kinds = [self._read_layer(layer) for layer in decoder.layers]
        _expect(len(set(kinds)) == 1, "layers of several shapes")
        shape = dict(kinds[0])
        for found in layers:
            _expect(
                (found.num_heads, found.num_kv_heads, found.head_dim)
                == (shape["num_heads"], shape["num_kv_heads"], shape["head_dim"]),
                "heads that do not match the products",
            )
            _expect(found.is_plain and found.rule.chunk is None, "another attention")
        rope = self._rope()
        specs = tuple(LayerSpec(rope, found.rule.window, found.scale) for found in layers)
        rows, hidden = decoder.embed_tokens.weight.shape
        return ModelConfig(
            architecture=type(self._module).__name__,
            vocab_size=rows,
            hidden_size=hidden,
            context_length=self._max_positions,
            layers=specs,
            has_tied_embeddings=self._is_tied(),
            **shape,
        )

    def _read_layer(self, layer: nn.Module) -> tuple[tuple[str, Any], ...]:
        children = dict(layer.named_children())
        _expect(set(children) == _LAYER, "layers with other parts")
        attention: Any = children["self_attn"]
        mlp: Any = children["mlp"]
        products = {name for name, child in attention.named_children() if type(child) is nn.Linear}
        others = {name for name, _ in attention.named_children()} - products
        _expect(products == _ATTENTION and others in (set(), _HEAD_NORMS), "another attention")
        _expect(
            {name for name, child in mlp.named_children() if type(child) is nn.Linear} == _MLP, "another MLP"
        )
        biases = [attention.get_submodule(name).bias is not None for name in ("q_proj", "k_proj", "v_proj")]
        mlp_biases = [mlp.get_submodule(name).bias is not None for name in _MLP]
        _expect(len(set(biases)) == 1 and len(set(mlp_biases)) == 1, "biases in only some products")
        eps = {eps_of(module) for name, module in layer.named_modules() if name.endswith("norm")}
        eps.add(eps_of(self._decoder.norm))
        _expect(len(eps) == 1, "norms with different eps")
        head_dim = int(attention.head_dim)
        shape = {
            "intermediate_size": mlp.gate_proj.out_features,
            "num_heads": attention.q_proj.out_features // head_dim,
            "num_kv_heads": attention.k_proj.out_features // head_dim,
            "head_dim": head_dim,
            "norm_eps": eps.pop(),
            "activation": _activation(mlp),
            "has_qkv_bias": biases[0],
            "has_output_bias": attention.o_proj.bias is not None,
            "has_mlp_bias": mlp_biases[0],
            "has_qk_norm": bool(others),
        }
        return tuple(shape.items())

    def _rope(self) -> RopeSpec:
        rotary = self._decoder.rotary_emb
        frequencies = tuple(rotary.inv_freq.float().tolist())
        factor = float(rotary.attention_scaling)
        scaling = None if factor == 1 else RopeScaling("linear", attention_factor=factor)
        return RopeSpec(2 * len(frequencies), 1.0, scaling, frequencies)

    def _norm_offset(self) -> float:
        """Return what norms add to their weights, 0 or 1; all norms must add the same."""
        norms = [module for name, module in self._decoder.named_modules() if name.endswith("norm")]
        offsets = {norm_offset(module) for module in norms}
        _expect(len(offsets) == 1 and None not in offsets, "norms that are not RMSNorm")
        return float(offsets.pop() or 0)

    def _is_tied(self) -> bool:
        tied: dict[str, str] = getattr(self._module, "all_tied_weights_keys", None) or {}
        return any(name.startswith("lm_head.") for name in tied)

    def verified(self, weights: NamedWeights) -> ModelConfig | None:
        """Run a layer of each kind through both versions on random tokens.

        Returns:
            The configuration with the factor of the embeddings, which is measured here; None if the versions
            disagree.
        """
        chosen = self._kinds()
        rows = min(_SOME_ROWS, self.config.vocab_size)
        source = CanonicalWeights(self._module, weights, chosen, self._offset, rows)
        ids = np.random.default_rng(0).integers(0, rows, _LENGTH)
        config = replace(
            self.config, layers=tuple(self.config.layers[index] for index in chosen), vocab_size=rows
        )
        try:
            first, expected = self._own(source, chosen, ids)
            table = plain_tensor(source.get("model.embed_tokens.weight", (rows, config.hidden_size)))
            factor = _ratio(first, table[torch.from_numpy(ids)].float())
            config = replace(config, embedding_factor=factor)
            found = _run(Decoder(config, source, ops.Packing(is_exact=True), self._max_positions), ids)
        except (ModelLoadError, LookupError, RuntimeError, TypeError, ValueError) as reason:
            logger.debug("%s is not of the common shape: %s", config.architecture, reason)
            return None
        difference = float((found - expected).abs().max() / expected.abs().max())
        logger.debug("%s differs from the common shape by %.2g", config.architecture, difference)
        return replace(self.config, embedding_factor=factor) if difference <= _LARGEST else None

    def load(self, config: ModelConfig, weights: NamedWeights, arithmetic: ops.Arithmetic) -> Model:
        """Build the model of a verified configuration from native operators, with all layers."""
        everything = list(range(config.num_layers))
        source = CanonicalWeights(self._module, weights, everything, self._offset, config.vocab_size)
        model = Decoder(config, source, arithmetic, self._max_positions)
        model.path = source.prefix
        return model

    def _kinds(self) -> list[int]:
        """Return the index of the first layer of each kind."""
        found: dict[Any, int] = {}
        for index, (layer, spec) in enumerate(zip(self._decoder.layers, self.config.layers, strict=True)):
            plain = [
                (path, name, value)
                for path, module in layer.named_modules()
                for name, value in vars(module).items()
                if isinstance(value, (bool, int, float, str, type(None))) and name != "layer_idx"
            ]
            found.setdefault((spec, tuple(sorted(plain, key=str))), index)
        return list(found.values())

    def _own(self, source: CanonicalWeights, chosen: Sequence[int], ids: Any) -> tuple[Tensor, Tensor]:
        """Run the module's own code on these layers only; return the first one's input, and the logits."""
        seen: list[Tensor] = []
        decoder, config = self._decoder, self._decoder.config
        kept, types = decoder.layers, getattr(config, "layer_types", None)
        parameters = [
            (owner, name, value)
            for owner in self._module.modules()
            for name, value in owner._parameters.items()
        ]
        try:
            for name, tensor in source.own_tensors():
                owner, leaf = owner_of(self._module, name)
                owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
            decoder.layers = nn.ModuleList(kept[index] for index in chosen)
            if types is not None:
                config.__dict__["layer_types"] = [types[index] for index in chosen]
            given = arguments(self._module, input_ids=torch.from_numpy(ids)[None], use_cache=False)
            hook = decoder.layers[0].register_forward_pre_hook(
                lambda layer, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]),
                with_kwargs=True,
            )
            try:
                with torch.inference_mode():
                    logits: Tensor = self._module(**given).logits[0].float()
            finally:
                hook.remove()
            self._check_positions(given, logits)
            return seen[0][0], logits
        finally:
            decoder.layers = kept
            if types is not None:
                config.__dict__["layer_types"] = types
            for owner, name, value in parameters:
                owner._parameters[name] = value

    def _check_positions(self, given: dict[str, Any], logits: Tensor) -> None:
        """Raise if positions affect more than the rotation of queries and keys.

        The check uses the last positions served: Ministral 3 multiplies queries by a factor that is 1 up to
        position 16,384.

        Raises:
            ValueError: if tokens at the last positions, rotated like those at the first, give other logits.
        """
        shift = max(self._max_positions - len(logits), 0)
        rotary, rotate = self._decoder.rotary_emb, self._decoder.rotary_emb.forward
        last = torch.arange(len(logits))[None] + shift
        rotary.forward = lambda x, position_ids, *args, **kwargs: rotate(
            x, position_ids - shift, *args, **kwargs
        )
        try:
            with torch.inference_mode():
                found = self._module(**given, position_ids=last).logits[0].float()
        finally:
            del rotary.forward
        if not torch.allclose(found, logits, rtol=1e-5, atol=1e-6 * float(logits.abs().max())):
            raise ValueError("positions affect more than the rotation of queries and keys")


def _ratio(found: Tensor, rows: Tensor) -> float:
    """Return the factor by which rows were multiplied."""
    factor = float((found * rows).sum() / (rows * rows).sum())
    if not torch.allclose(found, factor * rows, rtol=1e-5, atol=1e-7):
        raise ValueError("the embedding is not a number times its rows")
    return factor


class _NotCommon(Exception):
    """Raised when a module is not of the common shape."""


def _expect(holds: object, reason: str) -> None:
    if not holds:
        raise _NotCommon(reason)


def _activation(mlp: Any) -> str:
    """Return the name of an MLP's activation, identified by its outputs."""
    name = activation_of(mlp.act_fn) if isinstance(mlp.act_fn, nn.Module) else None
    if name is None:
        raise _NotCommon("another activation")
    return name


def _run(model: Model, ids: Any) -> Tensor:
    """Return a native model's logits for these tokens."""
    config = model.config
    num_blocks = -(-len(ids) // _BLOCK)
    pool = ops.KvPool(config.caches, num_blocks=num_blocks, block_size=_BLOCK, dtype="float32")
    program = ops.CpuProgram(
        record(model, pool.layers),
        ops.StepLimits(
            max_tokens=len(ids), max_sequences=1, max_rows=len(ids), max_context=num_blocks * _BLOCK
        ),
    )
    positions = np.arange(len(ids))
    batch = ops.FlatRows(
        ids=ids, positions=positions, slots=positions, query_start=[0, len(ids)], context_len=[len(ids)],
        block_table=np.arange(num_blocks, dtype=np.int32)[None],
    )  # fmt: skip
    return torch.from_numpy(program.run(batch, range(len(ids))).copy())
