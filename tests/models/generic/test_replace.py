"""Which modules of a model become native ones, and which stay torch's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from tests.ops.helpers import EXACT
from tests.support.generic import load_generic
from tgi_asgi import ops
from tgi_asgi.models.generic.backend import CpuBackend
from tgi_asgi.models.generic.modules import Activation, Linear, Mode, Norm, PackedModule
from tgi_asgi.models.generic.probes import activation_of, is_layer_norm
from tgi_asgi.ops import direct
from tgi_asgi.ops.tensors import from_tensor

# The modules of GPT-BigCode before 5.22.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

Checkpoint = Callable[[str], Path]


@pytest.mark.parametrize(
    ("model_type", "kept"),
    [
        ("falcon", set()),  # its matrices have their own class
        ("gpt2", {"wpe"}),  # weight initialisation names two matrices
        ("roberta", {"position_embeddings", "token_type_embeddings"}),  # its head is named in a string
        ("mamba", {"conv1d", "dt_proj", "mixer", "out_proj", "x_proj"}),  # its own code multiplies by them
    ],
)
def test_every_matrix_that_no_other_code_reads_is_packed(
    model_type: str, kept: set[str], checkpoint: Checkpoint
) -> None:
    loaded: Any = load_generic(checkpoint(model_type))
    found = {
        path.rpartition(".")[2]
        for path, module in loaded.module.named_modules()
        if not isinstance(module, PackedModule)
        for value in module._parameters.values()
        if value is not None and value.dim() > 1
    }
    assert found == kept


@pytest.mark.parametrize("model_type", ["roberta", "gpt2", "gpt_bigcode", "codegen", "opt", "persimmon"])
def test_torch_computes_no_norm_and_no_activation(model_type: str, checkpoint: Checkpoint) -> None:
    """They would run on one thread, and torch's tanh depends on what else is in a batch."""
    loaded: Any = load_generic(checkpoint(model_type))
    of_torch = {
        type(module).__name__
        for module in loaded.module.modules()
        if not list(module.children()) and type(module).__module__ != Norm.__module__
    }
    assert not {name for name in of_torch if "Embedding" not in name and name != "Dropout"}
    assert sum(isinstance(module, Activation) for module in loaded.module.modules()) == 3


@pytest.mark.parametrize("activation", ops.GATED_ACTIVATIONS)
def test_activations_are_known_by_what_they_compute(activation: str) -> None:
    class Unnamed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return direct.ACTIVATION_FUNCTIONS[activation](x)

    assert activation_of(Unnamed()) == activation


@pytest.mark.parametrize(
    "module",
    [
        ACT2FN["quick_gelu"],
        ACT2FN["gelu_10"],
        nn.ReLU6(),
        nn.Mish(),
        nn.PReLU(),
        nn.Dropout(),
        nn.Softmax(-1),
    ],
)
def test_other_functions_stay_torch_s(module: nn.Module) -> None:
    assert activation_of(module.eval()) is None


@pytest.mark.parametrize("module", [nn.ReLU(inplace=True), nn.SiLU(inplace=True)])
def test_functions_that_write_to_their_input_are_known(module: nn.Module) -> None:
    assert activation_of(module) in ("relu", "silu")


def test_a_norm_of_groups_is_no_norm_of_rows() -> None:
    """It gives the same on rows without another dimension between them, if it has a single group."""
    assert is_layer_norm(nn.LayerNorm(64)) and is_layer_norm(nn.LayerNorm(64, bias=False))
    assert not is_layer_norm(nn.GroupNorm(1, 64)) and not is_layer_norm(nn.GroupNorm(1, 3))


@pytest.mark.parametrize("num_rows", [8, 32, 33])
def test_products_can_be_viewed_whatever_their_rows(num_rows: int) -> None:
    """As those of torch: code of models may merge any of their dimensions."""
    weight, x = torch.randn(num_rows, 64), torch.randn(2, 5, 64)
    module = Linear(num_rows, 64, has_bias=False, mode=Mode(CpuBackend()))
    module.made = ops.linear_weight(from_tensor(weight), EXACT)
    torch.testing.assert_close(module(x).view(-1), (x @ weight.T).view(-1))


def test_transposed_rows_stay_transposed() -> None:
    """Code of models may `view` them, which torch allows in one of the two layouts only."""
    x = torch.randn(2, 7, 5).transpose(1, 2)
    found, expected = Activation("gelu")(x), nn.functional.gelu(x)
    assert found.stride() == expected.stride()
    torch.testing.assert_close(found, expected)
