"""Delta nets of modules on native kernels: like their own code, with states of their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support import architectures
from tests.support.generic import batch_of, load_generic, program_of, run_steps
from tgi_asgi import ops
from tgi_asgi.models.generic import open as generic_open
from tgi_asgi.models.generic.delta_nets import DeltaNets, NativeStates
from tgi_asgi.models.generic.model import GenericModel

Checkpoint = Callable[[str], Path]
MODEL_TYPES = ("qwen3_5_text", "qwen3_5_moe_text")
EQUAL = 1e-5  # of the largest logit


@pytest.fixture(scope="module")
def qwen(checkpoint: Checkpoint) -> GenericModel:
    """Qwen 3.5's module, whose states each test makes anew."""
    return loaded_of(checkpoint("qwen3_5_text"))


def loaded_of(folder: Path) -> GenericModel:
    loaded = load_generic(folder)
    assert isinstance(loaded, GenericModel)
    return loaded


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_steps_give_the_logits_of_the_modules_own_code(model_type: str, checkpoint: Checkpoint) -> None:
    folder = checkpoint(model_type)
    loaded = loaded_of(folder)
    assert loaded.delta_nets is not None and len(loaded.delta_nets.nets) > 0
    ids = [architectures.random_ids(length, seed) for seed, length in enumerate((37, 29, 11))]
    assert run_steps(loaded, ids, architectures.references(folder, ids)) < EQUAL


def test_modules_of_another_form_run_their_own_code(checkpoint: Checkpoint) -> None:
    for model_type in ("lfm2", "olmo_hybrid", "kimi_linear"):
        assert loaded_of(checkpoint(model_type)).delta_nets is None, model_type


def test_a_net_that_computes_something_else_runs_its_own_code(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = checkpoint("qwen3_5_text")

    class Wrong(DeltaNets):
        def _run(
            self, index: int, module: Any, forward: Any, hidden_states: Any, *args: Any, **_: Any
        ) -> Any:
            found = super()._run(index, module, forward, hidden_states, *args, **_)
            return found if self._rows is None else 1.1 * found

    monkeypatch.setattr(generic_open, "DeltaNets", Wrong)
    loaded = loaded_of(folder)
    assert loaded.delta_nets is None and loaded.recurrent is not None and loaded.keeps_states
    assert "run on the code of transformers, slowly" in caplog.text
    ids = [architectures.random_ids(37, 0), architectures.random_ids(29, 1), architectures.random_ids(11, 2)]
    assert run_steps(loaded, ids, architectures.references(folder, ids)) < EQUAL


def test_a_tokens_bits_do_not_depend_on_how_its_sequence_was_split(qwen: GenericModel) -> None:
    assert qwen.delta_nets is not None
    net, rng = qwen.delta_nets.nets[0], np.random.default_rng(0)
    qkv = torch.from_numpy(rng.normal(size=(30, net.num_channels)).astype(np.float32))
    steps = torch.from_numpy(rng.normal(size=(30, net.num_steps)).astype(np.float32))
    found = []
    for parts in ([(0, 30)], [(0, 7), (7, 1), (8, 22)], [(at, 1) for at in range(30)]):
        states = NativeStates(qwen.delta_nets, num_slots=2, num_kept=1)
        rows = []
        for start, count in parts:
            states.begin(batch_of([(1, start, count)], [[], [5] * 30]))
            rows.append(states._rows.delta_net(0, net, qkv[start:][:count], steps[start:][:count]))
            states.commit()
        found.append(torch.cat(rows))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_rows_of_another_shape_or_before_a_step_are_refused(qwen: GenericModel) -> None:
    assert qwen.delta_nets is not None
    net = qwen.delta_nets.nets[0]
    states = NativeStates(qwen.delta_nets, num_slots=2, num_kept=0)
    qkv, steps = torch.zeros(3, net.num_channels), torch.zeros(3, net.num_steps)
    with pytest.raises(ValueError, match="no step has begun"):
        states._rows.delta_net(0, net, qkv, steps)
    with pytest.raises(ValueError, match="no step has begun"):
        states.commit()
    states.begin(batch_of([(1, 0, 3)], [[], [5] * 3]))
    with pytest.raises(ValueError, match=r"`qkv` must be \[3, "):
        states._rows.delta_net(0, net, qkv[:2], steps)
    with pytest.raises(ValueError, match=r"`steps` must be \[3, "):
        states._rows.delta_net(0, net, qkv, steps[:, 1:])
    with pytest.raises(ValueError, match="`layer` must be in"):
        states._rows.delta_net(100, net, qkv, steps)
    with pytest.raises(TypeError):
        states._rows.delta_net(0, net, qkv.double(), steps)
    with pytest.raises(ValueError, match="no state of 4 tokens"):
        states.begin(batch_of([(1, 4, 1)], [[], [5] * 5]))


def test_a_step_that_fails_or_is_void_leaves_the_states(checkpoint: Checkpoint, qwen: GenericModel) -> None:
    ids = [architectures.random_ids(20, 0)]
    expected = architectures.reference(checkpoint("qwen3_5_text"), ids[0])
    with program_of(qwen, num_sequences=1) as program:
        program.run(batch_of([(0, 0, 12)], ids), [0])
        program.run(batch_of([(0, 12, 2)], [[*ids[0][:12], 7, 7]]), [0])  # in vain
        program.roll_back_to(program.num_steps - 1)
        with pytest.raises(ValueError, match="no state of 14 tokens"):
            program.run(batch_of([(0, 14, 1)], ids), [0])
        found = program.run(batch_of([(0, 12, 8)], ids), range(8))
    assert np.abs(found - expected[12:]).max() < EQUAL * np.abs(expected).max()


def test_the_pool_takes_the_memory_that_is_forecast(qwen: GenericModel) -> None:
    assert qwen.delta_nets is not None
    nets = qwen.delta_nets.nets
    used = sum(ops.kept_state_bytes(net) for net in nets)
    # The module's code keeps as many tokens as its convolution has taps, one more than the kernels.
    window = sum(4 * net.num_channels for net in nets)
    assert used == qwen.config.other_kept_bytes - window
