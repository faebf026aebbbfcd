"""The stages of bench/gpu.py on emulated kernels, with a clock that the test controls."""

from __future__ import annotations

import contextlib
import gc
import math
import os
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import transformers
from torch import Tensor

from bench import (
    gpu,
    gpu_experts,
    gpu_kernels,
    gpu_model,
    gpu_operators,
    gpu_runs,
    gpu_served,
    gpu_stages,
    gpu_tests,
    gpu_timing,
)
from bench.gpu_model import StepKind
from bench.gpu_timing import Timing
from tests.cuda import cases
from tests.cuda.emulated_device import EmulatedDevice
from tests.cuda.scripted_gpu import Clock
from tests.emulation import bindings, library
from tests.reference.compare import assert_close
from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.layer_spec import LayerSpec, RopeSpec
from tgi_asgi.ops.cuda_kv import CudaKvLayer

pytestmark = pytest.mark.thorough


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    clock.put_in(monkeypatch)
    return clock


def test_long_calls_are_timed_one_by_one_and_short_ones_inside_a_graph_of_twenty(clock: Clock) -> None:
    """A launch takes 0.5 us here, as does an event."""
    made: list[int] = []

    def on(data: int, us: float) -> Callable[[], None]:
        def call() -> None:
            made.append(data)
            clock.advance(us)

        return call

    long = gpu_timing.time_calls([on(0, 60.0), on(1, 60.0)])
    assert (long.us, long.in_graph, clock.captures) == (60.5, False, 0)
    assert made[:5] == [0, 1, 0, 1, 0], "inputs are taken in turn"
    assert len(made) == 2 + 21


