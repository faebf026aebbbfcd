"""Rotary embeddings from tables: the numbers of the model's own code, and the same bits in any batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.generic import load_generic
from tgi_asgi.models.generic.model import GenericModel
from tgi_asgi.models.generic.rope import RotaryLookup

Checkpoint = Callable[[str], Path]

NUM_POSITIONS = 256  # size of the tables; beyond it the model's own code runs


def rotary_of(folder: Path) -> Any:
    loaded = load_generic(folder, max_context=NUM_POSITIONS)
    assert isinstance(loaded, GenericModel)
    return loaded.module.get_decoder().rotary_emb


@pytest.mark.usefixtures("as_module")
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt_neox"])
def test_tables_have_what_the_code_gives(name: str, checkpoint: Checkpoint) -> None:
    rotary = rotary_of(checkpoint(name))
    assert isinstance(rotary.forward, RotaryLookup)
    kinds = list(rotary.rope_type) if isinstance(rotary.rope_type, dict) else [None]
    positions = torch.randint(NUM_POSITIONS, (1, 37))
    for kind in kinds:
        given = () if kind is None else (kind,)
        found = rotary(torch.zeros(1), positions, *given)
        own = type(rotary).forward(rotary, torch.zeros(1), positions, *given)
        for one, other in zip(found, own, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


@pytest.mark.usefixtures("as_module")
def test_a_position_has_the_same_bits_in_any_batch(checkpoint: Checkpoint) -> None:
    loaded = load_generic(checkpoint("llama"), max_context=NUM_POSITIONS)
    assert isinstance(loaded, GenericModel) and loaded.is_batch_invariant
    rotary = loaded.module.get_decoder().rotary_emb
    alone = rotary(torch.zeros(1), torch.tensor([[200]]))
    beside = rotary(torch.zeros(1), torch.tensor([[3, 200, 17]]))
    for one, other in zip(alone, beside, strict=True):
        assert torch.equal(one[:, 0], other[:, 1])
