"""States of running sequences: each sequence has its own, and a failed step leaves them unchanged."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from tests.support import architectures
from tests.support.architecture_table import CONFIG
from tests.support.generic import batch_of, load_generic, measure, program_of
from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats.sources import ModelFiles
from tgi_asgi.models.generic.model import GenericModel
from tgi_asgi.models.generic.module_caches import copy_layer
from tgi_asgi.models.generic.states import RowSpan, SlotStates
from tgi_asgi.runner.load import load
from tgi_asgi.settings import Settings

# With an index, tables of compressed keys, a list of tensors, an object, and states in modules; or no cache.
OWN_KINDS = (
    "deepseek_v32", "deepseek_v4", "qwen4_exp_text", "rwkv", "xlnet", "xlstm", "recurrent_gemma",
    "openai-gpt",
)  # fmt: skip

# Models with recurrent layers whose states can be joined, and continue with several tokens at once.
JOINED = (
    "bailing_hybrid", "bamba", "falcon_h1", "kimi_linear", "lara_mini", "lfm2", "mamba2", "minimax",
    "nemotron_h", "olmo_hybrid", "qwen3_5_text", "zamba2",
)  # fmt: skip

IDS = [architectures.random_ids(length, seed) for seed, length in enumerate((37, 14, 9))]


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
    (state,) = states.begin([RowSpan(slot, start, length)])
    state.cache.layers[0].state += length
    state.cache.seen[0] += length
    return state.cache


@pytest.fixture(scope="module")
def loaded(checkpoint: Callable[[str], Path]) -> Callable[[str], GenericModel]:
    """Return a function that loads each model once: most of the time of these tests would go into it."""

    @functools.cache
    def load_once(model_type: str) -> GenericModel:
        model = load_generic(checkpoint(model_type))
        assert isinstance(model, GenericModel)
        return model

    return load_once


@pytest.fixture(scope="module")
def reference_of(checkpoint: Callable[[str], Path]) -> Callable[[str], list[np.ndarray]]:
    """Return a function that computes the logits of `IDS` once for each model."""
    return functools.cache(lambda model_type: architectures.references(checkpoint(model_type), IDS))


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
        states.begin([RowSpan(3, 4, 1)])


def test_what_a_void_step_left_can_be_discarded() -> None:
    states = SlotStates(Cache)
    for start, length in ((0, 4), (4, 1)):
        advance(states, 3, start, length)
        states.commit()
    states.discard(3, 4)
    states.discard(2, 0)
    with pytest.raises(RuntimeError, match="slot 3 has no state of 5 tokens"):
        states.begin([RowSpan(3, 5, 1)])
    assert advance(states, 3, 4, 1).layers[0].state.tolist() == [5, 5]


def test_a_step_that_fails_behind_its_last_layer_is_taken_back() -> None:
    """Check that the step in flight fails, too, and that the state from before both steps remains."""
    states = SlotStates(Cache)
    for start, length in ((0, 4), (4, 1)):
        advance(states, 3, start, length)
        states.commit()
    states.forget()
    with pytest.raises(RuntimeError, match="slot 3 has no state of 5 tokens"):
        states.begin([RowSpan(3, 5, 1)])
    states.forget()
    assert advance(states, 3, 4, 1).layers[0].state.tolist() == [5, 5]
    assert states.num_steps == 2


def test_a_slot_s_new_sequence_does_not_go_on_from_the_state_of_the_last() -> None:
    states = SlotStates(Cache)
    for start, length in ((0, 4), (0, 2)):
        advance(states, 3, start, length)
        states.commit()
    with pytest.raises(RuntimeError, match="slot 3 has no state of 4 tokens"):
        states.begin([RowSpan(3, 4, 1)])


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
        states.begin([RowSpan(slot, start, 1)])


def test_another_slot_resumes_from_a_state_that_was_kept_between_steps() -> None:
    states = SlotStates(Cache)
    advance(states, 3, 0, 4)
    states.commit()
    (state,) = states.begin([RowSpan(3, 4, 1, keeps=[(4, 7)])])
    state.cache.layers[0].state += 1
    assert not state.forks
    states.commit()
    for _ in range(2):  # as often as wanted
        (state,) = states.begin([RowSpan(5, 4, 2, resumes=7)])
        assert state.cache.layers[0].state.tolist() == [4, 4]
        state.cache.layers[0].state += 2
        states.commit()
    assert advance(states, 5, 6, 1).layers[0].state.tolist() == [7, 7]
    assert advance(states, 3, 5, 1).layers[0].state.tolist() == [6, 6]


def test_another_slot_resumes_from_a_state_within_a_row() -> None:
    states = SlotStates(Cache)
    (state,) = states.begin([RowSpan(3, 0, 6, keeps=[(2, 0), (5, 1)])])
    assert [tokens for tokens, _ in state.forks] == [2, 5]
    done = 0
    for tokens, forked in state.forks:
        state.cache.layers[0].state += tokens - done
        state.cache.seen[0] += tokens - done
        copy_layer(state.cache, forked, 0)
        done = tokens
    state.cache.layers[0].state += 1
    states.commit()
    for place, tokens in ((0, 2), (1, 5)):
        (state,) = states.begin([RowSpan(4, tokens, 1, resumes=place)])
        assert state.cache.layers[0].state.tolist() == [tokens, tokens]
        assert state.cache.seen[0].tolist() == [tokens]
    assert advance(states, 3, 6, 1).layers[0].state.tolist() == [7, 7]


def test_a_step_that_fails_keeps_no_state() -> None:
    states = SlotStates(Cache)
    advance(states, 3, 0, 4)
    states.commit()
    states.begin([RowSpan(3, 4, 1, keeps=[(4, 7)])])  # and no commit
    with pytest.raises(RuntimeError, match="place 7 has no state of 4 tokens"):
        states.begin([RowSpan(5, 4, 1, resumes=7)])
    states.begin([RowSpan(3, 4, 1, keeps=[(4, 7)])])
    states.commit()
    with pytest.raises(RuntimeError, match="place 7 has no state of 5 tokens"):
        states.begin([RowSpan(5, 5, 1, resumes=7)])


@pytest.mark.parametrize(
    "model_type",
    [*JOINED, "zaya"],
)
def test_rows_resume_from_states_kept_within_and_between_rows(
    model_type: str, loaded: Callable[[str], GenericModel], reference_of: Callable[[str], list[np.ndarray]]
) -> None:
    """Keep two states within a row and one before a row; the slot's own state is elsewhere each time."""
    expected, model = reference_of(model_type)[0], loaded(model_type)
    assert model.keeps_states
    assert model.config.other_kept_bytes * 2 == model.config.other_state_bytes > 0
    with program_of(model, num_sequences=2) as program:
        keeps = [(0, 5, 2), (0, 17, 0), (0, 17, 3)]  # as for other choices, after a block's last token
        program.run(batch_of([(0, 0, 20), (1, 0, 9)], IDS, keeps=keeps), [0])
        program.run(batch_of([(0, 20, 1)], IDS, keeps=[(0, 20, 1)]), [0])
        for place, start in ((0, 17), (2, 5), (1, 20), (0, 17), (3, 17)):
            found = program.run(batch_of([(0, start, 37 - start)], IDS, resumes=[place]), range(37 - start))
            assert np.abs(found - expected[start:]).max() < 1e-4 * np.abs(expected).max(), (place, start)


