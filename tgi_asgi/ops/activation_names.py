"""The names of the activation functions of MLPs."""

from __future__ import annotations

GATED_ACTIVATIONS = ("silu", "gelu_tanh", "gelu", "relu", "relu_squared")  # for both `gate_up` and `up`
XIELU = "xielu"  # `up` only: it has two parameters
ACTIVATIONS = (*GATED_ACTIVATIONS, XIELU)
