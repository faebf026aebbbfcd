"""The list of launches that C++ runs: order, arguments, conditions, views, errors, threads."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench import gpu_model, gpu_timing
from bench.gpu_model import StepKind
from tests.cuda.emulated_device import Graph
from tests.emulation import bindings, library
from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.layer_spec import LayerSpec, RopeSpec
from tgi_asgi.ops.cuda_list import Condition, Input, LaunchList, Rows, Size


@pytest.fixture(scope="module", autouse=True)
def emulation() -> None:
    library.require()
    bindings.install()


def finished(*launches: tuple[Any, ...], when: Condition | None = None) -> LaunchList:
    """Return a finished list with the sizes `tokens` and `decodes` and the tensors `ids` and `positions`."""
    made = LaunchList((Size.TOKENS, Size.DECODES), (Input.IDS, Input.POSITIONS))
    for launch in launches:
        made.add(*launch, when=when)
    made.finish()
    return made


class Calls(TorchDispatchMode):
    """Records the operators that are called, and counts them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))

    @property
    def num_views(self) -> int:
        return sum(name in ("aten::narrow", "aten::slice.Tensor") for name in self.names)


def test_launches_run_in_order_with_what_the_step_brings() -> None:
    x, out = torch.arange(12.0).view(4, 3), torch.full((4, 3), -1.0)
    ones = torch.ones(3)
    launches = finished(
        ("aten::copy_", Rows(out, Size.TOKENS), Rows(x, Size.TOKENS)),
        ("aten::mul_.Scalar", Rows(out, Size.TOKENS), Size.TOKENS),
        ("aten::add_.Tensor", Rows(out, None, first=Size.DECODES), ones, 10),
        ("aten::add_.Tensor", Input.IDS, Rows(Input.POSITIONS, Size.DECODES)),
    )
    ids, positions = torch.zeros(1), torch.tensor([5.0, 7.0])
    launches.run((2, 1), (ids, positions))
    assert out.tolist() == [[0, 2, 4], [16, 18, 20], [9, 9, 9], [9, 9, 9]]
    assert ids.tolist() == [5]


@pytest.mark.parametrize(("decodes", "runs"), [(0, False), (1, True), (3, True), (4, False)])
def test_a_launch_runs_while_its_size_is_in_bounds(decodes: int, runs: bool) -> None:
    x = torch.zeros(2)
    launches = finished(("aten::add_.Scalar", x, 1), when=Condition(Size.DECODES, 1, 3))
    launches.run((0, decodes), (x, x))
    assert x.tolist() == [float(runs)] * 2
    assert launches.count((0, decodes)) == runs


def test_a_view_is_made_once_a_run_and_only_if_somebody_takes_it() -> None:
    x = torch.zeros(4, 6)
    heads = [x.view(4, 2, 3) for _ in range(3)]  # three tensors, one memory
    of_tokens = [("aten::mul_.Scalar", Rows(of, Size.TOKENS), 2) for of in (x, x, *heads)]
    launches = finished(*of_tokens, when=Condition(Size.TOKENS, 1))
    for tokens, views in ((3, 2), (0, 0)):
        with Calls() as calls:
            launches.run((tokens, 0), (x, x))
        assert calls.num_views == views
        assert len(calls.names) == views + launches.count((tokens, 0))


@pytest.mark.parametrize("num_layers", [1, 5])
def test_a_mixed_step_makes_as_many_views_whatever_the_model_s_depth(
    num_layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_timing, "DEVICE", torch.device("cpu"))
    config = ModelConfig(
        architecture="LlamaForCausalLM", vocab_size=300, hidden_size=128, intermediate_size=128, num_heads=2,
        num_kv_heads=1, head_dim=64, context_length=64, norm_eps=1e-5,
        layers=(LayerSpec(RopeSpec(64, 1e4), None, 0.125),) * num_layers,
    )  # fmt: skip
    step = gpu_model.make_step(StepKind(3, 48, prompt=48), config)
    with Calls() as calls:
        step.call()
    count = Counter(calls.names)
    assert calls.num_views <= 20
    assert len(calls.names) - calls.num_views <= step.num_calls + 1, "and the logits that the test takes"
    assert count["tgi_cuda::attention_decode"] == count["tgi_cuda::attention_prefill"] == num_layers
    assert count["tgi_cuda::norm"] == 2 * num_layers + 1
    assert count["tgi_cuda::linear"] == 1, "the head's, of four rows; all else is of 51 tokens"


