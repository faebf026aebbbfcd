"""The properties of the tiny checkpoints that the generic path is tested with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tokenizers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.support import architecture_table as table
from tests.support import architectures


def test_the_table_has_every_architecture_of_transformers() -> None:
    assert set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) <= set(table.TYPES)
    for part in (table.CONFIG, table.NOT_BUILT, table.NO_REFERENCE, table.WRONG_CACHE, table.WRONG_CHUNKS):
        assert set(part) <= set(table.TYPES)


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_oss", "jamba", "deepseek_v3", "gemma3n_text", "roberta"])
def test_a_checkpoint_is_always_the_same_and_its_logits_are_well_spread(
    model_type: str, tmp_path: Path
) -> None:
    ids = architectures.random_ids(40, seed=0)
    found = []
    for name in ("one", "other"):
        architectures.make(model_type, tmp_path / name)
        found.append(architectures.reference(tmp_path / name, ids))
    assert found[0].shape == (40, architectures.VOCAB_SIZE)
    assert np.isfinite(found[0]).all()
    assert 1.0 < found[0].std() < 5.0
    assert (found[0] == found[1]).all()


@pytest.mark.parametrize("model_type", ["qwen2", "zamba2"])
def test_a_reference_does_not_depend_on_how_the_sequence_is_cut(model_type: str, tmp_path: Path) -> None:
    ids = architectures.random_ids(40, seed=0)
    architectures.make(model_type, tmp_path)
    found = architectures.reference(tmp_path, ids)
    limit = 1e-4 * np.abs(found).max()
    assert np.abs(architectures.reference(tmp_path, ids[:27]) - found[:27]).max() < limit
    assert np.abs(architectures.piecewise(tmp_path, ids, [20] + [1] * 20) - found).max() < limit


def test_a_clear_prompt_has_one_greedy_answer(tmp_path: Path) -> None:
    architectures.make("llama", tmp_path)
    [(prompt, answer)] = architectures.clear_prompts(tmp_path, [10], 5)
    logits = architectures.reference(tmp_path, prompt + answer)[9:-1]
    assert answer == logits.argmax(-1).tolist()
    second, best = np.sort(logits)[:, -2:].T
    assert (best - second).min() > 0.02


def test_every_id_has_a_text(tmp_path: Path) -> None:
    architectures.make("llama", tmp_path)
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == architectures.VOCAB_SIZE
    assert all(tokenizer.id_to_token(index) for index in range(architectures.VOCAB_SIZE))
    assert tokenizer.decode(tokenizer.encode("then it is so").ids) == "then it is so"