def test_what_cannot_be_captured_is_timed_alone(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(call: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(gpu_timing, "capture", refuse)
    assert gpu_timing.time_calls([lambda: clock.advance(3.0)]) == Timing(3.5, 0.0)


def test_a_short_call_in_a_graph_has_no_share_of_launches(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def capture(call: Callable[[], object]) -> Callable[[], object]:
        calls.clear()
        call()
        return lambda: clock.advance(20 * 2.0 + 0.5)

    monkeypatch.setattr(gpu_timing, "capture", capture)

    def first() -> None:
        calls.append(1)
        clock.advance(9.0)

    found = gpu_timing.time_calls([first, lambda: clock.advance(9.0)])
    assert found.in_graph and found.us == pytest.approx(2.05)
    assert len(calls) == 10, "twenty calls, of two in turn"


def test_peers_find_nothing_in_the_cache_either(emulation: None, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda q, k, v, **options: seen.append(k.data_ptr()),
    )
    monkeypatch.setattr(torch, "mm", lambda a, b, out: seen.append(b.data_ptr()))
    monkeypatch.setattr(gpu_timing, "L2_BYTES", 3 << 20)
    make_small(monkeypatch)
    rotated = 0
    for make in gpu_operators.makers():
        _, _, num_bytes, _, calls, peers = make()
        for name, peer in peers.items():
            seen.clear()
            for _ in range(3):
                if name.startswith(("SDPA", "torch.mm")):
                    peer()
            rotated += len(seen) == len(set(seen)) == 3
        is_counted_in_flops = make.func.__name__ in ("_prefill", "_prefill_gathered", "_experts")
        assert is_counted_in_flops or len(calls) == gpu_timing.copies_past_l2(num_bytes)
    assert rotated == 2 + 2 + 2 + len(gpu_model.CODES) + 1, (
        "of two attentions by two ways each, of all products"
    )


SMALL: dict[str, Any] = {
    "HIDDEN": 64, "HEADS": 4, "KV_HEADS": 2, "HEAD_DIM": 64, "INTERMEDIATE": 64, "VOCAB": 300,
    "DECODES": ((3, 48, "bf16"), (2, 48, "fp8")), "PREFILLS": (32,), "CHUNK": (16, 32),
    "ROWS": (5,), "SAMPLES": (2,),
    "PRODUCTS": (3,), "QUANT_PRODUCTS": (3,), "FLOAT8_PRODUCTS": (3,), "LORAS": (3,),
}  # fmt: skip
SMALL_EXPERTS: dict[str, Any] = {"HIDDEN": 64, "INNER": 64, "EXPERTS": 6, "TOP_K": 2, "TOKENS": (1, 65)}


def make_small(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, sizes in ((gpu_operators, SMALL), (gpu_experts, SMALL_EXPERTS)):
        for name, value in sizes.items():
            monkeypatch.setattr(module, name, value)


def test_a_random_checkpoint_is_served_over_sockets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "vocab_size": 2048}
    gpu_served.write_checkpoint(
        tmp_path,
        gpu_served.SMOLLM2
        | shape
        | {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512},
    )
    monkeypatch.setattr(gpu_served, "PROMPT_TOKENS", 20)
    monkeypatch.setattr(gpu_served, "OUTPUT_TOKENS", 5)
    rows = gpu_served.serve(tmp_path, ((4, 6), (1, 2)))
    assert [(row["clients"], row["requests"], row["failed"]) for row in rows] == [(4, 6, 0), (1, 2, 0)]
    assert {row["output_tokens"] for row in rows} == {5}
    assert rows[0]["prompt_tokens"] == 20, "a word is a token"
    shown = "".join(gpu.table(gpu.empty_result() | {"runs": [{"what": "served"} | rows[0]]}, "served"))
    assert f" {rows[0]['tokens_per_s']:.4g} " in shown


TINY = ModelConfig(
    architecture="LlamaForCausalLM", vocab_size=300, hidden_size=128, intermediate_size=128,
    num_heads=4, num_kv_heads=2, head_dim=64, context_length=512, norm_eps=1e-5,
    layers=(LayerSpec(RopeSpec(64, 1e4), None, 0.125),) * 2,
)  # fmt: skip


@pytest.fixture
def emulation(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Emulated kernels, with few repetitions."""
    library.require()
    bindings.install()
    monkeypatch.setattr(gpu_timing, "_RUNS", 3)
    monkeypatch.setattr(gpu_timing, "CALLS_A_GRAPH", 2)


async def test_the_engine_s_loop_is_timed(emulation: None, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"CONTEXT": 48, "STEPS": 3, "BATCHES": (2, 1), "PROMPTS": (48,), "CHUNK": 16}
    for name, value in small.items():
        monkeypatch.setattr(gpu_runs, name, value)
    runner = gpu_runs.make_runner(TINY, EmulatedDevice(), 2, "q8_0", "fp8")
    rows: list[dict[str, Any]] = []

    def unobserved(call: Callable[[], object]) -> None:
        call()

    try:
        await gpu_runs.drive(runner, 300, lambda key, row: rows.append(row), unobserved, gpu_model.TOP_P)
    finally:
        runner.close()
    assert [(row["what"], row.get("batch")) for row in rows] == [
        ("ttft", None), ("decode", 2), ("decode", 1), ("mixed", 1),
    ]  # fmt: skip
    assert all(row["us"] > 0 for row in rows)
    assert all(row["launch_us"] > 0 for row in rows[1:])
    assert rows[-1]["prompt"] == 16


def test_no_model_outlives_its_kind_of_step(emulation: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them together would not fit a GPU; a recorded step refers to itself."""
    caches: list[weakref.ref[Tensor]] = []
    time_step = gpu_runs.time_step

    def make_layer(cache: Tensor) -> object:
        caches.append(weakref.ref(cache))
        return CudaKvLayer(cache)

    def timed(kind: StepKind, limits: dict[str, float], report: gpu_kernels.Report) -> None:
        assert not [cache for cache in caches if cache() is not None]
        time_step(kind, limits, report, TINY)

    monkeypatch.setattr(gpu_model, "CudaKvLayer", make_layer)
    monkeypatch.setattr(gpu_runs, "time_step", timed)
    monkeypatch.setattr(gpu_runs, "measure_ceilings", lambda: {"read": 1e12, "bf16": 1e15})
    monkeypatch.setattr(gpu_runs, "KINDS", (StepKind(2, 48), StepKind(1, 48), StepKind(1, 32)))
    gc.disable()  # it may, but need not run by itself
    try:
        gpu_runs.step(lambda key, row: None)
    finally:
        gc.enable()
    assert len(caches) == 3 * TINY.num_layers


def test_transformers_is_timed_with_a_static_cache(emulation: None, monkeypatch: pytest.MonkeyPatch) -> None:
    config = transformers.LlamaConfig(
        vocab_size=300, hidden_size=64, num_hidden_layers=1, intermediate_size=64, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    monkeypatch.setattr(gpu_runs, "CONTEXT", 8)
    monkeypatch.setattr(gpu_runs, "time_calls", lambda calls, may_capture: (calls[0](), Timing(5.0, 0.1))[1])
    monkeypatch.setattr(torch, "compile", lambda model, mode: model)
    rows: list[dict[str, object]] = []
    gpu_runs.time_transformers(config, lambda key, row: rows.append(row), (2,))
    assert [(row["compiled"], row["tokens_per_s"]) for row in rows] == [(False, 400000), (True, 400000)]


@pytest.mark.parametrize("name", [*(stage.name for stage in gpu.STAGES), "small_cases"])
def test_every_stage_but_the_first_begins_with_the_operators(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    began: list[str] = []

    def stage(report: object) -> None:
        began.append(name)

    stage.__name__ = name
    for module in (gpu_kernels, gpu_runs, gpu_served, gpu_tests):
        monkeypatch.setattr(module, "STAGES", (stage,))
    monkeypatch.setattr(gpu_kernels, "small_cases", stage)
    monkeypatch.setattr(gpu_stages, "signal", Mock())  # the test's process keeps its own handlers
    monkeypatch.setitem(sys.modules, "tgi_asgi._cuda", None)  # as before it is built
    if name == "build":
        gpu_stages.main(name, str(tmp_path / "report"))
        assert began == [name]
    else:
        with pytest.raises(ModuleNotFoundError, match="_cuda"):
            gpu_stages.main(name, str(tmp_path / "report"))
        assert began == []


@pytest.mark.parametrize(
    ("status", "says", "found"),
    [
        (0, "========= ERROR SUMMARY: 0 errors", "clean"),
        (9, "=========     at norm+0x10\n=========     at norm+0x20\n========= ERROR SUMMARY: 2 errors", 2),
        (
            9,
            "========= Error: Race reported between Write access at norm+0x10\n=========     and Read access",
            1,
        ),
        (9, "========= Error: in words of a later version", 1),
        (1, "ERROR_PROFILER_NOT_PERMITTED", "refused"),
        (1, "AssertionError: relative error 2.0\n========= ERROR SUMMARY: 0 errors", None),
    ],
)
def test_a_sanitizer_is_clean_only_if_every_case_passed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, says: str, found: int | str | None
) -> None:
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(
        f"#!/bin/sh\nprintf '%s\\n' \"$*\" >{tmp_path}/args\ncat {tmp_path}/says\nexit {status}\n"
    )
    tool.chmod(0o755)
    (tmp_path / "says").write_text(says)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    rows: list[dict[str, Any]] = []
    with (
        contextlib.nullcontext()
        if found is not None
        else pytest.raises(RuntimeError, match="relative error 2")
    ):
        gpu_kernels.racecheck(lambda name, row: rows.append(row))
    assert [row["racecheck"] for row in rows] == ([found] if found is not None else [])
    # The command is a stage of its own, and thus begins with the operators.
    assert (tmp_path / "args").read_text().rstrip().endswith("-m bench.gpu_stages small_cases /dev/null")


def test_the_sanitizers_cases_are_the_small_ones(emulation: None, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[object] = []
    monkeypatch.setattr(cases, "small", lambda: iter([("norm", torch.float32, done.append)]))
    gpu_kernels.small_cases(lambda name, row: None)
    assert len(done) == 1


def test_checks_say_how_near_each_operator_came_to_its_limit(
    emulation: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cases, "large", lambda: iter(()))
    rows: list[dict[str, Any]] = []
    skipped: list[dict[str, Any]] = []
    gpu_kernels.checks(lambda name, row: (rows if name == "checks" else skipped).append(row))
    why = f"GPUs that can be seen: {torch.cuda.device_count()}"
    assert skipped == [{"what": "two shards", "needed": False, "why": why}]
    assert len({(row["op"], row["dtype"]) for row in rows}) == len(rows)
    assert {row["op"] for row in rows} == {operator for operator, _, _ in cases.small()}
    assert sum(row["cases"] for row in rows) == len(list(cases.small()))
    for row in rows:
        assert row["ok"] and row["why"] is None
        assert 0 <= row["worst_rel"] <= row["tol"]
        assert (row["tol"] == 0) == (
            row["op"] in ("begin_step", "embed", "dequantise", "attention_gather", "draft_slots")
        )
        assert row["worst_rel"] > 0 or row["tol"] == 0, "a rounded result never equals float64"


def test_a_check_that_fails_shows_by_how_much(emulation: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(values: Tensor) -> Callable[[object], None]:
        return lambda device: assert_close(values, torch.ones(4, dtype=torch.float64), length=1)

    bad, lost = torch.tensor([1.0, 1, 1, 1.5]), torch.full((4,), math.nan)
    made = [("good", torch.ones(4)), ("bad", torch.ones(4)), ("bad", bad), ("lost", lost)]
    monkeypatch.setattr(cases, "small", lambda: [(name, torch.float32, check(x)) for name, x in made])
    monkeypatch.setattr(cases, "large", lambda: iter(()))
    rows: dict[str, Any] = {}
    with pytest.raises(AssertionError, match="2 cases failed"):
        gpu_kernels.checks(lambda name, row: rows.update({row.get("op", name): row}))
    tol = float(f"{2 * torch.finfo(torch.float32).eps:.3g}")
    assert rows["good"]["ok"] and rows["good"]["worst_rel"] == 0
    assert (rows["bad"]["cases"], rows["bad"]["ok"], rows["bad"]["tol"]) == (2, False, tol)
    assert rows["bad"]["worst_rel"] == pytest.approx(0.25, rel=0.01)
    assert rows["bad"]["why"].startswith("relative error")
    assert rows["lost"]["worst_rel"] is None and not rows["lost"]["ok"]


def test_what_is_timed_runs_on_the_emulated_kernels(
    emulation: None, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One operation cannot be measured: it is reported, and the others are measured."""
    make_small(monkeypatch)
    monkeypatch.setattr(gpu_kernels, "measure_ceilings", lambda: {"read": 1e12, "copy": 1e12, "bf16": 1e12})
    monkeypatch.setattr(gpu_kernels, "compare", lambda us, peers: {"peers": sorted(peers)})
    monkeypatch.setattr(gpu_operators, "_gate", _broken)
    monkeypatch.setattr(torch, "compile", lambda function: function)
    rows: list[dict[str, Any]] = []
    with pytest.raises(AssertionError, match="1 could not be measured"):
        gpu_kernels.operators(lambda name, row: rows.append(row))
    assert [row["op"] for row in rows] == [
        *["attention_decode"] * 2, *["attention_prefill"] * 4, "norm", "_broken", "rope_kv_write", "sample",
        *["linear"] * 2, *["quant_linear"] * len(gpu_model.CODES), "float8_product",
        *["lora"] * 2,
        *["experts"] * (2 + 2 * len(gpu_experts.CODED)), "route",
    ]  # fmt: skip
    assert rows[7]["why"] == "out of memory"
    measured = [row for row in rows if "why" not in row]
    assert all(row["us"] > 0 and row["of_floor"] > 0 and row["bytes"] > 0 for row in measured)


def _broken(rows: int) -> None:
    raise torch.OutOfMemoryError("out of memory")


@pytest.mark.parametrize(
    ("kind", "bits", "of_layer"),
    [
        (StepKind(3, 48), 16, 9),
        (StepKind(3, 48, "int4"), 4.5, 9),
        (StepKind(3, 48, prompt=32), 16, 12),  # and attention of prompts
        (StepKind(3, 48, sampling="top-p"), 16, 9),
        (StepKind(2, 16, "q8_0", "fp8", 64, "greedy"), 8.5, 16),  # and four matrices decoded
        (StepKind(2, 16, "w8a8", prompt=64), 8.25, 16),  # or four activations rounded
    ],
    ids=str,
)
def test_a_step_of_random_weights_is_timed_as_a_graph_and_without(
    emulation: None, clock: Clock, monkeypatch: pytest.MonkeyPatch, kind: StepKind, bits: float, of_layer: int
) -> None:
    made = gpu_model.make_step(kind, TINY)
    matrices = 2 * (512 * 128 + 128 * 256 + 256 * 128 + 128 * 128)
    of_token = 2 * 2 * 2 * 64 * (1 if kind.kv == "fp8" else 2)
    tokens = kind.batch * kind.context + kind.prompt
    assert made.num_bytes == 300 * 128 * 2 + matrices * bits / 8 + of_token * tokens
    assert made.num_calls == 1 + 1 + 2 * of_layer + 2 + bool(kind.sampling)
    out = made.call()
    rows_of_logits = kind.batch + bool(kind.prompt)
    assert out.shape == ((rows_of_logits,) if kind.sampling else (rows_of_logits, 300))
    assert bool((out >= 0).all() and (out < 300).all()) if kind.sampling else bool(out.isfinite().all())

    monkeypatch.setattr(gpu_runs, "DEPENDENT", (kind,))
    rows: list[dict[str, Any]] = []
    gpu_runs.time_step(kind, {"read": 1e12, "bf16": 1e12}, lambda name, row: rows.append(row), TINY)
    assert [(row["graph"], row["dependent"]) for row in rows] == [
        (True, False), (False, False), (True, True), (False, True),
    ]  # fmt: skip
    assert all(row["us"] > 0 and row["floor_us"] > 0 and row["prompt"] == kind.prompt for row in rows)
    assert kind.sampling == "top-p" or all(row["same_bits"] for row in rows if row["dependent"])


def test_one_kind_of_step_that_fails_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def timed(kind: StepKind, limits: object, report: Callable[[str, Any], None]) -> None:
        if kind.kv == "fp8":
            raise torch.OutOfMemoryError("out of memory")
        report("step", {"batch": kind.batch})

    monkeypatch.setattr(gpu_runs, "measure_ceilings", dict)
    monkeypatch.setattr(gpu_runs, "time_step", timed)
    monkeypatch.setattr(gpu_timing, "free_memory", lambda: None)  # collects all tests' objects: a second each
    rows: list[dict[str, Any]] = []
    with pytest.raises(AssertionError, match="2 could not be measured"):
        gpu_runs.step(lambda name, row: rows.append(row))
    assert len(rows) == len(gpu_runs.KINDS)
    assert [row["kv"] for row in rows if "why" in row] == ["fp8", "fp8"]


def test_a_profile_is_of_the_kernels_that_take_most(emulation: None, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = [(f"kernel {index}", 2, float(index)) for index in range(40)]
    monkeypatch.setattr(gpu_runs, "_kernels_of", lambda call: kernels)
    monkeypatch.setattr(gpu_runs, "PROFILED", (StepKind(1, 16),))
    monkeypatch.setattr(gpu_model, "SHAPE", TINY)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    made = gpu_model.make_step(StepKind(1, 16), TINY)
    monkeypatch.setattr(gpu_model, "make_step", lambda kind: made)
    rows: list[dict[str, Any]] = []
    gpu_runs.profiler(lambda name, row: rows.append(row))
    assert [row["kernel"] for row in rows] == [f"kernel {39 - place}" for place in range(15)]


def test_the_fastest_peer_that_runs_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> None:
        raise ImportError("no module named flashinfer")

    monkeypatch.setattr(gpu_kernels, "time_calls", lambda calls: Timing(calls[0](), 0.0))
    row = gpu_kernels.compare(10.0, {"slow": lambda: 20.0, "fast": lambda: 5.0, "FlashInfer": absent})
    assert (row["peer"], row["peer_us"], row["vs_peer"]) == ("fast", 5.0, 0.5)
    assert row["peers_failed"] == {"FlashInfer": "no module named flashinfer"}
    assert gpu_kernels.compare(10.0, {}) == {}
