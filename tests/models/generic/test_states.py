"""States of running sequences: each sequence has its own, and a failed step leaves them unchanged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from tests.support import architectures
from tests.support.generic import batch_of, load_generic, measure, program_of
from tgi_asgi.models.generic.states import SlotStates

# With an index, tables of compressed keys, a list of tensors, an object, and states in modules; or no cache.
OWN_KINDS = (
    "deepseek_v32", "deepseek_v4", "qwen4_exp_text", "rwkv", "xlnet", "xlstm", "recurrent_gemma",
    "openai-gpt",
)  # fmt: skip


class Layer:
    """A layer's cache as in `transformers`: a state that changes in place, and keys that are replaced."""

    def __init__(self) -> None:
        self.state = torch.zeros(2)
        self.keys = torch.zeros(0)


class Cache:
    def __init__(self) -> None:
        self.layers = [Layer()]
        self.seen: list[torch.Tensor] = [torch.zeros(1)]


def advance(states: SlotStates[Any], slot: int, start: int, length: int) -> Any:
    (state,) = states.begin([slot], [start], [length])
    state.cache.layers[0].state += length
    state.cache.seen[0] += length
    return state.cache


def test_a_state_goes_on_where_it_was() -> None:
    states = SlotStates(Cache)
    advance(states, 3, 0, 4)
    states.commit()
    assert advance(states, 3, 4, 1).layers[0].state.tolist() == [5, 5]


def test_a_step_that_fails_leaves_states_as_they_were() -> None:
    states = SlotStates(Cache)
    advance(states, 3, 0, 4)
    states.commit()
    advance(states, 3, 4, 2)  # and no commit
    cache = advance(states, 3, 4, 1)
    assert cache.layers[0].state.tolist() == [5, 5]
    assert cache.seen[0].tolist() == [5]


def test_a_step_that_was_void_is_taken_back() -> None:
    """Repeat a step that was in flight when the previous one activated a grammar or failed."""
    states = SlotStates(Cache)
    for start, length in ((0, 4), (4, 1), (5, 1)):
        advance(states, 3, start, length)
        states.commit()
    for _ in range(2):
        cache = advance(states, 3, 5, 1)
        assert cache.layers[0].state.tolist() == [6, 6]
        assert cache.seen[0].tolist() == [6]
        states.commit()
    with pytest.raises(RuntimeError, match="slot 3 has no state of 4 tokens"):
        states.begin([3], [4], [1])


def test_what_a_void_step_left_can_be_discarded() -> None:
    states = SlotStates(Cache)
    for start, length in ((0, 4), (4, 1)):
        advance(states, 3, start, length)
        states.commit()
    states.discard(3, 4)
    states.discard(2, 0)
    with pytest.raises(RuntimeError, match="slot 3 has no state of 5 tokens"):
        states.begin([3], [5], [1])
    assert advance(states, 3, 4, 1).layers[0].state.tolist() == [5, 5]


def test_a_step_that_fails_behind_its_last_layer_is_taken_back() -> None:
    """Check that the step in flight fails, too, and that the state from before both steps remains."""
    states = SlotStates(Cache)
    for start, length in ((0, 4), (4, 1)):
        advance(states, 3, start, length)
        states.commit()
    states.forget()
    with pytest.raises(RuntimeError, match="slot 3 has no state of 5 tokens"):
        states.begin([3], [5], [1])
    states.forget()
    assert advance(states, 3, 4, 1).layers[0].state.tolist() == [5, 5]
    assert states.num_steps == 2


def test_a_slot_s_new_sequence_does_not_go_on_from_the_state_of_the_last() -> None:
    states = SlotStates(Cache)
    for start, length in ((0, 4), (0, 2)):
        advance(states, 3, start, length)
        states.commit()
    with pytest.raises(RuntimeError, match="slot 3 has no state of 4 tokens"):
        states.begin([3], [4], [1])


def test_a_slot_that_is_given_to_another_sequence_begins_anew() -> None:
    states = SlotStates(Cache)
    advance(states, 3, 0, 4)
    states.commit()
    assert advance(states, 3, 0, 2).layers[0].state.tolist() == [2, 2]


