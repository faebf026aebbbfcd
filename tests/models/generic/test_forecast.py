"""The memory of a `transformers` module is predicted before weights are read: packed, kept, looked up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from torch import Tensor, nn

from tests.models.generic.test_experts import CODES, with_quantised_experts
from tests.support import architectures
from tests.support.generic import MAX_CONTEXT, batch_of, open_generic, program_of
from tgi_asgi import ops
from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats.sources import ModelFiles
from tgi_asgi.models.generic import module_caches, rope
from tgi_asgi.models.generic.model import GenericModel
from tgi_asgi.models.generic.modules import GatedMlp, PackedModule
from tgi_asgi.models.generic.rope import RotaryLookup
from tgi_asgi.models.loading.open import OpenModel
from tgi_asgi.runner import load as loading
from tgi_asgi.runner.memory import packed_bytes
from tgi_asgi.settings import Settings

pytestmark = pytest.mark.usefixtures("as_module")

Checkpoint = Callable[[str], Path]

EXACT, FAST, SMALL = ops.Packing(True), ops.Packing(False), ops.Packing(False, "Q8_0")


def packed_weights_of(model: nn.Module) -> Iterator[Any]:
    """Yield the packed weights of a module."""
    for module in model.modules():
        if isinstance(module, PackedModule):
            yield module.packed.made
        elif isinstance(module, GatedMlp):
            assert module.gate_up is not None and module.down is not None
            yield from (*module.gate_up.made.parts, module.down.made)


def torch_tensors_of(model: nn.Module) -> Iterator[Tensor]:
    """Yield the tensors that torch holds."""
    for module in model.modules():
        if not isinstance(module, PackedModule):
            tensors = (*module._parameters.values(), *module._buffers.values())
            yield from (each for each in tensors if each is not None)
        lookup = module.__dict__.get("forward")
        if isinstance(lookup, RotaryLookup):
            for tables in lookup._tables.values():
                yield from tables


def predicted_and_actual_bytes(folder: Path, arithmetic: ops.Packing, context: int = 64) -> tuple[int, int]:
    """Load a model; return the predicted and the actual number of bytes."""
    with open_generic(folder) as opened:
        vocabulary = opened.config.vocabulary_sizes
        predicted = packed_bytes(opened.packed_tensors(), arithmetic, vocabulary)
        predicted += opened.table_bytes(context)
        loaded = opened.load(arithmetic, context)
    assert isinstance(loaded, GenericModel)
    held = {id(each.matrix): each.matrix.nbytes for each in packed_weights_of(loaded.module)}
    kept = {each.data_ptr(): each.untyped_storage().nbytes() for each in torch_tensors_of(loaded.module)}
    found = (module.__dict__.get("tgi_experts") for module in loaded.module.modules())
    experts = sum(each.nbytes for each in found if each is not None)
    return predicted, sum(held.values()) + sum(kept.values()) + experts


@pytest.mark.parametrize("arithmetic", [EXACT, FAST, SMALL], ids=["exact", "fast", "q8_0"])
@pytest.mark.parametrize(
    "model_type",
    [
        "llama",
        "gpt2",  # a table of positions
        "mixtral",  # native experts, and a router
        "dbrx",  # its own experts
        "gpt_oss",  # experts in one tensor
        "mamba2",
        "roberta",  # a tied head with a bias, so it is packed again
        "gemma3_text",  # two kinds of tables
    ],
)
def test_what_a_module_holds_is_foretold(
    model_type: str, arithmetic: ops.Packing, checkpoint: Checkpoint
) -> None:
    predicted, held = predicted_and_actual_bytes(checkpoint(model_type), arithmetic)
    assert predicted == pytest.approx(held, rel=0.06)


@pytest.mark.parametrize("recipe", list(CODES))
def test_what_quantised_experts_take_is_foretold(recipe: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder, _ = with_quantised_experts(checkpoint("mixtral"), tmp_path, recipe)
    predicted, held = predicted_and_actual_bytes(folder, EXACT)
    assert predicted == pytest.approx(held, rel=0.06)


def test_a_model_that_fits_but_for_what_torch_keeps_is_refused_before_it_is_read(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Use dbrx, where `--quantize` applies to everything except the experts."""
    monkeypatch.setattr(loading, "free_memory", lambda: 400_000)
    monkeypatch.setattr(OpenModel, "load", lambda *_: pytest.fail("weights were read"))
    settings = Settings(thread_nice=0, num_threads=1, max_batch_size=2, quantize="q8_0")
    with pytest.raises(ModelLoadError, match="the model's weights take"):
        loading.load(settings, ModelFiles("tiny", None, "directory", checkpoint("dbrx")), lambda *_: None)


@pytest.mark.parametrize(("most", "count"), [(2 * 64 * 64 * 2, 1), (2 * 64 * 64 * 2 - 1, 0)])
def test_tables_of_a_model_take_no_more_than_is_allowed_together(
    most: int, count: int, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rope, "_MAX_BYTES", most)
    with open_generic(checkpoint("gemma3_text")) as opened:
        assert opened.table_bytes(64) == most
        loaded = opened.load(EXACT, 64)
    assert isinstance(loaded, GenericModel)
    found = [module for module in loaded.module.modules() if "forward" in vars(module)]
    assert sum(isinstance(module.forward, RotaryLookup) for module in found) == count


@pytest.mark.parametrize(
    "model_type",
    ["mamba2", "lfm2", "jamba", "kimi_linear", "qwen3_next", "recurrent_gemma", "rwkv", "xlstm"],
)
def test_what_the_states_of_a_sequence_take_is_foretold(model_type: str, checkpoint: Checkpoint) -> None:
    with open_generic(checkpoint(model_type)) as opened:
        predicted = opened.config.other_state_bytes
        model = opened.load(EXACT, MAX_CONTEXT)
    assert isinstance(model, GenericModel)
    ids = [architectures.random_ids(20, 0)]
    with program_of(model, num_sequences=1) as program:
        for start, count in ((0, 9), (9, 1), (10, 10)):
            program.run(batch_of([(0, start, count)], ids), [0])
        kept = cast(Any, program)._states._states[0]
    tensors = [tensor for state in kept for tensor in module_caches.tensors_of(state.cache)]
    assert predicted == sum(4 * tensor.numel() for tensor in tensors) > 0


@pytest.mark.parametrize("model_type", ["deepseek_v32", "glm_moe_dsa", "xlnet", "rembert"])
def test_what_a_token_takes_in_a_cache_of_the_model_s_own_is_foretold(
    model_type: str, checkpoint: Checkpoint
) -> None:
    with open_generic(checkpoint(model_type)) as opened:
        predicted = opened.config.other_bytes_per_token
        model = opened.load(EXACT, MAX_CONTEXT)
    assert isinstance(model, GenericModel)
    ids = [architectures.random_ids(20, 0)]
    with program_of(model, num_sequences=1) as program:
        program.run(batch_of([(0, 0, 20)], ids), [0])
        kept = cast(Any, program)._states._states[0][-1].cache
    tensors = module_caches.tensors_of(kept, with_tokens=True)
    assert predicted * 20 == 2 * sum(tensor.nbytes for tensor in tensors) > 0
