"""The fixtures of the operators' tests serve the kernels' too."""

from tests.ops.conftest import kernel_set, one_thread, seeded

__all__ = ["kernel_set", "one_thread", "seeded"]
