"""Compute threads and instruction set of the CPU kernels; importing it registers `torch.ops.tgi`."""

def num_threads() -> int:
    """Return the number of compute threads, the caller's own included."""

def set_num_threads(num_threads: int) -> None:
    """Set the number of compute threads; 0 means the default."""

def default_num_threads() -> int:
    """Return the cores that the process may use, by affinity and by cgroup quota."""

def configure_team(num_threads: int = 0, nice: int = 0, pin: bool = False, spin_us: int = 75) -> None:
    """Restart the team with these options."""

def join_team() -> None:
    """Give the calling thread the team's nice value and member 0's core, for good."""

def wake_team() -> None:
    """Unpark the team ahead of a step."""

def isa() -> str:
    """Return the instruction set in use: portable, avx2 or avx512."""

def supported_isas() -> list[str]:
    """Return what `force_isa` takes on this machine."""

def force_isa(name: str) -> None:
    """Use this instruction set from now on (for tests)."""
