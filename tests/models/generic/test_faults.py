"""Planted faults, each of which once gave wrong logits silently: a rule corrects or refuses each."""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support import architectures
from tests.support.generic import MAX_CONTEXT, load_generic, measure, open_generic, run_steps
from tgi_asgi.errors import ModelLoadError
from tgi_asgi.models.generic import caller, check, program, recurrent, zeros
from tgi_asgi.models.generic import discover as discovery
from tgi_asgi.models.generic import open as opening
from tgi_asgi.models.generic.common import CommonDecoder
from tgi_asgi.models.generic.discover import AttentionLayer
from tgi_asgi.models.generic.model import GenericConfig
from tgi_asgi.models.generic.modules import Head
from tgi_asgi.models.generic.rules import Rule
from tgi_asgi.models.generic.states import RowSpan, SequenceState, SlotStates

Checkpoint = Callable[[str], Path]

EQUAL = 1e-3  # of the largest logit, as in test_table.py
WRONG = 1e-2  # a fault differs by much more than correct results
REFUSAL = "fails its self-check against its own code: logits differ by"

# Number of positions of a Llama's rotary tables: more than the self-check's sequences, less than the first of
# these two.
ORIGINAL = 30
TWO = [architectures.random_ids(length, seed) for seed, length in enumerate((37, 17))]
STEPS_OF_TWO = [[(0, 0, 20)], [(0, 20, 16), (1, 0, 9)], [(1, 9, 8), (0, 36, 1)]]
POSITIONS = {"max_position_embeddings": ORIGINAL}
SHORT, LONG = [1.0, 1.1, 1.3, 1.7, 2.0, 2.5, 3.0, 4.0], [1.0, 2.0, 4.0, 8.0, 9.0, 12.0, 16.0, 24.0]
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": SHORT,
    "long_factor": LONG,
    "original_max_position_embeddings": ORIGINAL,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}


def changed(source: Path, folder: Path, **config: Any) -> Path:
    """Copy a checkpoint with other fields in its config.json."""
    folder.mkdir(exist_ok=True)
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


@pytest.mark.usefixtures("as_module")
def test_a_window_that_the_model_ignores_is_none(checkpoint: Checkpoint, tmp_path: Path) -> None:
    found = measure(changed(checkpoint("llama"), tmp_path / "stray", sliding_window=5))
    assert found.tier == "generic"
    assert found.difference < EQUAL


