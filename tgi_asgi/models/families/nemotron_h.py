"""NVIDIA's Nemotron-H, Nemotron Nano 2 and Nemotron 3: layers are Mamba-2, attention, an MLP or experts.

Attention has no positions. MLPs and experts have no gates. Experts may be narrower than the residual: one
product leads to their inputs, and another back from their results.

Source: NVIDIA, Nemotron-H, arXiv 2504.03624; `transformers.models.nemotron_h`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tgi_asgi.errors import check
from tgi_asgi.models.checkpoint import CheckpointLayout
from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.config_bounds import MAX_LAYERS, check_computed
from tgi_asgi.models.decoder import Decoder
from tgi_asgi.models.experts import ExpertNames
from tgi_asgi.models.family import Family
from tgi_asgi.models.gguf_modules.nemotron_h import NAMES
from tgi_asgi.models.layer_spec import ExpertsSpec, LayerSpec
from tgi_asgi.models.layer_weights import LayerWeights
from tgi_asgi.models.layers import SinglePartLayer
from tgi_asgi.models.reader import Reader
from tgi_asgi.models.reading import read_sizes
from tgi_asgi.models.reading_experts import read_corrected
from tgi_asgi.models.reading_mamba import read_heads_of_states

_STATE, _ATTENTION, _MLP, _EXPERTS = "linear_attention", "full_attention", "mlp", "moe"
_LETTERS = {"M": _STATE, "*": _ATTENTION, "-": _MLP, "E": _EXPERTS}
_FORMER = {"mamba": _STATE, "attention": _ATTENTION}


def read_nemotron_h(reader: Reader, architecture: str) -> ModelConfig:
    """Read Nemotron-H's configuration."""
    kinds = _read_kinds(reader)
    reader.replace("num_hidden_layers", len(kinds))
    reader.drop("hidden_act")
    reader.rename(hidden_act=("mlp_hidden_act",))
    reader.prefer(
        n_groups="mamba_n_groups", conv_kernel="mamba_d_conv", time_step_min="mamba_dt_min",
        use_conv_bias="mamba_conv_bias",
    )  # fmt: skip
    reader.defaults(
        vocab_size=131072, hidden_size=4096, num_attention_heads=32, num_key_value_heads=8, head_dim=128,
        max_position_embeddings=4096, intermediate_size=21504, ssm_state_size=128, mamba_num_heads=128,
        mamba_head_dim=64,
    )  # fmt: skip
    reader.require(mamba_hidden_act="silu", sliding_window=None)
    # The code knows no positions, no biases of attention and no limits of time steps but the least one.
    reader.ignore(
        "attention_bias", "mamba_proj_bias", "rope_theta", "partial_rotary_factor", "time_step_limit",
        "residual_in_fp32", "rescale_prenorm_residual", "rms_norm_eps", "norm_eps",
    )  # fmt: skip
    sizes = read_sizes(reader, eps="layer_norm_epsilon", default_eps=1e-5, activation="relu_squared")
    mamba = read_heads_of_states(
        reader, heads="mamba_num_heads", head_dim="mamba_head_dim", state="ssm_state_size",
        least_step=reader.number("time_step_min", 0.001),
    )  # fmt: skip
    attention = LayerSpec(None, None, sizes["head_dim"] ** -0.5, part="mixer")
    mlp = replace(attention, part="mlp")
    of_kinds = {
        _STATE: replace(attention, recurrent=mamba), _ATTENTION: attention, _MLP: mlp,
        _EXPERTS: replace(mlp, experts=_read_experts(reader)),
    }  # fmt: skip
    has_bias = reader.flag("mlp_bias", False)
    check_computed(not has_bias or _EXPERTS not in kinds, "mlp_bias is not supported with experts")
    return ModelConfig(
        architecture=architecture,
        layers=tuple(of_kinds[kind] for kind in kinds),
        has_gate=False,
        has_mlp_bias=has_bias,
        **sizes,
    )


def _read_kinds(reader: Reader) -> list[str]:
    """Return each layer's kind: those listed, or the letters of a pattern."""
    listed = reader.get("layers_block_type") or reader.get("layer_types")
    pattern: Any = reader.get("hybrid_override_pattern")
    if listed is None and pattern is not None:
        listed = [_LETTERS.get(letter, letter) for letter in str(pattern)]
    if listed is None:
        listed = [_STATE, _EXPERTS, _ATTENTION, _MLP]
    check(isinstance(listed, list) and 0 < len(listed) <= MAX_LAYERS, f"layers must be 1..{MAX_LAYERS}")
    kinds = [_FORMER.get(kind, kind) if isinstance(kind, str) else kind for kind in listed]
    unknown = [kind for kind in kinds if kind not in _LETTERS.values()]
    check_computed(not unknown, f"layers of the kinds {str(unknown)[:100]} are not supported")
    return kinds


def _read_experts(reader: Reader) -> ExpertsSpec:
    """Read the experts that any of the layers may have; their scores are corrected as in DeepSeek V3."""
    reader.rename(n_routed_experts=("num_local_experts",))
    reader.defaults(
        n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=7688, norm_topk_prob=True,
        n_shared_experts=1,
    )  # fmt: skip
    found = read_corrected(reader)
    shared = reader.integer("moe_shared_expert_intermediate_size", 7688)
    latent = reader.integer("moe_latent_size", 0)
    return replace(found, shared_size=shared, latent_size=latent, has_gate=False)


class _Weights(LayerWeights):
    """The weights of a layer, whose experts have names of their own."""

    expert_names = (
        ExpertNames(
            router="mixer.gate", corrections=("mixer.gate.e_score_correction_bias",), experts="mixer.experts",
            joined="mixer.experts.up_proj", joined_down="mixer.experts.down_proj",
            shared="mixer.shared_experts", latent_in="mixer.fc1_latent_proj",
            latent_out="mixer.fc2_latent_proj",
        ),
    )  # fmt: skip


_PARTS = {
    **{f"mamba.{name}": f"mixer.{name}" for name in ("in_proj", "conv1d", "norm", "out_proj")},
    **{f"self_attn.{name}": f"mixer.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")},
    **{f"mlp.{name}": f"mixer.{name}" for name in ("up_proj", "down_proj")},
}


class NemotronH(Decoder):
    """The decoder with Nemotron-H's names; each layer is one part. Its files call the model a backbone."""

    layer_class = SinglePartLayer
    weights_class = _Weights
    checkpoint = CheckpointLayout(
        names={
            "model.embed_tokens": "model.embeddings",
            "model.norm": "model.norm_f",
            "input_layernorm": "norm",
            "mamba": "mixer",
            **_PARTS,
        },
        other_prefixes=("backbone.",),
    )


_GGUF_NAMES = {
    name: stored
    for name, stored in NAMES.items()
    if name.startswith(("mixer.gate", "mixer.experts", "mixer.shared", "mixer.fc"))
}
FAMILIES = (
    Family(
        "NemotronHForCausalLM",
        "nemotron_h",
        read_nemotron_h,
        NemotronH,
        gguf_names=_GGUF_NAMES,
        other_gguf_names=("nemotron_h_moe",),
        unused=("mtp.*", "model.mtp.*", "blk.{num_layers}.*"),
    ),
)
