"""The size of the KV cache."""

from __future__ import annotations

import dataclasses

import pytest

from tgi_asgi.errors import ModelLoadError
from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.layer_spec import LayerSpec, RopeSpec
from tgi_asgi.runner import kv
from tgi_asgi.runner.programs import make_cpu_pool
from tgi_asgi.settings import Settings

GIB = 1 << 30
CONFIG = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=100,
    hidden_size=64,
    intermediate_size=64,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    context_length=1000,
    norm_eps=1e-5,
    layers=(LayerSpec(RopeSpec(16, 10000.0), None, 0.25),) * 2,
)
TOKEN_BYTES = 2 * 2 * 2 * 16 * 2  # keys and values, layers, heads, head size, bfloat16


def choose(
    settings: Settings,
    free_bytes: int = GIB,
    config: ModelConfig = CONFIG,
    *,
    is_exact: bool = False,
) -> kv.KvSize:
    kv_dtype = kv.choose_cpu_dtype(config, settings, is_exact=is_exact)
    groups = kv.groups_of(config, kv_dtype)
    return kv.choose_size(config, settings, groups, kv_dtype, settings.max_total_tokens or 1000, free_bytes)


def test_all_slots_fit_where_memory_allows() -> None:
    size = choose(Settings(max_batch_size=4))
    assert size.num_blocks == 4 * 63  # 1,000 tokens are 62.5 blocks
    assert size.num_bytes == size.num_tokens * TOKEN_BYTES


def test_what_is_committed_at_load_is_filled_first() -> None:
    size = choose(Settings(max_batch_total_tokens=4_000_000))
    assert size.num_eager_blocks == kv.EAGER_BYTES // (16 * TOKEN_BYTES) < size.num_blocks
    assert choose(Settings(max_batch_total_tokens=1000)).num_eager_blocks == 63


def test_half_of_the_free_memory_is_the_bound() -> None:
    size = choose(Settings(), free_bytes=100 * 16 * TOKEN_BYTES)
    assert size.num_blocks == 50


def test_the_administrator_decides() -> None:
    assert choose(Settings(max_batch_total_tokens=1234), free_bytes=0).num_blocks == 78  # 1,248 tokens


@pytest.mark.parametrize("block_size", [16, 32, 64])
def test_a_cache_that_the_system_refuses_names_the_option(block_size: int) -> None:
    """The largest cache whose tokens kernels can number, with heads that no machine has memory for."""
    config = dataclasses.replace(CONFIG, num_heads=1024, num_kv_heads=1024, head_dim=256)
    settings = Settings(max_batch_total_tokens=1 << 40, block_size=block_size)
    size = choose(settings, config=config, is_exact=True)
    assert size.num_tokens > 1 << 30
    with pytest.raises(ModelLoadError, match=r"GiB for a KV cache .* set --max-batch-total-tokens to less"):
        make_cpu_pool(config, size, kv.groups_of(config, size.dtype))
    with pytest.raises(ModelLoadError, match=r"GiB for a KV cache .* set --max-batch-total-tokens to less"):
        kv.check_address_space(size)


def test_float32_arithmetic_has_a_float32_cache() -> None:
    exact, fast = choose(Settings(), is_exact=True), choose(Settings())
    assert exact.dtype == "float32"
    assert exact.bytes_per_token == 2 * fast.bytes_per_token


def test_an_int8_cache_takes_half_the_memory_and_its_scales() -> None:
    fits = dataclasses.replace(CONFIG, head_dim=32)
    size = choose(Settings(kv_cache_dtype="int8"), config=fits)
    assert size.dtype == "int8"
    assert size.bytes_per_token == 2 * 2 * 2 * (32 + 2)


def test_an_int8_cache_is_refused_where_it_cannot_be_had() -> None:
    with pytest.raises(ModelLoadError, match="contradicts --dtype float32"):
        choose(Settings(kv_cache_dtype="int8"), is_exact=True)
    with pytest.raises(ModelLoadError, match="would pad heads of 16 to 32: use bfloat16"):
        choose(Settings(kv_cache_dtype="int8"))


def test_no_memory_is_an_error_with_a_cure() -> None:
    with pytest.raises(ModelLoadError, match="--max-batch-total-tokens"):
        choose(Settings(), free_bytes=0)


def test_a_sequence_that_the_administrator_asked_for_must_fit() -> None:
    with pytest.raises(ModelLoadError, match="--max-total-tokens 500"):
        choose(Settings(max_total_tokens=500, max_batch_total_tokens=496))