@pytest.mark.parametrize("model_type", [*JOINED, "falcon_mamba", "jamba", "recurrent_gemma", "zamba"])
def test_sequences_with_one_token_each_are_run_together(
    model_type: str, loaded: Callable[[str], GenericModel], reference_of: Callable[[str], list[np.ndarray]]
) -> None:
    """Run such a step twice, as after one that was void, and beside a prompt, and keep a state before it."""
    expected, model = reference_of(model_type), loaded(model_type)
    assert model.recurrent is not None and model.recurrent.joins_tokens
    keeps = [(1, 12, 0)] if model.keeps_states else []
    steps: list[tuple[list[tuple[int, int, int]], dict[str, Any]]] = [
        ([(0, 0, 18), (1, 0, 12)], {}),
        ([(0, 18, 1), (1, 12, 1)], {"keeps": keeps}),
        ([(0, 18, 1), (1, 12, 1)], {}),
        ([(1, 13, 1), (2, 0, 8), (0, 19, 1)], {}),
        ([(2, 8, 1)], {}),
        *([([(1, 12, 2)], {"resumes": [0]})] if keeps else []),
    ]
    with program_of(model, num_sequences=3) as program:
        for step, moves in steps:
            batch = batch_of(step, IDS, **moves)
            logits, at = program.run(batch, range(len(batch.ids))), 0
            for sequence, start, count in step:
                wanted = expected[sequence]
                apart = np.abs(logits[at : at + count] - wanted[start : start + count]).max()
                assert apart < 1e-4 * np.abs(wanted).max(), (step, sequence)
                at += count


