"""If the processor has AMX but the system refuses it, the next kernel set serves and the reason is logged.

The tests run on any machine with AVX-512 and BF16: a small program simulates a processor that reports AMX,
and a seccomp filter answers in place of the system.
"""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path

import pytest

from tests.support.cpp_program import compiled
from tgi_asgi import _C

OWN_ANSWER = -1  # let the system answer
HAS_AMX = "amx" in _C.kernel_sets()
pytestmark = pytest.mark.skipif(
    "amx_model" not in _C.kernel_sets(), reason="kernels for AMX need AVX-512 and BF16 beside it"
)


@pytest.fixture(scope="module")
def program() -> Path:
    """Build the choice of kernels with dummy kernel sets and a simulated processor."""
    sources = [f"csrc/cpu/step/{name}.cpp" for name in ("amx_grant", "kernel_sets", "supported_sets")]
    return compiled("amx_grant", "tests/csrc/amx_grant.cpp", *sources)


def choice(
    program: Path, *, is_supported: bool, is_os_enabled: bool, answer: int, wish: str = ""
) -> tuple[list[str], str, str, str]:
    """Return the kernel sets, the one that serves, the one that a forked child uses, and the refusal."""
    environ = {**os.environ, "TGI_ISA": wish}
    environ.pop("LD_PRELOAD", None)  # a sanitizer's, which the program is not built with
    command = [str(program), str(int(is_supported)), str(int(is_os_enabled)), str(answer)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=20, check=False)
    if done.returncode == 77:
        pytest.skip("this system has no seccomp filters")
    assert done.returncode == 0, done.stderr
    sets, serving, child, refused = done.stdout.splitlines()
    return sets.split(), serving, child, refused


def test_tiles_that_are_granted_serve_and_serve_a_forked_child(program: Path) -> None:
    sets, serving, child, refused = choice(program, is_supported=True, is_os_enabled=True, answer=0)
    assert sets[-1] == serving == child == "amx"
    assert refused == ""


@pytest.mark.parametrize(
    ("is_os_enabled", "answer", "reason"),
    [
        (False, 0, "amx: the system does not keep the tiles of its threads"),
        (True, errno.EPERM, "amx: the system refused its tiles (arch_prctl)"),
        (True, errno.EINVAL, "amx: the system refused its tiles (arch_prctl)"),  # Linux before 5.16
        (True, errno.ENOSPC, "amx: a thread's signal stack is too small for its tiles (sigaltstack)"),
        pytest.param(
            True, OWN_ANSWER, "amx: the system refused its tiles (arch_prctl)",
            marks=pytest.mark.skipif(HAS_AMX, reason="this machine has AMX, and grants it"),
        ),
    ],
)  # fmt: skip
def test_tiles_that_are_refused_leave_the_next_set(
    program: Path, is_os_enabled: bool, answer: int, reason: str
) -> None:
    without = choice(program, is_supported=False, is_os_enabled=False, answer=OWN_ANSWER)
    found = choice(program, is_supported=True, is_os_enabled=is_os_enabled, answer=answer)
    assert without[3] == ""
    assert "amx" not in without[0]
    assert found == (*without[:3], reason)
    assert found[1] not in ("portable", "amx_model")


def test_a_wish_for_tiles_that_are_refused_is_not_met(program: Path) -> None:
    _, serving, _, refused = choice(
        program, is_supported=True, is_os_enabled=True, answer=errno.EPERM, wish="amx"
    )
    assert serving != "amx"
    assert refused
