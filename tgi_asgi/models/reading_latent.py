"""Reads what configurations say about latent attention (MLA)."""

from __future__ import annotations

from typing import Any

from tgi_asgi.errors import check
from tgi_asgi.models.latent_spec import LatentSpec
from tgi_asgi.models.layer_spec import LayerSpec, RopeSpec
from tgi_asgi.models.reader import Reader
from tgi_asgi.models.reading import num_layers, read_bias, read_sizes
from tgi_asgi.models.reading_rope import read_rope, rope_values, yarn_magnitude


def read_latent(reader: Reader, *, is_interleaved: bool = False) -> LatentSpec:
    """Read the sizes of latents and heads; the family decides whether rotary pairs are adjacent dims."""
    has_inner = (
        "blk.0.attn_q_a.weight" in reader.tensors if reader.is_gguf else reader.get("q_lora_rank") is not None
    )
    if not has_inner:
        reader.ignore("q_lora_rank")
    has_bias = read_bias(reader, "attention_bias", "attn_kv_a_mqa")
    plain, rotary, value = _read_gguf_heads(reader) if reader.is_gguf else _read_json_heads(reader)
    return LatentSpec(
        reader.integer("kv_lora_rank"), plain, rotary, value,
        query_rank=reader.integer("q_lora_rank") if has_inner else None, is_interleaved=is_interleaved,
        has_bias=has_bias,
    )  # fmt: skip


def _read_json_heads(reader: Reader) -> tuple[int, int, int]:
    hidden, heads = reader.integer("hidden_size"), reader.integer("num_attention_heads")
    check(heads > 0, f"num_attention_heads must be positive, got {heads}")
    value = reader.integer("v_head_dim", hidden // heads)
    reader.ignore("qk_head_dim")
    return reader.integer("qk_nope_head_dim"), reader.integer("qk_rope_head_dim"), value


def _read_gguf_heads(reader: Reader) -> tuple[int, int, int]:
    """Read head sizes; newer files store them apart from the latents, which they count as one head's keys."""
    key, value = "attention.key_length", "attention.value_length"
    if reader.get(f"{key}_mla") is not None:
        reader.ignore(key, value)
        key, value = f"{key}_mla", f"{value}_mla"
    hidden, heads = reader.integer("hidden_size"), reader.integer("num_attention_heads")
    check(heads > 0, f"attention.head_count must be positive, got {heads}")
    rotary, width = reader.integer("rope.dimension_count"), reader.integer(key)
    return width - rotary, rotary, reader.integer(value, hidden // heads)


def read_latent_sizes(reader: Reader, latent: LatentSpec, **options: Any) -> dict[str, Any]:
    """Read the sizes of `read_sizes` for a model with these heads."""
    width, heads = latent.plain_dim + latent.rotary_dim, reader.integer("num_attention_heads")
    # The head sizes of transformers 5 and llama.cpp are those of latents, or of the rotated dims.
    reader.replace("head_dim", width)
    reader.replace("attention.value_length", width)
    reader.replace("num_key_value_heads", heads)
    return read_sizes(reader, **options)


def latent_layers(reader: Reader, latent: LatentSpec, rope: RopeSpec, scale: float) -> tuple[LayerSpec, ...]:
    """Make the layers' specifications, which are all equal."""
    return (LayerSpec(rope, None, scale, latent=latent),) * num_layers(reader)


def read_latent_rope(reader: Reader, latent: LatentSpec) -> tuple[RopeSpec, float]:
    """Read the rotary embedding and the attention scale, which includes YaRN's magnitude.

    In a GGUF file, as in llama.cpp, DeepSeek's two magnitudes of cosines are taken as equal.
    """
    if reader.is_gguf:
        key = "rope.scaling.yarn_log_multiplier"
        all_dims = 10 * reader.number(key, 0.0)  # files of this architecture store a tenth of it
        if all_dims:
            reader.replace(key, 1.0)
        rope = read_rope(reader, latent.rotary_dim)
    else:
        rope = read_rope(reader, latent.rotary_dim)
        all_dims = Reader.of_json(rope_values(reader)).number("mscale_all_dim", 0.0)
    scale = (latent.plain_dim + latent.rotary_dim) ** -0.5
    if rope.scaling is None or not all_dims:
        return rope, scale
    check(all_dims > 0, f"mscale_all_dim must be positive, got {all_dims}")
    magnitude = yarn_magnitude(rope.scaling.factor, all_dims)
    return rope, scale * magnitude * magnitude  # of large floats, unlike `**`, infinite: refused later