def test_a_recurrent_layer_may_be_wider_than_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Begin with one token, where RecurrentGemma's own code makes a state as wide as the model."""
    monkeypatch.setitem(cast(Any, CONFIG), "recurrent_gemma", {"lru_width": 96})
    architectures.make("recurrent_gemma", tmp_path)
    expected = architectures.references(tmp_path, IDS[:2])
    with program_of(load_generic(tmp_path), num_sequences=2) as program:
        for step in ([(0, 0, 1)], [(0, 1, 1), (1, 0, 1)], [(0, 2, 9), (1, 1, 1)]):
            found, at = program.run(batch_of(step, IDS), range(sum(count for *_, count in step))), 0
            for sequence, start, count in step:
                wanted = expected[sequence][start : start + count]
                assert np.abs(found[at : at + count] - wanted).max() < 1e-4 * np.abs(wanted).max()
                at += count


@pytest.mark.parametrize("model_type", ["mamba2", "lfm2", "jamba", "kimi_linear", "rembert", *OWN_KINDS])
def test_a_step_that_fails_may_be_run_again(
    model_type: str, loaded: Callable[[str], GenericModel], reference_of: Callable[[str], list[np.ndarray]]
) -> None:
    """Let the second sequence fail after the first is computed; the slot's earlier owner leaves nothing."""
    expected = reference_of(model_type)[0]
    with program_of(loaded(model_type), num_sequences=2) as program:
        program.run(batch_of([(0, 0, 5), (1, 0, 7)], IDS), [0])  # another sequence's tokens: slot 0 is reused
        program.run(batch_of([(0, 0, 12)], IDS), [0])
        with pytest.raises(RuntimeError, match="slot 1 has no state of 3 tokens"):
            program.run(batch_of([(0, 12, 8), (1, 3, 1)], IDS), [0])
        found = program.run(batch_of([(0, 12, 8)], IDS), range(8))
    assert np.abs(found - expected[12:20]).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("model_type", ["mamba2", "lfm2", "kimi_linear", "rembert", *OWN_KINDS])
def test_a_row_may_be_computed_again_once_its_step_was_void(
    model_type: str, loaded: Callable[[str], GenericModel], reference_of: Callable[[str], list[np.ndarray]]
) -> None:
    other = [[*IDS[0][:13], 7, *IDS[0][14:]]]
    expected = reference_of(model_type)[0]
    with program_of(loaded(model_type), num_sequences=1) as program:
        program.run(batch_of([(0, 0, 13)], IDS), [0])
        program.run(batch_of([(0, 13, 1)], other), [0])
        found = program.run(batch_of([(0, 13, 7)], IDS), range(7))
    assert np.abs(found - expected[13:20]).max() < 1e-4 * np.abs(expected).max()


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


@pytest.mark.parametrize(("model_type", "is_kept"), [("mamba2", True), ("mamba", False)])
def test_a_runner_has_places_for_states_that_can_be_kept(
    model_type: str, is_kept: bool, checkpoint: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    files = ModelFiles("tiny", None, "directory", checkpoint(model_type))
    settings = Settings(num_threads=1, max_kept_states=5, dtype="float32", model_impl="transformers")
    loaded = load(settings, files, lambda *_: None)
    loaded.runner.close()
    assert loaded.runner.traits.num_kept_states == loaded.info.num_kept_states == 5 * is_kept
    each = load_generic(checkpoint(model_type)).config.other_kept_bytes
    assert loaded.info.kept_state_bytes == 5 * is_kept * each
    assert ("--max-kept-states is ignored: the states of" in caplog.text) != is_kept


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


@pytest.mark.parametrize("limits", [[0.1, 0.2, 0.3], []])
def test_limits_of_time_steps_that_are_no_pair_are_refused(
    limits: list[float], checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(checkpoint("mamba2"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "time_step_limit": limits}))
    with pytest.raises(ModelLoadError, match=r"time_step_limit"):
        load_generic(folder)