@pytest.mark.parametrize(
    ("rows", "sizes"),
    [
        (Rows(torch.zeros(4, 2), Size.TOKENS), (5, 0)),
        (Rows(torch.zeros(4, 2), None, first=Size.DECODES), (0, 5)),
        (Rows(torch.zeros(4, 2), Size.TOKENS, first=Size.DECODES), (2, 3)),
        (Rows(Input.IDS, Size.TOKENS), (3, 0)),
    ],
)
def test_rows_past_a_buffer_are_refused(rows: Rows, sizes: tuple[int, int]) -> None:
    launches = finished(("aten::zero_", rows))
    given = (torch.zeros(2), torch.zeros(2))
    with pytest.raises(IndexError, match=r"rows \d to \d .*are wanted of a tensor that has \d"):
        launches.run(sizes, given)
    with pytest.raises(ValueError, match="`decodes` must not be negative"):
        launches.run((0, -1), given)
    with pytest.raises(ValueError, match="a run has 2 sizes and 2 tensors, not 2 and 1"):
        launches.run((0, 0), given[:1])


@pytest.mark.parametrize(
    ("launch", "error", "message"),
    [
        (("aten::nothing", 1), ValueError, "there is no operator aten::nothing"),
        (("tgi_cuda::embed", 1), TypeError, "tgi_cuda::embed: `ids` must be Tensor"),
        (("aten::zero_",), TypeError, "aten::zero_: `self` must be Tensor"),
        (("aten::zero_", torch.zeros(1), 2), TypeError, "takes 1 arguments, not 2"),
        (("aten::mul_.Scalar", torch.zeros(1), Input.IDS), TypeError, "`other` must be"),
        (("aten::mul_.Tensor", Size.TOKENS, torch.zeros(1)), TypeError, "`self` must be Tensor"),
        (("aten::zero_", Rows(torch.zeros(()), Size.TOKENS)), ValueError, "without dimensions"),
    ],
)
def test_what_an_operator_does_not_take_is_refused_at_once(
    launch: tuple[Any, ...], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        finished(launch)


class Refusal(Exception):
    """An exception that no library knows."""


def test_what_an_operator_raises_is_raised() -> None:
    def refuse(x: Tensor) -> None:
        raise Refusal("not today")

    x = torch.zeros(2, 3)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        finished(("aten::mm.out", x, x, x)).run((0, 0), (x, x))
    with pytest.raises(IndexError, match="out of range"):
        finished(("aten::select.int", x, 5, 0)).run((0, 0), (x, x))
    definitions = torch.library.Library("tgi_refusing", "DEF")
    definitions.define("refuse(Tensor x) -> ()")
    definitions.impl("refuse", refuse, "CPU")
    with pytest.raises(Refusal, match="not today"):
        finished(("tgi_refusing::refuse", x)).run((0, 0), (x, x))
    finished(("aten::zero_", x)).run((0, 0), (x, x))


def test_a_function_of_python_takes_its_place_among_operators() -> None:
    seen: list[Any] = []

    def note(*given: Any) -> None:
        seen.append(given)
        given[0].add_(1)
        if len(seen) > 1:
            raise Refusal("twice")

    x = torch.zeros(4)
    launches = finished(
        ("aten::add_.Scalar", x, 1), (note, Rows(x, Size.TOKENS), Size.DECODES, None, "text", Input.IDS),
        ("aten::mul_.Scalar", x, 3),
    )  # fmt: skip
    ids = torch.ones(1)
    launches.run((2, 7), (ids, ids))
    assert x.tolist() == [6, 6, 3, 3]
    ((part, number, *rest, given),) = seen
    assert (part.shape, number, rest) == ((2,), 7, [None, "text"]) and given is ids
    with pytest.raises(Refusal, match="twice"):
        launches.run((2, 7), (ids, ids))
    assert x.tolist() == [8, 8, 4, 4], "what is behind it did not run"


def test_no_launch_is_added_to_a_list_that_has_run() -> None:
    launches = finished()
    launches.run((0, 0), (torch.zeros(1), torch.zeros(1)))
    assert launches._program is not None
    with pytest.raises(ValueError, match="has run"):
        launches._program.add("aten::zero_", [torch.zeros(1)], None, 0, 0)


def test_a_buffer_that_is_set_to_other_memory_is_found_there() -> None:
    pool, bigger = torch.zeros(1, 2), torch.zeros(3, 2)
    launches = finished(("aten::add_.Scalar", pool, 1))
    launches.run((0, 0), (pool, pool))
    pool.set_(bigger.untyped_storage(), 0, bigger.shape, bigger.stride())
    launches.run((0, 0), (pool, pool))
    assert bigger.tolist() == [[1, 1]] * 3


def test_a_graph_holds_every_launch() -> None:
    x = torch.zeros(4)
    launches = finished(("aten::add_.Tensor", Rows(x, Size.TOKENS), Input.IDS))
    step = torch.ones(1)
    with Graph() as graph:
        launches.run((2, 0), (step, step))
    step.fill_(10)
    graph.replay()
    assert x.tolist() == [11, 11, 0, 0]


def in_thread(call: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=call)
    thread.start()
    return thread


def test_other_threads_run_python_meanwhile() -> None:
    x, out = torch.ones(700, 700), torch.empty(700, 700)
    launches = finished(*[("aten::mm.out", x, x, out)] * 40)
    has_begun, turns = threading.Event(), 0

    def run() -> None:
        torch.set_num_threads(1)
        has_begun.set()
        launches.run((0, 0), (x, x))

    thread = in_thread(run)
    has_begun.wait()
    while thread.is_alive():
        turns += 1
    assert turns > 1000, "with the GIL held there are a handful, before and behind"


def test_runs_of_several_threads_do_not_meet() -> None:
    launches = finished(*[("aten::add_.Scalar", Rows(Input.IDS, Size.TOKENS), 1)] * 200)
    given: list[Tensor] = [torch.zeros(8) for _ in range(4)]

    def run(rows: int) -> None:
        for _ in range(10):
            launches.run((rows, 0), (given[rows], given[rows]))

    for thread in [in_thread(lambda rows=rows: run(rows)) for rows in range(4)]:  # type: ignore[misc]
        thread.join()
    assert [tensor.tolist() for tensor in given] == [[2000.0] * n + [0.0] * (8 - n) for n in range(4)]


def test_only_a_kernel_that_follows_one_of_ours_may_begin_before_it_has_ended() -> None:
    """cuBLAS's kernels allow that at once, and blocks that wait would take the place of theirs."""
    x, normed, product = torch.ones(2, 8), torch.ones(2, 8), torch.ones(2, 8)
    weight, norm = torch.ones(8, 8), ("tgi_cuda::norm", x, torch.ones(8), None, 1e-5, None, normed)
    launches = finished(
        norm, norm, ("aten::mm.out", normed, weight, product), norm, (lambda: None,), norm, norm
    )
    seen: list[str] = []
    with bindings.observed(seen.append):
        launches.run((2, 0), (torch.zeros(2), torch.zeros(2)))
    late, early = ["follow_library", "norm"], ["norm"]
    assert seen == [*late, *early, *late, *late, *early]
