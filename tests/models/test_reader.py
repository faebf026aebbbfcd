"""Configurations key by key: a key that nothing has read and that might matter is refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from tests.models.test_config import GGUF, JSON
from tgi_asgi.errors import ModelLoadError
from tgi_asgi.models.loading.recognise import read_config, read_gguf
from tgi_asgi.models.reader import Reader
from tgi_asgi.models.reading_experts import read_corrected


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attn_logit_softcapping", 50.0),
        ("final_logit_softcapping", 30.0),
        ("query_pre_attn_scalar", 224),
        ("residual_multiplier", 0.22),
        ("use_qk_norm", True),
        ("layer_norm_type", "rms"),
        ("qkv_bias", True),
        ("rope_local_base_freq", 10000.0),
        ("attention_window", 512),
        ("alibi", True),
        ("ffn_act", "relu"),
        ("act_fn", "relu"),
        ("num_activated_experts", 3),
        ("mrope_section", [1, 2]),
        ("full_attn_alpha_factor", 1.5),
    ],
)
def test_a_key_that_changes_what_is_computed_is_refused_by_name(key: str, value: Any) -> None:
    if value is not True:
        with pytest.raises(ModelLoadError, match=f"`{key}` is .*the model would compute something else"):
            read_config({**JSON, key: value})
    with pytest.raises(ModelLoadError, match=f"`{key}` is True"):
        read_config({**JSON, key: True})
    for off in (None, False, 0, 0.0, 1, 1.0):
        read_config({**JSON, key: off})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("torch_dtype", "bfloat16"),
        ("transformers_version", "4.40.1"),
        ("bos_token_id", 1),
        ("attention_dropout", 0.1),
        ("initializer_range", 0.02),
        ("_name_or_path", "somewhere"),
        ("pretraining_tp", 4),
        ("rope_interleaved", True),
        ("vocab_parts", ["a", "b"]),
        ("num_character_labels", 30),
        ("extract_layers", [4, 8]),
        ("property_head_size", 12),
        ("initializer_factor", 0.02),
        ("moe_expert_capacity_factor", 1.25),
        ("router_aux_loss_factor", 0.01),
        ("activation", "swiglu"),  # Falcon 3's name for what `hidden_act` calls silu
    ],
)
def test_a_key_that_does_not_matter_is_passed_over(key: str, value: Any) -> None:
    assert read_config({**JSON, key: value}) == read_config(JSON)


@pytest.mark.parametrize(
    ("kind", "context"), [("qwen2", 32768), ("llama", 2048), ("no-such-type", 2048), (None, 2048)]
)
def test_a_context_that_is_not_named_is_the_class_s_default(
    kind: str | None, context: int, caplog: pytest.LogCaptureFixture
) -> None:
    given = {key: value for key, value in JSON.items() if key != "max_position_embeddings"}
    config = read_config({**given, "model_type": kind})[1]
    assert config.context_length == context
    assert "has no `max_position_embeddings`" in caplog.text
    assert read_config({**JSON, "model_type": kind})[1].context_length == 8192


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("logit_scale", 0.5),
        ("attention.clamp_kqv", 8.0),
        ("attention.scale", 0.1),
        ("expert_used_count", 2),
        ("rope.scaling.some_new_factor", 2.0),
        ("anything", "else"),
    ],
)
def test_a_key_of_a_gguf_file_that_nobody_knows_is_refused_by_name(key: str, value: Any) -> None:
    with pytest.raises(ModelLoadError, match=f"`{key}` is .*the model would compute something else"):
        read_gguf({**GGUF, f"llama.{key}": value}, frozenset())


@pytest.mark.parametrize(
    ("key", "value"),
    [("use_parallel_residual", True), ("tensor_data_layout", "Meta AI original pth")],
)
def test_what_old_gguf_files_say_of_how_they_were_made_is_passed_over(key: str, value: Any) -> None:
    assert read_gguf({**GGUF, f"llama.{key}": value}, frozenset()) == read_gguf(GGUF, frozenset())


def test_the_first_gguf_files_of_qwen_s_experts_lack_their_sizes() -> None:
    """llama.cpp takes them from the size of the MLP; Qwen2 57B, whose sizes differ, brought the keys."""
    own = {key.replace("llama.", "qwen2moe."): value for key, value in GGUF.items()}
    own |= {"general.architecture": "qwen2moe", "qwen2moe.expert_count": 60, "qwen2moe.expert_used_count": 4}
    tensors = frozenset({"blk.0.ffn_gate_inp.weight", "blk.0.ffn_gate_shexp.weight"})

    def sizes(**keys: int) -> tuple[int, int]:
        given = {f"qwen2moe.{key}": value for key, value in keys.items()}
        experts = read_gguf(own | given, tensors)[1].layers[0].experts
        assert experts is not None
        return experts.intermediate_size, experts.shared_size

    assert sizes() == (1536 // 4, 1536)
    whole = sizes(expert_feed_forward_length=96, expert_shared_feed_forward_length=32)
    assert whole == (96, 32)
    with pytest.raises(ModelLoadError, match="experts of a token must be"):
        sizes(expert_used_count=0)


def test_keys_of_other_prefixes_are_left_alone() -> None:
    others = {
        "general.name": "x",
        "tokenizer.ggml.model": "gpt2",
        "qwen2.logit_scale": 3.0,
        "quantize.imatrix": 1,
    }
    none = {"llama.expert_count": 0, "llama.expert_used_count": 0}
    assert read_gguf({**GGUF, **others, **none}, frozenset()) == read_gguf(GGUF, frozenset())


def test_a_key_inside_the_rotary_embedding_s_object_is_held_to_the_same() -> None:
    scaling = {"type": "linear", "factor": 2.0, "attn_scale": 3.0}
    with pytest.raises(ModelLoadError, match=r"`attn_scale` is 3\.0"):
        read_config({**JSON, "rope_scaling": scaling})


def test_the_size_of_a_gguf_vocabulary_may_follow_from_its_tokens() -> None:
    few = {key: value for key, value in GGUF.items() if key != "llama.vocab_size"}
    assert read_gguf({**few, "tokenizer.ggml.tokens": ["a"] * 300}, frozenset())[1].vocab_size == 300
    with pytest.raises(ModelLoadError, match="lacks `vocab_size`"):
        read_gguf(few, frozenset())


def test_a_default_stands_for_a_key_that_a_json_lacks() -> None:
    reader = Reader.of_json({"a": 2, "b": None})
    reader.defaults(a=1, b=1, c=1)
    assert [reader.get(key) for key in "abc"] == [2, None, 1]
    gguf = Reader.of_gguf({"general.architecture": "llama"}, frozenset())
    gguf.defaults(a=1)
    assert gguf.get("a") is None


def test_an_integer_beyond_any_float_is_infinite() -> None:
    assert Reader.of_json({"key": 10**400}).number("key") == float("inf")


def test_what_is_read_or_ignored_is_not_left_over() -> None:
    reader = Reader.of_json({"a_scale": 2.0, "b_scale": 3.0, "c_bias": True})
    assert reader.number("a_scale") == 2.0
    assert reader.flag("c_bias", False)
    with pytest.raises(ModelLoadError, match="b_scale"):
        reader.finish()
    reader.ignore("b_scale")
    reader.finish()


@pytest.mark.parametrize(
    ("method", "value", "words"),
    [
        ("integer", 1.5, "must be one integer"),
        ("integer", True, "must be one integer"),
        ("integer", [1, 2], "must be one integer"),
        ("number", "1", "must be a number"),
        ("number", False, "must be a number"),
        ("flag", 1, "must be true or false"),
        ("flag", "true", "must be true or false"),
    ],
)
def test_a_value_of_another_type_is_refused(method: str, value: Any, words: str) -> None:
    reader = Reader.of_json({"key": value})
    arguments = ("key", False) if method == "flag" else ("key",)
    with pytest.raises(ModelLoadError, match=f"`key` {words}"):
        getattr(reader, method)(*arguments)


@pytest.fixture
def deepseek() -> dict[str, Any]:
    """Return the metadata of a small GGUF file with latent attention."""
    sizes = {
        "vocab_size": 100, "context_length": 512, "embedding_length": 64, "block_count": 2,
        "feed_forward_length": 64, "attention.head_count": 4, "attention.layer_norm_rms_epsilon": 1e-5,
        "attention.kv_lora_rank": 32, "attention.key_length": 64, "attention.value_length": 32,
        "rope.dimension_count": 32, "expert_count": 4, "expert_used_count": 2,
        "expert_feed_forward_length": 32,
    }  # fmt: skip
    named = {f"deepseek2.{key}": value for key, value in sizes.items()}
    return {**named, "general.architecture": "deepseek2"}


def test_a_scale_of_zero_in_a_gguf_file_is_none(deepseek: dict[str, Any]) -> None:
    for given, expected in ((None, 1.0), (0.0, 1.0), (2.5, 2.5)):
        metadata = {**deepseek, "deepseek2.expert_weights_scale": given}
        _, config = read_gguf(metadata, frozenset({"blk.1.ffn_gate_inp.weight"}))
        experts = config.layers[1].experts
        assert experts is not None and experts.scale == expected


def test_a_magnitude_that_scores_have_too_is_refused(deepseek: dict[str, Any]) -> None:
    read_gguf({**deepseek, "deepseek2.rope.scaling.attn_factor": 1.0}, frozenset())
    with pytest.raises(ModelLoadError, match=r"`rope\.scaling\.attn_factor` is 1\.7"):
        read_gguf({**deepseek, "deepseek2.rope.scaling.attn_factor": 1.7}, frozenset())


@pytest.mark.parametrize("is_gguf", [False, True])
def test_weights_of_experts_sum_to_one_by_default_in_config_json_alone(is_gguf: bool) -> None:
    """llama.cpp's default of `expert_weights_norm` is false, that of transformers' `norm_topk_prob` true."""
    sizes = {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    named = {"expert_count": 8, "expert_used_count": 2, "expert_feed_forward_length": 64}
    metadata = {"general.architecture": "dots1", **{f"dots1.{key}": named[key] for key in named}}
    reader = Reader.of_gguf(metadata, frozenset()) if is_gguf else Reader.of_json(sizes)
    assert read_corrected(reader).is_renormalised != is_gguf
