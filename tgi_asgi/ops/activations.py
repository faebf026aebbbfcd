"""The activation functions of MLPs: their names and torch implementations."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

# For both `gate_up` and `up`.
GATED_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": torch.nn.functional.silu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "gelu": torch.nn.functional.gelu,
    "relu": torch.nn.functional.relu,
    "relu_squared": lambda x: torch.nn.functional.relu(x).square(),
}
XIELU = "xielu"  # `up` only: it has two parameters
ACTIVATIONS = (*GATED_ACTIVATIONS, XIELU)
