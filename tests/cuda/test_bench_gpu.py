"""bench/gpu.py without a GPU: its result's shape, and that no stage's end is the run's."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from bench import gpu, gpu_operators, gpu_stages
from tests.cuda import emulated_ops
from tests.emulation import library


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
        "skipped", "wall_s", "ok",
    }  # fmt: skip


def test_stages_fit_into_the_time_and_each_has_its_function() -> None:
    assert sum(stage.deadline_s for stage in gpu.STAGES) <= gpu.TOTAL_S
    assert all(callable(getattr(gpu_stages, stage.name)) for stage in gpu.STAGES)


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
    assert not gpu.is_ok(result | {"skipped": [{"what": "step", "why": "no time was left"}]})


def test_what_is_timed_runs_on_the_emulated_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = library.missing_tool()
    if reason is not None:
        pytest.skip(f"no emulation of CUDA here: {reason}")
    emulated_ops.register()
    monkeypatch.setattr(gpu_stages, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(gpu_stages, "_L2_BYTES", 1)
    small = {
        "HIDDEN": 64, "HEADS": 4, "KV_HEADS": 2, "HEAD_DIM": 64, "INTERMEDIATE": 64, "LAYERS": 2,
        "VOCAB": 300, "DECODES": ((3, 48),), "PREFILLS": (32,), "ROWS": (5,), "DRAWS": (2,),
    }  # fmt: skip
    for name, value in small.items():
        monkeypatch.setattr(gpu_operators, name, value)
    names = []
    for name, _, amount, _, calls, peer in gpu_operators.measurements():
        names.append(name)
        assert amount > 0
        calls[0]()
        if peer is not None and peer[0] == "SDPA":
            peer[1]()
    assert names == [
        "attention_decode", "attention_prefill", "rms_norm", "act_mul", "rope_kv_write", "sample"
    ]  # fmt: skip
    call, num_bytes, num_calls = gpu_operators.decode_program(3, 48)
    call()
    weights = 256 * 64 + 2 * (512 * 64 + 64 * 256 + 128 * 64 + 64 * 64)
    assert num_bytes > 2 * weights
    assert num_calls == 1 + 1 + 2 * 11 + 2