def test_a_common_decoder_takes_no_window_from_a_configuration(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    found = measure(changed(checkpoint("llama"), tmp_path / "stray", sliding_window=5))
    assert found.tier == "common"
    assert found.difference < EQUAL


def rope_reference(folder: Path, ids: list[int]) -> np.ndarray:
    """Return transformers' logits with the table of `MAX_CONTEXT` tokens; later tokens affect none."""
    tail = architectures.random_ids(MAX_CONTEXT - len(ids), seed=9)
    return architectures.reference(folder, ids + tail)[: len(ids)]


@pytest.mark.parametrize("path", ["common", "module"])
@pytest.mark.parametrize("rope", [LONGROPE, DYNAMIC], ids=["longrope", "dynamic"])
def test_rotary_tables_do_not_depend_on_what_is_in_a_batch(
    rope: dict[str, Any], path: str, checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if path == "module":
        monkeypatch.setattr(CommonDecoder, "find", lambda *_: None)
    folder = changed(checkpoint("llama"), tmp_path / "llama", rope_parameters=rope, **POSITIONS)
    expected = [rope_reference(folder, ids) for ids in TWO]
    assert run_steps(load_generic(folder), TWO, expected, STEPS_OF_TWO) < EQUAL


@pytest.mark.usefixtures("as_module")
@pytest.mark.parametrize("rope", [LONGROPE, DYNAMIC], ids=["longrope", "dynamic"])
def test_tables_that_are_not_fixed_are_seen(
    rope: dict[str, Any], checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check the rule alone, as the self-check's sequences are too short to detect the fault."""
    monkeypatch.setattr(opening, "fix_rotary_tables", lambda *_: None)
    monkeypatch.setattr(opening, "tabulate", lambda *_: None)  # it would look up one table, too
    folder = changed(checkpoint("llama"), tmp_path / "llama", rope_parameters=rope, **POSITIONS)
    expected = [rope_reference(folder, ids) for ids in TWO]
    assert run_steps(load_generic(folder), TWO, expected, STEPS_OF_TWO) > WRONG


def test_attention_that_grows_with_positions_is_not_of_the_common_shape(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """Use Ministral 3, which multiplies queries by a number that is 1 up to a position beyond every check."""
    rope = {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "llama_4_scaling_beta": 0.5,
        "original_max_position_embeddings": 32,
    }
    found = measure(changed(checkpoint("ministral3"), tmp_path / "changed", rope_parameters=rope))
    assert found.difference < EQUAL
    assert found.tier == "generic"


class Forgetful(SlotStates[Any]):
    """States that give every row of a step an empty state."""

    def begin(self, spans: Iterable[RowSpan], forked: Container[int] = ()) -> list[SequenceState[Any]]:
        return [SequenceState(self._make(), state.num_tokens) for state in super().begin(spans, forked)]


@pytest.mark.parametrize("model_type", ["lfm2", "mamba2", "jamba", "qwen3_next", "bart"])
def test_a_state_that_is_lost_between_chunks_refuses_the_model(
    model_type: str, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program, "SlotStates", Forgetful)
    with pytest.raises(ModelLoadError, match=REFUSAL):
        load_generic(checkpoint(model_type))


@pytest.mark.parametrize(
    ("model_type", "by_token"),
    [("mamba", True), ("zamba", True), ("mamba2", False), ("lfm2", False), ("qwen3_next", False)],
)
def test_a_layer_that_loses_a_little_of_its_state_continues_token_by_token(
    model_type: str, by_token: bool, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Zamba's scan loses so little of it that the difference may be within the limit."""
    monkeypatch.setattr(check, "LARGEST", 1.0)
    loaded: Any = load_generic(checkpoint(model_type))
    assert loaded.recurrent.continues_by_token == by_token
    assert loaded.keeps_states != by_token


def test_no_states_are_kept_if_resuming_from_one_gives_other_logits(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(recurrent, "copy_layer", lambda *_: None)
    loaded: Any = load_generic(checkpoint("mamba2"))
    assert not loaded.keeps_states
    assert "has no prefix cache: after a kept state, logits differ" in caplog.text


def with_layers(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """Make discovery return layers with changed properties."""

    def discover(*args: Any) -> list[AttentionLayer]:
        return [replace(layer, **changes) for layer in discovery.discover(*args)]

    monkeypatch.setattr(opening, "discover", discover)


@pytest.mark.parametrize(
    ("model_type", "found"),
    [
        ("mistral", {"rule": Rule()}),
        ("gpt2", {"rule": Rule(window=12)}),
        ("llama", {"rule": Rule(window=12)}),
        ("llama4_text", {"rule": Rule(window=12)}),
        ("gemma2", {"rule": Rule(window=12)}),
        ("bloom", {"scale": 0.5}),
        ("llama", {"scale": 0.5}),
        ("gpt_oss", {"scale": 0.5}),
    ],
    ids=str,
)
def test_a_layer_that_discovery_got_wrong_refuses_the_model(
    model_type: str, found: dict[str, Any], checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_layers(monkeypatch, **found)
    with pytest.raises(ModelLoadError, match=REFUSAL):
        load_generic(checkpoint(model_type))


@pytest.mark.usefixtures("as_module")
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "roberta"])
def test_positions_that_do_not_arrive_refuse_the_model(
    model_type: str, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_positions(module: Any, **given: Any) -> dict[str, Any]:
        return arguments(module, **{name: value for name, value in given.items() if name != "position_ids"})

    arguments = zeros.arguments
    monkeypatch.setattr(caller, "arguments", without_positions)
    with pytest.raises(ModelLoadError, match=REFUSAL):
        load_generic(checkpoint(model_type))


def test_a_model_that_takes_no_positions_runs_alone(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_generic(checkpoint("mbart")) as opened:
        assert isinstance(opened.config, GenericConfig)
        assert "positions do not reach the layers of MBart" in opened.config.sequential_reason
    monkeypatch.setattr(discovery, "require_positions", lambda module: None)
    with pytest.raises(ModelLoadError, match=REFUSAL):
        load_generic(checkpoint("mbart"))


def test_a_wrong_head_refuses_the_model(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plant the fault in steps only: the other side of the check does not request rows."""

    def forward(self: Any, x: Tensor) -> Any:
        return self.inner(x) if self.rows is None else 1.01 * self.inner(x[:, self.rows])

    monkeypatch.setattr(Head, "forward", forward)
    with pytest.raises(ModelLoadError, match=REFUSAL):
        load_generic(checkpoint("gpt2"))


def test_not_a_number_is_no_agreement(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = changed(checkpoint("gpt2"), tmp_path / "nan")
    tensors = load_file(folder / "model.safetensors")
    tensors["transformer.ln_f.bias"][3] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelLoadError, match=REFUSAL):
        load_generic(folder)


def test_logits_that_a_class_rules_out_hide_no_others() -> None:
    wanted = torch.tensor([[1.0, 2.0, torch.finfo(torch.float32).min]])
    found = wanted.clone()
    found[0, 0] += 0.5
    assert check.relative_difference(found, wanted, wanted) == 0.25
    found[0, 2] = 0.0
    assert check.relative_difference(found, wanted, wanted) > check.LARGEST
