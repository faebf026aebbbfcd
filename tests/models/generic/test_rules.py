"""The keys that a query sees, derived from mask predicates and from whole models, layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import masking_utils

from tests.support.generic import open_generic
from tgi_asgi.models.alibi import alibi_slopes
from tgi_asgi.models.generic.model import GenericConfig
from tgi_asgi.models.generic.rules import Rule, UnknownRule, decode_rule, rule_of, window_rule

NONE_PADDED = torch.zeros(1, dtype=torch.long)


def chunked(size: int) -> Any:
    return masking_utils.chunked_causal_mask_function(size, NONE_PADDED)


def first_keys(size: int) -> Any:
    """Let every query see the first keys, as streaming attention does."""
    return lambda batch, head, query, key: key < size


@pytest.mark.parametrize("length", [40, 4096])
@pytest.mark.parametrize(
    ("sees", "rule"),
    [
        (masking_utils.causal_mask_function, Rule()),
        (masking_utils.sliding_window_causal_mask_function(12), Rule(window=12)),
        (masking_utils.sliding_window_causal_mask_function(1), Rule(window=1)),
        (chunked(12), Rule(chunk=12)),
        (chunked(1), Rule(window=1)),  # equivalent
        (masking_utils.and_masks(masking_utils.causal_mask_function, lambda *_: torch.tensor(True)), Rule()),
    ],
    ids=["causal", "window 12", "window 1", "chunks of 12", "chunks of 1", "causal and all"],
)
def test_a_mask_s_rule_is_read_off_its_predicate(sees: Any, rule: Rule, length: int) -> None:
    assert decode_rule(rule_of(sees, length)) == rule


def test_a_window_or_chunk_beyond_all_positions_is_none() -> None:
    assert decode_rule(rule_of(masking_utils.sliding_window_causal_mask_function(64), 40)) == Rule()
    assert decode_rule(rule_of(chunked(64), 40)) == Rule()


@pytest.mark.parametrize(
    ("sees", "reason"),
    [
        (masking_utils.bidirectional_mask_function, "in both directions"),
        (masking_utils.sliding_window_bidirectional_mask_function(12), "neither causal"),
        (
            masking_utils.or_masks(masking_utils.sliding_window_causal_mask_function(12), first_keys(3)),
            "neither causal",
        ),
        (masking_utils.or_masks(masking_utils.causal_mask_function, first_keys(8)), "neither causal"),
        (
            masking_utils.and_masks(masking_utils.sliding_window_causal_mask_function(5), chunked(8)),
            "neither",
        ),
    ],
    ids=["bidirectional", "bidirectional-window", "window-or-sinks", "causal-or-prefix", "window-and-chunk"],
)
def test_masks_that_the_kernels_do_not_have_are_none_of_the_rules(sees: Any, reason: str) -> None:
    with pytest.raises(UnknownRule, match=reason):
        decode_rule(rule_of(sees, 4096))


@pytest.mark.parametrize("value", [0, 1, -12, 4096, -(1 << 28)])
def test_numbers_that_a_model_writes_into_its_mask_are_no_rule(value: int) -> None:
    with pytest.raises(UnknownRule):
        decode_rule(value)


def test_a_window_s_number_is_its_rule() -> None:
    assert decode_rule(window_rule(None)) == decode_rule(window_rule(0)) == Rule()
    assert decode_rule(window_rule(7)) == Rule(window=7)
    assert [str(rule) for rule in (Rule(), Rule(window=7), Rule(chunk=8))] == [
        "causal",
        "window 7",
        "chunks of 8",
    ]


@pytest.mark.parametrize(
    ("model_type", "rules"),
    [
        ("llama", [Rule()] * 3),
        ("mistral", [Rule(window=12)] * 3),
        ("qwen2", [Rule(), Rule(window=12), Rule(window=12)]),
        ("gpt_neo", [Rule(), Rule(window=12), Rule(window=12)]),
        ("llama4_text", [Rule(chunk=12), Rule(), Rule(chunk=12), Rule()]),
        ("lfm2", [Rule()]),  # one of three layers is attention
        ("mamba", []),
        ("bloom", [Rule()] * 3),
    ],
)
def test_the_layers_of_a_model_are_found_without_weights(
    model_type: str, rules: list[Rule], checkpoint: Callable[[str], Path]
) -> None:
    with open_generic(checkpoint(model_type)) as opened:
        assert isinstance(opened.config, GenericConfig)
        assert [layer.rule for layer in opened.config.layers] == rules


def test_heads_are_as_attention_is_given_them(checkpoint: Callable[[str], Path]) -> None:
    """Check DeepSeek, whose keys are wider than its values, and Gemma 4, which has two head sizes."""
    with open_generic(checkpoint("deepseek_v3")) as opened:
        assert {(cache.head_dim, cache.value_dim) for cache in opened.config.caches} == {(24, 16)}
    with open_generic(checkpoint("gemma4_text")) as opened:
        assert {cache.head_dim for cache in opened.config.caches} == {16, 32}


def test_alibi_s_slopes_are_those_of_transformers() -> None:
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor
    from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

    for num_heads in (4, 6, 8, 12):
        bloom = build_alibi_tensor(torch.ones(1, 2), num_heads, torch.float32)[:, 0, 1]
        assert torch.allclose(torch.tensor(alibi_slopes(num_heads)), bloom)
        mpt = build_mpt_alibi_tensor(num_heads, 2, 8).flatten(0, -2)
        assert torch.allclose(torch.tensor(alibi_slopes(num_heads)), mpt[:, 1] - mpt[:, 0])
