"""A step's copies, graphs and events: what is submitted in which order, and what is refused.

CUDA's calls are those of tests/emulation/host: copies are made at once, a graph is a function.
"""

from __future__ import annotations

import ctypes
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.emulation import bindings, library
from tgi_asgi.runner.cuda_device import Command, Copy


@pytest.fixture(scope="module")
def cuda() -> Any:
    library.require()
    bindings.install()
    from tgi_asgi import _cuda

    if not Path(str(_cuda.__file__)).is_relative_to(library.CACHE):
        pytest.skip("the extension was built: its copies are a GPU's")
    return _cuda


def graph_of(cuda: Any, call: Any) -> Any:
    """Return a graph that makes a call."""
    function = ctypes.CFUNCTYPE(None)(call)
    return cuda.Graph(function, ctypes.cast(function, ctypes.c_void_p).value)


def test_commands_are_submitted_in_their_order(cuda: Any) -> None:
    source, target = torch.arange(6, dtype=torch.uint8), torch.zeros(6, dtype=torch.uint8)
    seen: list[tuple[str, list[int]]] = []

    def note(name: str) -> Any:
        return lambda: seen.append((name, target.tolist()))

    event = cuda.Event()
    event.synchronize()  # which is nowhere yet
    commands: list[Command] = [
        Copy(target, source, 2), note("call"), Copy(target, source, 4), event,
        graph_of(cuda, note("graph")), Copy(target, source, 6), event,
    ]  # fmt: skip
    cuda.submit(commands)
    event.synchronize()
    assert seen == [("call", [0, 1, 0, 0, 0, 0]), ("graph", [0, 1, 2, 3, 0, 0])]
    assert target.tolist() == [0, 1, 2, 3, 4, 5]
    graph_of(cuda, note("alone"))()
    assert seen[-1][0] == "alone"


def test_the_first_bytes_are_copied_whatever_the_shapes(cuda: Any) -> None:
    source, target = torch.arange(20, dtype=torch.int32), torch.full((4, 3), -1, dtype=torch.int32)
    cuda.submit([Copy(target, source.view(torch.uint8), 20)])
    assert target.flatten().tolist()[:6] == [0, 1, 2, 3, 4, -1]
    cuda.submit([Copy(target, source, 0)])
    assert target.flatten().tolist()[:6] == [0, 1, 2, 3, 4, -1]


@pytest.mark.parametrize(
    ("num_bytes", "sizes"), [(9, (16, 8)), (9, (8, 16)), (2**63 - 1, (16, 8)), (-1, (16, 8))]
)
def test_a_copy_stays_within_both_tensors(cuda: Any, num_bytes: int, sizes: tuple[int, int]) -> None:
    source, target = torch.ones(sizes[0], dtype=torch.uint8), torch.zeros(sizes[1], dtype=torch.uint8)
    with pytest.raises(RuntimeError, match=f"^{num_bytes} bytes are copied from {sizes[0]} to {sizes[1]}"):
        cuda.submit([Copy(target, source, 8), Copy(target, source, num_bytes)])
    assert not target.any(), "commands are checked before the first is submitted"


def test_a_copy_is_of_whole_tensors(cuda: Any) -> None:
    whole = torch.zeros(4, 4, dtype=torch.uint8)
    for copy in (Copy(whole[:, :2], whole, 2), Copy(whole, whole.T, 2)):
        with pytest.raises(RuntimeError, match="contiguous"):
            cuda.submit([copy])


@pytest.mark.parametrize("command", [3, (1, 2), (None, None, 1), "copy"])
def test_anything_else_is_no_command(cuda: Any, command: Any) -> None:
    with pytest.raises(TypeError):
        cuda.submit([command])


def test_what_fails_ends_the_submission(cuda: Any) -> None:
    source, target = torch.ones(4, dtype=torch.uint8), torch.zeros(4, dtype=torch.uint8)

    def fail() -> None:
        raise KeyError("a call's own error")

    with pytest.raises(KeyError, match="own error"):
        cuda.submit([Copy(target, source, 1), fail, Copy(target, source, 4)])
    assert target.tolist() == [1, 0, 0, 0]
    with pytest.raises(RuntimeError, match="refused"):
        cuda.submit([cuda.Graph(None, 0), Copy(target, source, 4)])
    assert target.tolist() == [1, 0, 0, 0]


def test_other_threads_run_meanwhile(cuda: Any) -> None:
    """The graph waits for a thread that needs the GIL."""
    begin, done = threading.Event(), threading.Event()

    def answer() -> None:
        begin.wait(60)
        done.set()

    thread = threading.Thread(target=answer)
    thread.start()
    cuda.submit([begin.set, graph_of(cuda, lambda: done.wait(60))])
    thread.join()
    assert done.is_set()


def test_prepared_commands_are_submitted_by_native_calls_as_often_as_wanted(cuda: Any) -> None:
    source, target = torch.arange(4, dtype=torch.uint8), torch.zeros(4, dtype=torch.uint8)
    seen: list[list[int]] = []
    calls = PreparedCalls(
        cuda, [Copy(target, source, 2), graph_of(cuda, lambda: seen.append(target.tolist())), cuda.Event()]
    )
    assert not target.any(), "until they are submitted"
    for _ in range(2):
        source += 1
        assert calls.submit() is None
        assert calls.wait() is None
    assert seen == [[1, 2, 0, 0], [2, 3, 0, 0]]


@pytest.mark.parametrize("is_python", [True, False])
def test_what_fails_in_prepared_commands_is_told_as_text(cuda: Any, is_python: bool) -> None:
    source, target = torch.ones(4, dtype=torch.uint8), torch.zeros(4, dtype=torch.uint8)

    def fail() -> None:
        raise KeyError("a call's own error")

    failing: Any = fail if is_python else cuda.Graph(None, 0)
    calls = PreparedCalls(cuda, [Copy(target, source, 1), failing, Copy(target, source, 4), cuda.Event()])
    for _ in range(2):
        text = calls.submit()
        assert text is not None and (b"a call's own error" if is_python else b"refused") in text
    assert target.tolist() == [1, 0, 0, 0]


def test_prepared_commands_are_checked_and_end_with_an_event(cuda: Any) -> None:
    tensor = torch.zeros(4, dtype=torch.uint8)
    for commands in ([], [Copy(tensor, tensor, 1)], [cuda.Event(), Copy(tensor, tensor, 1)]):
        with pytest.raises(TypeError, match="an event"):
            cuda.Prepared(commands)
    with pytest.raises(RuntimeError, match="are copied from 4"):
        cuda.Prepared([Copy(tensor, tensor, 5), cuda.Event()])


class PreparedCalls:
    """The native calls of prepared commands; each returns the text of its failure."""

    def __init__(self, cuda: Any, commands: list[Any]) -> None:
        self._prepared = cuda.Prepared(commands)
        self._self, *self._calls = (ctypes.c_size_t * 3).from_address(self._prepared.address)

    def submit(self) -> bytes | None:
        return self._call(0)

    def wait(self) -> bytes | None:
        return self._call(1)

    def _call(self, index: int) -> bytes | None:
        call = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(self._calls[index])
        text = call(self._self)
        return None if text is None else ctypes.string_at(text)
