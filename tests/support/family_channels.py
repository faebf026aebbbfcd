"""Cases of Mamba 1, Falcon Mamba and Jamba: channels that have a state each."""

from __future__ import annotations

from typing import Any

from tests.support.family_case import BASE, FamilyCase, Fault, ignores_weights
from tests.support.family_parts import PURE

_MAMBA = {**PURE, "state_size": 16, "time_step_rank": 32}
_JAMBA: dict[str, Any] = {
    **{key: value for key, value in BASE.items() if not key.startswith("rope")},
    "num_hidden_layers": 4, "mamba_dt_rank": 32, "num_experts": 4, "num_experts_per_tok": 2,
    "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
    "use_mamba_kernels": False,
}  # fmt: skip


def _faults(mixer: str) -> tuple[Fault, ...]:
    """Return the faults of a mixer of this name."""
    return (
        Fault("other-decay", tensors=f"*.{mixer}.A_log", change="to ones"),
        Fault("other-direct", tensors=f"*.{mixer}.D", change="to ones"),
        Fault("no-bias-of-steps", tensors=f"*.{mixer}.dt_proj.bias"),
        Fault("order-of-channels-and-gates", tensors=f"*.{mixer}.in_proj.weight", change="swap halves"),
        Fault("order-of-parts", tensors=f"*.{mixer}.x_proj.weight", change="swap halves"),
        Fault("no-taps", tensors=f"*.{mixer}.conv1d.weight", change="to ones"),
        Fault("no-convolution-bias", tensors=f"*.{mixer}.conv1d.bias"),
    )


MAMBA = FamilyCase("mamba", "MambaForCausalLM", _MAMBA, _faults("mixer"), gguf=("f32", "q8_0"))
FALCON_MAMBA = FamilyCase(
    "falcon_mamba",
    "FalconMambaForCausalLM",
    _MAMBA,
    (
        *_faults("mixer"),
        Fault("no-norms", config={"model_type": "mamba", "architectures": ["MambaForCausalLM"]}),
        Fault("other-epsilon", config={"mixer_rms_eps": 1.0}),
    ),
    gguf=("f32", "q8_0"),
)
JAMBA = FamilyCase(
    "jamba",
    "JambaForCausalLM",
    _JAMBA,
    (
        *_faults("mamba"),
        ignores_weights("dt_layernorm"),
        ignores_weights("b_layernorm"),
        ignores_weights("c_layernorm"),
        ignores_weights("pre_ff_layernorm"),
        Fault("order-of-experts", tensors="*.router.weight", change="swap halves"),
        Fault("a-missing-expert", tensors="*.experts.3.down_proj.weight"),
        Fault("fewer-experts", config={"num_experts_per_tok": 1}),
        Fault("no-attention", tensors="*.self_attn.o_proj.weight"),
        Fault("order-of-heads", tensors="*.self_attn.k_proj.weight", change="swap halves"),
    ),
    gguf=("f32", "q8_0"),
)
CHANNEL_CASES = (
    FamilyCase(  # a number of inputs of steps that is no whole block, and states and parts of odd sizes
        "mamba-odd-sizes",
        "MambaForCausalLM",
        {
            **_MAMBA, "time_step_rank": "auto", "state_size": 21, "conv_kernel": 3,
            "hidden_size": 144, "use_bias": True, "tie_word_embeddings": True,
        },
        (
            Fault("no-bias", tensors="*.mixer.out_proj.bias"),
            Fault("no-bias-of-channels", tensors="*.mixer.in_proj.bias"),
        ),
    ),
    MAMBA,
    FamilyCase(
        "falcon_mamba-tied",
        "FalconMambaForCausalLM",
        {**_MAMBA, "time_step_rank": 10, "expand": 1, "use_conv_bias": False, "tie_word_embeddings": True},
        (Fault("no-norms", config={"model_type": "mamba", "architectures": ["MambaForCausalLM"]}),),
        gguf=(),
        dtype="bfloat16",
    ),
    FALCON_MAMBA,
    FamilyCase(
        "jamba-dense",
        "JambaForCausalLM",
        {
            **_JAMBA, "num_experts": 1, "num_experts_per_tok": 1, "mamba_dt_rank": 12, "mamba_d_conv": 3,
            "mamba_conv_bias": False, "mamba_proj_bias": True, "attn_layer_period": 4,
            "attn_layer_offset": 2,
        },
        (
            Fault("no-bias", tensors="*.mamba.out_proj.bias"),
            ignores_weights("b_layernorm"),
        ),
    ),
    JAMBA,
)  # fmt: skip
