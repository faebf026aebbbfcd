"""TII's Falcon-H1: each layer has attention and Mamba-2 in parallel, with constant factors on its parts.

llama.cpp's converter folds the factors into the weights.

Source: Zuo et al., Falcon-H1, arXiv 2507.22448.
"""

from __future__ import annotations

from dataclasses import replace

from tgi_asgi.errors import check
from tgi_asgi.models.checkpoint import CheckpointLayout, mlp_names
from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.config_bounds import check_computed
from tgi_asgi.models.decoder import Decoder
from tgi_asgi.models.family import Family
from tgi_asgi.models.layers import HybridLayer
from tgi_asgi.models.reader import Reader, as_float
from tgi_asgi.models.reading import read_bias, read_biases, read_layers, read_sizes
from tgi_asgi.models.reading_mamba import read_mamba
from tgi_asgi.models.recurrent_specs import HybridSpec, MambaSpec, PartFactors


def read_falcon_h1(reader: Reader, architecture: str) -> ModelConfig:
    """Read Falcon-H1's configuration."""
    reader.defaults(mamba_d_ssm=1024, num_key_value_heads=8)
    reader.ignore("mlp_expansion_factor")  # implied by `intermediate_size`
    sizes = read_sizes(reader, default_eps=1e-5)
    check_computed(sizes["activation"] == "silu", f"hidden_act must be silu, got {sizes['activation']}")
    biases = read_biases(reader, qkv="attention_bias", output="attention_bias", mlp="mlp_bias")
    read = _number(reader, "attention_in_multiplier")
    gate, down = _numbers(reader, "mlp_multipliers", 2)
    check(gate > 0, f"mlp_multipliers must be positive, got {gate}")
    check_computed(
        gate == 1 or not biases["has_mlp_bias"], "mlp_bias with a factor on gates is not supported"
    )
    hybrid = HybridSpec(
        attention=PartFactors(read, _number(reader, "attention_out_multiplier")),
        state=PartFactors(_number(reader, "ssm_in_multiplier"), _number(reader, "ssm_out_multiplier")),
        mlp=PartFactors(gate, down / gate),
    )
    mamba = _read_state(reader, sizes["hidden_size"])
    scale = sizes["head_dim"] ** -0.5 * _number(reader, "key_multiplier")
    layers = read_layers(reader, sizes, scale=scale)
    return ModelConfig(
        architecture=architecture,
        layers=tuple(replace(layer, recurrent=mamba, hybrid=hybrid) for layer in layers),
        embedding_factor=_number(reader, "embedding_multiplier"),
        logits_scale=_number(reader, "lm_head_multiplier"),
        **biases,
        **sizes,
    )


def _read_state(reader: Reader, hidden: int) -> MambaSpec:
    """Read the recurrent part; in a GGUF file the gates always precede the norm."""
    mamba = read_mamba(reader, hidden, reader.integer("mamba_d_ssm", 0))
    output_bias = read_bias(reader, "projectors_bias", "ssm_out")
    if reader.is_gguf:
        has_norm, is_gate_first = "blk.0.ssm_norm.weight" in reader.tensors, True
    else:
        has_norm = reader.flag("mamba_rms_norm", False)
        is_gate_first = not reader.flag("mamba_norm_before_gate", True)
    gates, x, b, c, steps = _numbers(reader, "ssm_multipliers", 5)
    return replace(
        mamba, has_output_bias=output_bias, has_norm=has_norm, is_gate_first=is_gate_first,
        factors=(gates, x, b, c, steps),
    )  # fmt: skip


def _number(reader: Reader, key: str) -> float:
    """Read a factor; in a GGUF file it is folded into the weights."""
    return 1.0 if reader.is_gguf else reader.number(key, 1.0)


def _numbers(reader: Reader, key: str, count: int) -> list[float]:
    """Read several factors; in a GGUF file they are folded into the weights."""
    given = None if reader.is_gguf else reader.get(key)
    if given is None:
        return [1.0] * count
    check(
        isinstance(given, list) and len(given) == count and all(type(x) in (int, float) for x in given),
        f"{key} must be {count} numbers, got {str(given)[:100]}",
    )
    return [as_float(each) for each in given]


class FalconH1(Decoder):
    """The decoder with hybrid layers."""

    layer_class = HybridLayer
    checkpoint = CheckpointLayout(
        names={
            "model.norm": "model.final_layernorm",
            "post_attention_layernorm": "pre_ff_layernorm",
            **mlp_names("feed_forward"),
        }
    )


_GGUF_NAMES = {"post_attention_layernorm.weight": "ffn_norm"}  # llama.cpp's name without a kind
FAMILIES = (
    Family(
        "FalconH1ForCausalLM",
        "falcon-h1",
        read_falcon_h1,
        FalconH1,
        gguf_names=_GGUF_NAMES,
    ),
)
