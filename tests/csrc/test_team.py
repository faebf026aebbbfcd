"""The thread team: its size, priority and cores, callers that take turns, and its state after a fork."""

from __future__ import annotations

import ast
import contextlib
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.support import eager_ops
from tgi_asgi import _C

ROWS = torch.randn(64, 257)


@pytest.fixture
def team() -> Iterator[None]:
    """Let the test reconfigure the team, and restore a plain one afterwards."""
    before = _C.num_threads()
    yield
    _C.configure_team(before)


def norm() -> torch.Tensor:
    return eager_ops.norm(ROWS, eager_ops.norm_weight(torch.ones(257), 1e-5))


def team_threads() -> list[int]:
    """Return the kernel's ids of the threads that the team owns."""
    found = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the thread may have ended
            if (task / "comm").read_text().strip() == "tgi-team":
                found.append(int(task.name))
    return found


def state_of(thread: int) -> str:
    return Path(f"/proc/self/task/{thread}/stat").read_text().rsplit(")", 1)[1].split()[0]


def until(holds: object, seconds: float = 20) -> bool:
    """Wait for a condition that another thread makes true; return whether it holds."""
    assert callable(holds)
    deadline = time.monotonic() + seconds
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.001)
    return bool(holds())


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_any_number_of_threads_gives_the_same_bits(team: None, threads: int) -> None:
    alone = norm()
    _C.set_num_threads(threads)
    assert _C.num_threads() == threads
    assert torch.equal(norm(), alone)
    assert until(lambda: len(team_threads()) == threads - 1)


def test_the_default_is_what_the_process_may_use(team: None) -> None:
    _C.set_num_threads(0)
    assert _C.num_threads() == _C.default_num_threads() <= len(os.sched_getaffinity(0))


def test_kernels_fit_the_stacks_of_threads_where_the_shell_s_limit_is_small() -> None:
    script = """
import ctypes
from tgi_asgi import _C

libc, defaults, size = ctypes.CDLL(None), ctypes.create_string_buffer(64), ctypes.c_size_t()
libc.pthread_getattr_default_np(defaults)
libc.pthread_attr_getstacksize(defaults, ctypes.byref(size))
print(size.value)
"""
    command = ["sh", "-c", 'ulimit -s 128; exec "$0" -c "$1"', sys.executable, script]
    assert int(subprocess.check_output(command)) >= 512 << 10


@pytest.mark.parametrize("num_started", [0, 1])
def test_a_thread_that_cannot_start_is_an_error_and_a_smaller_team_works(num_started: int) -> None:
    """Limit the address space to the stacks of this many threads, which acts like a limit on processes."""
    script = f"""
import resource
import numpy as np
from tgi_asgi import _C

values = np.ones((5000, 256), np.float32)  # enough that the team is used

def quantised():
    return _C.quantise(values.reshape(-1).view(np.uint8), "F32", 256, "Q8_0").tobytes()

_C.configure_team(1)
quantised()
pages = int(open("/proc/self/statm").read().split()[0])
stack = resource.getrlimit(resource.RLIMIT_STACK)[0]
size = pages * resource.getpagesize() + {num_started} * stack + stack // 2
resource.setrlimit(resource.RLIMIT_AS, (size, resource.RLIM_INFINITY))
for attempt in range(2):
    try:
        _C.configure_team(4)
        quantised()
    except RuntimeError as error:
        print(error)
_C.configure_team(1 + {num_started})
print(quantised() == quantised())
"""
    command = ["sh", "-c", 'ulimit -s 65536; exec "$0" -c "$1"', sys.executable, script]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    first, second, works = ran.stdout.splitlines()
    assert first == second
    assert first.startswith("cannot start 4 compute threads: Resource temporarily unavailable")
    assert f"after {num_started + 1};" in first
    assert works == "True"


def test_members_without_a_core_are_left_out_and_no_bit_changes(team: None) -> None:
    expected = norm()
    cores = os.sched_getaffinity(0)
    members = len(cores) + 14
    _C.configure_team(members, pin=True, yields_cores=True)
    sizes: set[int] = set()

    def has_changed() -> bool:
        assert torch.equal(norm(), expected)
        sizes.add(_C.num_running_threads())
        return len(sizes) > 2

    assert until(has_changed, 60)
    assert max(sizes) == members
    # The others may run on any core.
    assert len(cores) == 1 or any(len(os.sched_getaffinity(thread)) > 1 for thread in team_threads())


