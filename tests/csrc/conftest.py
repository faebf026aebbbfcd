"""Reuse the fixtures of the operators' tests for the kernels' tests."""

from tests.ops.conftest import kernel_set, one_thread, seeded

__all__ = ["kernel_set", "one_thread", "seeded"]
