"""IBM's Granite 3 with experts, and with an MLP shared by all tokens besides them (Granite 4 tiny)."""

from __future__ import annotations

from dataclasses import replace

from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.decoder import Decoder
from tgi_asgi.models.experts import ExpertNames
from tgi_asgi.models.families.granite import read_granite
from tgi_asgi.models.family import Family
from tgi_asgi.models.layer_weights import LayerWeights
from tgi_asgi.models.reader import Reader
from tgi_asgi.models.reading_experts import everywhere, read_experts, with_experts


def read_granite_moe(reader: Reader, architecture: str) -> ModelConfig:
    """Read the configuration of both."""
    reader.defaults(num_local_experts=8, num_experts_per_tok=2)
    # llama.cpp reads this key in files of dense and hybrid models alone.
    config = read_granite(reader.without("rope.scaling.finetuned"), architecture)
    experts = read_experts(
        reader, count="num_local_experts", top_k="num_experts_per_tok", size="intermediate_size",
        is_renormalised=True, shared_size=reader.integer("shared_intermediate_size", 0),
    )  # fmt: skip
    return replace(config, layers=with_experts(reader, config.layers, experts, everywhere))


_SHARED = ExpertNames(
    experts="block_sparse_moe.experts",
    is_joined=True,
    shared="shared_mlp",
    shared_joined="input_linear",
    shared_down="output_linear",
)


class GraniteMoeWeights(LayerWeights):
    """A layer whose experts are in two tensors, with IBM's names or those of `transformers` 5, or apart."""

    expert_names = (
        replace(
            _SHARED,
            router="block_sparse_moe.router.layer",
            joined="block_sparse_moe.input_linear.weight",
            joined_down="block_sparse_moe.output_linear.weight",
        ),
        replace(
            _SHARED,
            router="block_sparse_moe.router",
            joined="block_sparse_moe.experts.gate_up_proj",
            joined_down="block_sparse_moe.experts.down_proj",
        ),
        ExpertNames(),
    )


class GraniteMoe(Decoder):
    """The decoder with Granite's expert weights."""

    weights_class = GraniteMoeWeights


FAMILIES = tuple(
    Family(name, "granitemoe", read_granite_moe, GraniteMoe, is_rotary_permuted=True)
    for name in ("GraniteMoeForCausalLM", "GraniteMoeSharedForCausalLM")
)
