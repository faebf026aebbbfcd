"""How a layer's weights are read, for `layers.py`.

A family whose weights have other names or another order overrides `LayerWeights` (`families/phi3.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from tgi_asgi import ops
from tgi_asgi.models import cutting
from tgi_asgi.models.experts import ExpertNames, ExpertProducts, Experts, read_products
from tgi_asgi.models.latent import LatentAttention
from tgi_asgi.models.layer_spec import ExpertsSpec
from tgi_asgi.models.layer_tensors import LayerTensors, Sources
from tgi_asgi.models.recurrent import Recurrent, make_recurrent
from tgi_asgi.ops.arrays import Floats


class LayerWeights(LayerTensors):
    """The weights of one layer.

    Attributes:
        expert_names: Candidate names of experts; the first whose router exists is used.
        has_whole_norms: Whether queries and keys are normalised over all heads together.
    """

    expert_names: tuple[ExpertNames, ...] = (ExpertNames(),)
    has_whole_norms = False

    def qkv_sources(self) -> Sources:
        """Return the matrices of q, k and v."""
        names = self._heads()
        queries = [self._queries(0)] if self.config.has_output_gate else []
        hidden = self.config.hidden_size
        return queries + [
            self.get(f"self_attn.{name}.weight", rows, hidden) for name, rows in names[len(queries) :]
        ]

    def qkv_biases(self) -> Sources | None:
        """Return the biases of q, k and v, if they have any."""
        if not self.config.has_qkv_bias:
            return None
        return [self.get(f"self_attn.{name}.bias", rows) for name, rows in self._heads()]

    def gate_up_sources(self) -> Sources:
        """Return the matrices of gate and up."""
        shape = (self.config.intermediate_size, self.config.hidden_size)
        return [self.get(f"mlp.{name}.weight", *shape) for name in ("gate_proj", "up_proj")]

    def gate_up_biases(self) -> Sources | None:
        """Return the biases of gate and up, if they have any."""
        if not self.config.has_mlp_bias:
            return None
        return [
            self.get(f"mlp.{name}.bias", self.config.intermediate_size) for name in ("gate_proj", "up_proj")
        ]

    def norms(self) -> ops.HeadNorms | None:
        """Return the norms of queries and keys, if there are any; by default one norm per head."""
        config = self.config
        if not config.has_qk_norm:
            return None
        query = key = self.norm("self_attn.q_norm", config.head_dim)
        if self.spec.has_cache:
            key = self.norm("self_attn.k_norm", config.head_dim)
        return ops.HeadNorms(query, key, is_last=config.has_late_qk_norm, has_values=config.has_value_norm)

    def qkv(self) -> ops.QkvWeight:
        """Make the weight of `ops.qkv`."""
        config, rope, cut = self.config, self.spec.rope, self.config.cut
        heads = ops.QkvHeads(
            config.num_heads, config.num_kv_heads, config.head_dim,
            rotary_dim=config.head_dim if rope is None else rope.dim,
            is_interleaved=config.has_interleaved_rope,
            is_proportional=rope is not None and rope.whole_dim is not None,
            has_keys=self.spec.has_cache,
        )  # fmt: skip
        sources, biases, norms = self.qkv_sources(), self.qkv_biases(), self.norms()
        if cut is not None:
            heads = replace(heads, num_heads=len(cut.heads), num_kv_heads=len(cut.kv_heads))
            rows = cutting.qkv_rows(cut, config.head_dim)
            sources = cutting.rows_of(sources, rows)
            biases = None if biases is None else cutting.rows_of(biases, rows)
            norms = None if norms is None else cutting.norms_of(norms, cut, config.head_dim)
        return ops.qkv_weight(sources, self.arithmetic, heads, biases=biases, norms=norms)

    def output_gate(self) -> ops.LinearWeight | None:
        """Make the weight of the gates on heads' results, if there are any."""
        return ops.linear_weight(self._queries(1), self.arithmetic) if self.config.has_output_gate else None

    def sinks(self) -> Floats | None:
        """Return the heads' attention sinks [num_heads] float32, if there are any."""
        return ops.vector(self.get("self_attn.sinks", self.config.num_heads)) if self.spec.has_sinks else None

    def up(self) -> ops.LinearWeight:
        """Make the weight of `ops.up`."""
        config, cut = self.config, self.config.cut
        sizes, part = (config.intermediate_size, config.hidden_size), None if cut is None else cut.inner
        return self.linear_rows("mlp.up_proj", *sizes, part, has_bias=config.has_mlp_bias)

    def gate_up(self) -> ops.GateUpWeight:
        """Make the weight of `ops.gate_up`."""
        sources, biases, cut = self.gate_up_sources(), self.gate_up_biases(), self.config.cut
        if cut is not None:
            sources = cutting.rows_of(sources, [cut.inner] * 2)
            biases = None if biases is None else cutting.rows_of(biases, [cut.inner] * 2)
        gate, up = sources
        return ops.gate_up_weight(gate, up, self.arithmetic, biases=biases)

    def experts(self) -> Experts | None:
        """Make the layer's experts, if it has them instead of an MLP."""
        if self.spec.experts is None:
            return None
        found = (names for names in self.expert_names if self.has(f"{names.router}.weight"))
        names = next(found, self.expert_names[0])
        return Experts(self, names, self.spec.experts, self.expert_products(names, self.spec.experts))

    def recurrent(self) -> Recurrent | None:
        """Make the layer's recurrent part, if it has one instead of attention or in parallel to it."""
        return None if self.spec.recurrent is None else make_recurrent(self, self.spec.recurrent)

    def latent(self) -> LatentAttention | None:
        """Make the layer's latent attention, if it uses that."""
        return None if self.spec.latent is None else LatentAttention(self, self.spec.latent)

    def expert_products(self, names: ExpertNames, spec: ExpertsSpec) -> Iterator[ExpertProducts]:
        """Yield gate and up, and down, of each expert in turn."""
        return read_products(self, names, spec)

    def _queries(self, part: int) -> ops.WeightSource:
        """Return the rows of heads' queries (part 0) or gates (part 1), which follow each head's query."""
        heads, dim = self.config.num_heads, self.config.head_dim
        rows = np.arange(2 * heads * dim).reshape(heads, 2, dim)[:, part].reshape(-1)
        return self.get("self_attn.q_proj.weight", 2 * len(rows), self.config.hidden_size).in_rows(rows)

    def _heads(self) -> tuple[tuple[str, int], ...]:
        keys = self.config.num_kv_heads * self.config.head_dim
        queries = ("q_proj", self.config.num_heads * self.config.head_dim)
        if not self.spec.has_cache:
            return (queries,)
        value = "k_proj" if self.spec.values_are_keys else "v_proj"
        return (queries, ("k_proj", keys), (value, keys))
