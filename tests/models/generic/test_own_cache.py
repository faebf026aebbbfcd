"""Models that run one sequence at a time: on a cache of their own kind, or without any."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support import architectures
from tests.support.generic import batch_of, load_generic, open_generic, program_of
from tgi_asgi.errors import ModelLoadError
from tgi_asgi.models.generic.module_caches import copy_cache
from tgi_asgi.models.generic.open import OpenGeneric
from tgi_asgi.models.generic.zeros import run_on_zeros

Checkpoint = Callable[[str], Path]


def copied(checkpoint: Path, folder: Path, **values: Any) -> Path:
    for file in checkpoint.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return folder


@pytest.mark.parametrize("model_type", ["deepseek_v32", "openai-gpt", "blt"])
def test_rows_that_no_one_asked_for_are_known_after_a_step(model_type: str, checkpoint: Checkpoint) -> None:
    """Continue one sequence next to another; without a cache, the output holds earlier tokens, too."""
    folder = checkpoint(model_type)
    ids = [architectures.random_ids(20, 0), architectures.random_ids(9, 1)]
    expected = architectures.references(folder, ids)
    with program_of(load_generic(folder), num_sequences=2) as program:
        program.run(batch_of([(0, 0, 12)], ids), [0])
        program.run(batch_of([(1, 0, 9), (0, 12, 8)], ids), [16])
        everything = program.hidden(0, 17).copy()
        found, states = program.run_head([8, 9, 10]), program.hidden(7, 11)
    for logits, wanted in zip(found, [expected[1][8], expected[0][12], expected[0][13]], strict=True):
        assert np.abs(logits - wanted).max() < 1e-4 * np.abs(wanted).max()
    assert np.array_equal(states, everything[7:11])


def test_an_index_that_scores_many_tokens_the_same_passes_the_check(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """A single head of the index scores half of the tokens zero; torch's choice depends on a row's length."""
    sizes = {"index_n_heads": 1, "index_topk": 4}
    folder = copied(checkpoint("deepseek_v32"), tmp_path, **sizes)
    file = folder / "model.safetensors"
    weights = load_file(file)
    for name, value in weights.items():
        if name.endswith("indexer.wq_b.weight"):
            weights[name] = value[:16].clone()
        elif name.endswith("indexer.weights_proj.weight"):
            weights[name] = value[:1].clone()
    save_file(weights, file, metadata={"format": "pt"})
    ids = architectures.random_ids(24, 0)
    expected = architectures.piecewise(folder, ids, [20, 1, 1, 1, 1])
    with program_of(load_generic(folder), num_sequences=1) as program:
        steps = [(0, 0, 20), *((0, at, 1) for at in range(20, 24))]
        found = [program.run(batch_of([step], [ids]), range(step[2])) for step in steps]
    assert np.abs(np.concatenate(found) - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (torch.zeros(320, 2), "is of dtype F32, not I64 or I32"),
        (torch.zeros(300, 2, dtype=torch.long), r"has the shape \[300, 2\]"),
    ],
)
def test_a_table_of_integers_must_be_one(
    values: torch.Tensor, reason: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    folder = copied(checkpoint("deepseek_v4"), tmp_path)
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("tid2eid"))
    save_file({**weights, name: values}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match=reason):
        load_generic(folder)


def test_a_run_without_weights_leaves_no_note_in_the_modules(checkpoint: Checkpoint) -> None:
    """RWKV halves its weights in its first call, and notes that it has."""
    with open_generic(checkpoint("rwkv")) as opened:
        model = cast(Any, opened)._model.module._model
        run_on_zeros(model, 3, use_cache=True)
        assert not model.rwkv.layers_are_rescaled


def test_a_copy_shares_only_what_is_replaced() -> None:
    class Layer:
        def __init__(self) -> None:
            self.keys, self.indexer_keys = torch.ones(1), torch.ones(1)
            self.counts = {"compressor": 1}
            self.state = torch.ones(1)

    class Cache:
        def __init__(self) -> None:
            self.layers, self.by_layer = [Layer()], {0: (torch.ones(1),)}
            self.config, self.seen = object(), torch.ones(1)

    before = Cache()
    after = copy_cache(before)
    layer = after.layers[0]
    layer.state += 1
    layer.counts["compressor"] += 1
    after.by_layer[0][0].add_(1)
    after.seen += 1
    assert before.layers[0].state == before.by_layer[0][0] == before.seen == 1
    assert before.layers[0].counts == {"compressor": 1}
    assert after.config is before.config
    assert layer.keys is before.layers[0].keys
    assert layer.indexer_keys is before.layers[0].indexer_keys


@pytest.mark.filterwarnings("ignore")  # of transformers' own code
def test_a_cache_of_a_tower_for_sound_is_not_the_decoder_s() -> None:
    """Muse Spark's decoder keeps keys and values, and shares a file with such a tower."""
    text = architectures.config("muse_spark_text", moe_hidden_size=64).to_dict()
    config = {
        "model_type": "muse_spark",
        "architectures": ["MuseSparkForConditionalGeneration"],
        "text_config": text,
        "vision_config": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
        "audio_config": {"hidden_sizes": [16] * 4, "depths": [1] * 4, "out_hidden_size": 64},
    }
    opened = OpenGeneric(None, config, trusts_code=False)
    assert opened.config.vision is not None
    assert not opened.config.sequential_reason
    assert len(opened.config.layers) == text["num_hidden_layers"]
