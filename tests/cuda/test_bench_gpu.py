"""bench/gpu.py without a GPU: its result's shape, and that no stage's end is the run's."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from bench import gpu, gpu_model, gpu_operators, gpu_runs, gpu_stages
from tests.cuda import cases, emulated_ops
from tests.cuda.emulated_device import EmulatedDevice
from tests.emulation import library
from tests.reference.compare import assert_close
from tgi_asgi.models.config import LayerSpec, ModelConfig, RopeSpec


def test_a_dry_run_names_every_stage_and_writes_the_schema(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu.main(["--dry-run", "--out", str(tmp_path)]) == 0
    [path] = tmp_path.glob("gpu-*.json")
    result = json.loads(path.read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    assert [skipped["what"] for skipped in result["skipped"]] == [stage.name for stage in gpu.STAGES]
    assert set(result) == {
        "schema", "commit", "utc", "device", "ceilings", "build", "checks", "sanitizer", "ops", "step",
        "runs", "skipped", "wall_s", "ok",
    }  # fmt: skip


def test_stages_fit_into_the_time_and_each_has_its_function() -> None:
    assert sum(stage.deadline_s for stage in gpu.STAGES) <= gpu.TOTAL_S - gpu.INSTALL_S
    functions = [*gpu_stages.STAGES, *gpu_runs.STAGES]
    assert sorted(stage.__name__ for stage in functions) == sorted(stage.name for stage in gpu.STAGES)
    assert gpu.STAGES[-1].name == "served"


def test_a_run_goes_on_whatever_happens_to_its_stages(tmp_path: Path) -> None:
    """Stages of fake_gpu_stages.py; the one that hangs has a child that would write a file after a while."""
    late = Path("/tmp/tgi-fake-stage") / str(os.getpid())
    late.parent.mkdir(exist_ok=True)
    late.unlink(missing_ok=True)
    stages = [
        gpu.Stage("good", 20), gpu.Stage("broken", 20), gpu.Stage("hanging", 2),
        gpu.Stage("crashing", 20, is_needed=False), gpu.Stage("last", 20),
    ]  # fmt: skip
    out = tmp_path / "result.json"
    result = gpu.run(stages, out, 60, "tests.cuda.fake_gpu_stages")
    assert json.loads(out.read_text()) == result
    assert [(s["what"], s["why"].split(":")[0], s["needed"]) for s in result["skipped"]] == [
        ("broken", "exit status 1", True),
        ("hanging", "not done after 2 s", True),
        ("crashing", "exit status -11", False),
    ]
    assert result["checks"] == [{"ok": True, "op": "good"}, {"ok": True, "op": "before the hang"}]
    assert result["runs"] == [{"what": "last"}]
    assert result["ceilings"] == {"read": 1}
    assert not result["ok"]
    assert not late.exists(), "what a stage had started was left alive"
    good = gpu.run([gpu.Stage("good", 20), gpu.Stage("crashing", 20, is_needed=False)], out, 60,
                   "tests.cuda.fake_gpu_stages")  # fmt: skip
    assert good["ok"]


def test_a_run_without_time_left_says_so(tmp_path: Path) -> None:
    result = gpu.run([gpu.Stage("good", 20)], tmp_path / "out", 0.0, "tests.cuda.fake_gpu_stages")
    assert [skipped["why"] for skipped in result["skipped"]] == ["no time was left"]


def test_wheels_that_are_not_there_are_named_and_the_stages_run_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "STAGES", ())
    monkeypatch.setattr(gpu, "_PACKAGES", tmp_path / "packages")
    assert gpu.main(["--wheels", str(tmp_path), "--out", str(tmp_path)]) == 1
    [path] = tmp_path.glob("gpu-*.json")
    [found] = json.loads(path.read_text())["skipped"]
    assert found["what"] == "wheels"
    assert found["why"].startswith("exit status 1") and "No matching distribution" in found["why"]


def test_what_the_machine_needs_is_named_without_torch() -> None:
    found = gpu.requirements()
    assert any(need.startswith("tokenizers") for need in found)
    assert any(need.startswith("pytest>") for need in found)
    assert not any(need.startswith(("torch", "openai")) for need in found)


def test_a_random_checkpoint_is_served_over_sockets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "vocab_size": 2048}
    gpu_runs.write_checkpoint(
        tmp_path,
        gpu_runs.SMOLLM2
        | shape
        | {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512},
    )
    monkeypatch.setattr(gpu_runs, "PROMPT_TOKENS", 20)
    monkeypatch.setattr(gpu_runs, "OUTPUT_TOKENS", 5)
    row = gpu_runs.serve(tmp_path, 4, 6)
    assert (row["requests"], row["failed"], row["output_tokens"]) == (6, 0, 5)
    assert row["prompt_tokens"] == 20, "a word is a token"


TINY = ModelConfig(
    architecture="LlamaForCausalLM", vocab_size=300, hidden_size=128, intermediate_size=128,
    num_heads=4, num_kv_heads=2, head_dim=64, context_length=512, norm_eps=1e-5,
    layers=(LayerSpec(RopeSpec(64, 1e4), None, 0.125),) * 2,
)  # fmt: skip


@pytest.fixture
def emulation(monkeypatch: pytest.MonkeyPatch) -> None:
    library.require()
    emulated_ops.register()
    monkeypatch.setattr(gpu_stages, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(gpu_stages, "_L2_BYTES", 1)


async def test_the_engine_s_loop_is_timed(emulation: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"CONTEXT": 40, "STEPS": 3, "BATCHES": (2, 1)}.items():
        monkeypatch.setattr(gpu_runs, name, value)
    runner = gpu_runs.make_runner(TINY, EmulatedDevice(), 2)
    rows: list[dict[str, Any]] = []

    def unobserved(call: Callable[[], object]) -> None:
        call()

    try:
        await gpu_runs.drive(runner, 300, lambda key, row: rows.append(row), unobserved)
    finally:
        runner.close()
    assert [row["batch"] for row in rows] == [2, 1]
    assert all(row["us"] > 0 and row["launch_us"] > 0 for row in rows)


def test_transformers_is_timed_with_a_static_cache(emulation: None, monkeypatch: pytest.MonkeyPatch) -> None:
    config = transformers.LlamaConfig(
        vocab_size=300, hidden_size=64, num_hidden_layers=1, intermediate_size=64, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    monkeypatch.setattr(gpu_runs, "CONTEXT", 8)
    monkeypatch.setattr(gpu_runs, "time_us", lambda calls: (calls[0](), (5.0, 0.1))[1])
    monkeypatch.setattr(torch, "compile", lambda model, mode: model)
    rows: list[dict[str, object]] = []
    gpu_runs.time_transformers(config, lambda key, row: rows.append(row), (2,))
    assert [(row["compiled"], row["tokens_per_s"]) for row in rows] == [(False, 400000), (True, 400000)]


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("import sys; sys.exit('it broke')", "exit status 1: it broke"),
        ("import time; time.sleep(60)", "not done after 1 s"),
        ("import os; os.kill(os.getpid(), 11)", "exit status -11"),
    ],
)
def test_what_a_stage_had_reported_before_it_died_is_kept(code: str, why: str) -> None:
    report = "import sys; open(sys.argv[-1], 'a').write('[\"checks\", {\"ok\": true}]\\n'); "
    result = gpu.empty_result()
    said = gpu.run_stage([sys.executable, "-c", report + code], 1.0, result)
    assert said is not None and said.startswith(why)
    assert result["checks"] == [{"ok": True}]


def test_all_is_well_only_if_every_stage_ran_and_every_check_passed() -> None:
    result = gpu.empty_result() | {"checks": [{"ok": True}], "sanitizer": {"memcheck": "clean"}}
    assert gpu.is_ok(result)
    assert not gpu.is_ok(result | {"checks": [{"ok": True}, {"ok": False}]})
    assert not gpu.is_ok(result | {"checks": []})
    assert not gpu.is_ok(result | {"sanitizer": {"memcheck": 2}})
    skipped = {"what": "step", "why": "no time was left"}
    assert not gpu.is_ok(result | {"skipped": [skipped | {"needed": True}]})
    assert gpu.is_ok(result | {"skipped": [skipped | {"needed": False}]})


def test_checks_say_how_near_each_operator_came_to_its_limit(
    emulation: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cases, "large", lambda: iter(()))
    rows: list[dict[str, Any]] = []
    gpu_stages.checks(lambda name, row: rows.append(row))
    assert len({(row["op"], row["dtype"]) for row in rows}) == len(rows)
    assert {row["op"] for row in rows} == {operator for operator, _, _ in cases.small()}
    assert sum(row["cases"] for row in rows) == len(list(cases.small()))
    for row in rows:
        assert row["ok"] and row["why"] is None
        assert 0 <= row["worst_rel"] <= row["tol"]
        assert (row["tol"] == 0) == (row["op"] == "embed")
        assert row["worst_rel"] > 0 or row["op"] == "embed", "a rounded result never equals float64"


def test_a_check_that_fails_shows_by_how_much(emulation: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(values: Tensor) -> Callable[[object], None]:
        return lambda device: assert_close(values, torch.ones(4, dtype=torch.float64), length=1)

    bad, lost = torch.tensor([1.0, 1, 1, 1.5]), torch.full((4,), math.nan)
    made = [("good", torch.ones(4)), ("bad", torch.ones(4)), ("bad", bad), ("lost", lost)]
    monkeypatch.setattr(cases, "small", lambda: [(name, torch.float32, check(x)) for name, x in made])
    monkeypatch.setattr(cases, "large", lambda: iter(()))
    rows: dict[str, Any] = {}
    with pytest.raises(AssertionError, match="2 cases failed"):
        gpu_stages.checks(lambda name, row: rows.update({row["op"]: row}))
    tol = float(f"{2 * torch.finfo(torch.float32).eps:.3g}")
    assert rows["good"]["ok"] and rows["good"]["worst_rel"] == 0
    assert (rows["bad"]["cases"], rows["bad"]["ok"], rows["bad"]["tol"]) == (2, False, tol)
    assert rows["bad"]["worst_rel"] == pytest.approx(0.25, rel=0.01)
    assert rows["bad"]["why"].startswith("relative error")
    assert rows["lost"]["worst_rel"] is None and not rows["lost"]["ok"]


def test_what_is_timed_runs_on_the_emulated_kernels(emulation: None, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {
        "HIDDEN": 64, "HEADS": 4, "KV_HEADS": 2, "HEAD_DIM": 64, "INTERMEDIATE": 64, "VOCAB": 300,
        "DECODES": ((3, 48),), "PREFILLS": (32,), "ROWS": (5,), "DRAWS": (2,), "PRODUCTS": (3,),
        "QUANT_PRODUCTS": (3,),
    }  # fmt: skip
    for name, value in small.items():
        monkeypatch.setattr(gpu_operators, name, value)
    names = []
    for name, _, amount, _, calls, peers in gpu_operators.measurements():
        names.append(name)
        assert amount > 0
        calls[0]()
        for peer in ("torch.mm", "torch.mm bf16"):
            if peer in peers:
                peers[peer]()
    assert names == [
        "attention_decode", "attention_prefill", "norm", "gate", "rope_kv_write", "sample",
        *["linear"] * 2, *["quant_linear"] * len(gpu_operators.CODES),
    ]  # fmt: skip


@pytest.mark.parametrize(("weights", "bits"), [("bf16", 16), ("int4", 4.5)])
def test_a_step_of_random_weights_runs_on_the_emulated_kernels(
    emulation: None, weights: str, bits: float
) -> None:
    call, num_bytes, num_calls = gpu_model.decode_program(3, 48, TINY, weights)
    call()
    matrices = 2 * (512 * 128 + 128 * 256 + 256 * 128 + 128 * 128)
    kv = 2 * 3 * 48 * 2 * 2 * 64 * 2
    assert num_bytes == 300 * 128 * 2 + matrices * bits / 8 + kv
    assert num_calls == 1 + 1 + 2 * 9 + 2


def test_the_fastest_peer_that_runs_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> None:
        raise ImportError("no module named flashinfer")

    monkeypatch.setattr(gpu_stages, "time_us", lambda calls: (calls[0]() or 0.0, 0.0))
    row = gpu_stages.compare(10.0, {"slow": lambda: 20.0, "fast": lambda: 5.0, "FlashInfer": absent})
    assert (row["peer"], row["peer_us"], row["vs_peer"]) == ("fast", 5.0, 0.5)
    assert row["peers_failed"] == {"FlashInfer": "no module named flashinfer"}
    assert gpu_stages.compare(10.0, {}) == {}