@pytest.mark.parametrize(("slot", "start"), [(3, 5), (3, 3), (2, 4)])
def test_a_row_that_does_not_go_on_from_its_state_is_refused(slot: int, start: int) -> None:
    states = SlotStates(Cache)
    advance(states, 3, 0, 4)
    states.commit()
    with pytest.raises(RuntimeError, match=f"slot {slot} has no state of {start} tokens"):
        states.begin([slot], [start], [1])


@pytest.mark.parametrize("model_type", ["mamba2", "lfm2", "jamba", "kimi_linear", "rembert", *OWN_KINDS])
def test_a_step_that_fails_may_be_run_again(model_type: str, checkpoint: Callable[[str], Path]) -> None:
    """Let the second sequence fail after the first is computed; the slot's earlier owner leaves nothing."""
    folder = checkpoint(model_type)
    ids = [architectures.random_ids(20, 0), architectures.random_ids(9, 1)]
    expected = architectures.reference(folder, ids[0])
    with program_of(load_generic(folder), num_sequences=2) as program:
        program.run(batch_of([(0, 0, 5), (1, 0, 7)], ids), [0])  # another sequence's tokens: slot 0 is reused
        program.run(batch_of([(0, 0, 12)], ids), [0])
        with pytest.raises(RuntimeError, match="slot 1 has no state of 3 tokens"):
            program.run(batch_of([(0, 12, 8), (1, 3, 1)], ids), [0])
        found = program.run(batch_of([(0, 12, 8)], ids), range(8))
    assert np.abs(found - expected[12:]).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("model_type", ["mamba2", "lfm2", "kimi_linear", "rembert", *OWN_KINDS])
def test_a_row_may_be_computed_again_once_its_step_was_void(
    model_type: str, checkpoint: Callable[[str], Path]
) -> None:
    folder = checkpoint(model_type)
    ids = [architectures.random_ids(20, 0)]
    other = [[*ids[0][:13], 7, *ids[0][14:]]]
    expected = architectures.reference(folder, ids[0])
    with program_of(load_generic(folder), num_sequences=1) as program:
        program.run(batch_of([(0, 0, 13)], ids), [0])
        program.run(batch_of([(0, 13, 1)], other), [0])
        found = program.run(batch_of([(0, 13, 7)], ids), range(7))
    assert np.abs(found - expected[13:]).max() < 1e-4 * np.abs(expected).max()


def test_rows_may_fail_in_the_middle_of_a_model(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint("lfm2")
    ids = [architectures.random_ids(20, 0)]
    expected = architectures.reference(folder, ids[0])
    model = cast(Any, load_generic(folder))
    with program_of(model, num_sequences=1) as program:
        program.run(batch_of([(0, 0, 12)], ids), [0])
        last = model.module.model.layers[2]
        with monkeypatch.context() as patch:
            patch.setattr(last.feed_forward, "forward", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                program.run(batch_of([(0, 12, 8)], ids), [0])
        found = program.run(batch_of([(0, 12, 8)], ids), range(8))
    assert np.abs(found - expected[12:]).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("model_type", "name", "limit"),
    [
        ("mamba2", "time_step_limit", [0.2, 0.6]),
        ("zamba2", "time_step_min", 0.3),
        *(
            pytest.param(model_type, name, limit, marks=pytest.mark.models)
            for model_type, name, limit in (
                ("bamba", "time_step_limit", [0.2, 0.6]),
                ("falcon_h1", "time_step_limit", [0.2, 0.6]),
                ("granitemoehybrid", "time_step_limit", [0.2, 0.6]),
                ("nemotron_h", "time_step_min", 0.3),
            )
        ),
    ],
)
def test_the_time_step_of_a_single_token_has_the_limits_of_a_prompt_s(
    model_type: str, name: str, limit: object, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(checkpoint(model_type), tmp_path / model_type)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {name: limit}))
    assert measure(folder).difference < 1e-4