def test_other_teams_keep_all_members(team: None) -> None:
    members = len(os.sched_getaffinity(0)) + 14
    _C.configure_team(members)
    end = time.monotonic() + 1
    while time.monotonic() < end:
        norm()
        assert _C.num_running_threads() == members


def test_callers_on_many_threads_take_turns(team: None) -> None:
    _C.set_num_threads(2)
    expected = norm()
    results: list[torch.Tensor] = []
    workers = [threading.Thread(target=lambda: results.extend(norm() for _ in range(5))) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 20
    assert all(torch.equal(result, expected) for result in results)


def test_an_idle_team_sleeps(team: None) -> None:
    _C.configure_team(3, spin_us=10)
    norm()
    assert until(lambda: [state_of(thread) for thread in team_threads()] == ["S", "S"])
    assert torch.equal(norm(), norm())


def test_a_parked_team_is_woken_ahead_of_a_run(team: None) -> None:
    _C.configure_team(2, spin_us=500_000)
    norm()
    (thread,) = team_threads()
    assert until(lambda: state_of(thread) == "S")
    _C.wake_team()
    assert until(lambda: state_of(thread) == "R")


def test_team_threads_take_the_nice_value_and_the_core_asked_for(team: None) -> None:
    own = os.getpriority(os.PRIO_PROCESS, 0)
    _C.configure_team(2, nice=7, pin=True)
    norm()
    (thread,) = team_threads()
    cores = sorted(os.sched_getaffinity(0))
    assert until(lambda: os.getpriority(os.PRIO_PROCESS, thread) == 7)
    assert until(lambda: os.sched_getaffinity(thread) == {cores[1 % len(cores)]})
    assert os.getpriority(os.PRIO_PROCESS, 0) == own, "the caller's priority must not change"


def test_the_thread_that_joins_takes_member_zeros_place(team: None) -> None:
    _C.configure_team(2, nice=5, pin=True)
    seen: list[object] = []

    def join() -> None:
        _C.join_team()
        own = threading.get_native_id()
        seen.extend([os.getpriority(os.PRIO_PROCESS, own), os.sched_getaffinity(own)])

    joiner = threading.Thread(target=join)
    joiner.start()
    joiner.join()
    assert seen == [5, {min(os.sched_getaffinity(0))}]


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_starts_a_team_of_its_own(team: None) -> None:
    _C.set_num_threads(2)
    expected = norm()
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(norm(), expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert torch.equal(norm(), expected)


@pytest.mark.parametrize(
    "call",
    [
        lambda: _C.set_num_threads(-1),
        lambda: _C.configure_team(2000),
        lambda: _C.configure_team(1, nice=20),
        lambda: _C.configure_team(1, spin_us=-1),
        lambda: _C.use_kernel_set("sse9"),
    ],
)
def test_values_out_of_range_are_refused(call: object) -> None:
    assert callable(call)
    with pytest.raises(ValueError, match="must be"):
        call()


def test_the_stub_names_what_the_extension_has() -> None:
    stub = ast.parse(Path(_C.__file__).with_name("_C.pyi").read_text()).body
    functions = {node.name: node for node in stub if isinstance(node, ast.FunctionDef)}
    classes = {node.name: node for node in stub if isinstance(node, ast.ClassDef)}
    assert {*functions, *classes} == {name for name in vars(_C) if not name.startswith("_")}
    for name, described in classes.items():
        methods = {part.name for part in described.body if isinstance(part, ast.FunctionDef)}
        fields = {
            part.target.id
            for part in described.body
            if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)
        }
        if not issubclass(getattr(_C, name), Exception):
            known = {each for each in vars(getattr(_C, name)) if not each.startswith("_")}
            assert (methods | fields) - {"__init__"} == known, name
    for name, node in functions.items():
        words, compiled = ast.get_docstring(node), getattr(_C, name).__doc__
        assert words is not None
        assert words.split()[0] in compiled, f"{name}: the docstrings differ"
        signature = compiled.splitlines()[0]
        parameters = re.findall(r"(\w+): ", signature.split("(", 1)[1])
        arguments = [*node.args.args, *node.args.kwonlyargs]
        assert [argument.arg for argument in arguments] == parameters, name


@pytest.mark.parametrize("spin_us", [-1, 1_000_001])
def test_a_time_before_yielding_that_is_none_is_refused(spin_us: int) -> None:
    with pytest.raises(ValueError, match=r"`spin_us` must be in \[0, 1000000\]"):
        _C.team_yield_after(spin_us)
