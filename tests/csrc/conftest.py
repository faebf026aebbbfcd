"""The fixtures of the operators' tests serve the kernels' too."""

from tests.ops.conftest import isa, one_thread, seeded

__all__ = ["isa", "one_thread", "seeded"]
