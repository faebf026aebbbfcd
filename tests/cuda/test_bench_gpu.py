"""bench/gpu.py without a GPU: its result's shape, and that neither a stage's end nor a kill loses data."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import gpu, gpu_kernels, gpu_runs, gpu_served, gpu_tests

pytestmark = pytest.mark.thorough


def test_a_dry_run_names_every_stage_and_writes_the_schema(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu.main(["--dry-run", "--out", str(tmp_path)]) == 0
    [path] = tmp_path.glob("gpu-*.json")
    result = json.loads(path.read_text())
    assert capsys.readouterr().out == f"not all is well: {path}\n"
    assert [skipped["what"] for skipped in result["skipped"]] == [stage.name for stage in gpu.STAGES]
    assert set(result) == {
        "schema", "commit", "utc", "device", "ceilings", "build", "checks", "sanitizer", "ops", "step",
        "runs", "profile", "skipped", "wall_s", "ok",
    }  # fmt: skip


def test_stages_come_by_what_they_are_worth_and_each_call_s_fit_into_ten_minutes() -> None:
    names = [stage.name for stage in gpu.STAGES]
    assert names[:6] == ["build", "ceilings", "checks", "step", "operators", "engine"]
    assert names.index("peers") < names.index("served") < names.index("memcheck") < names.index("profiler")
    functions = [*gpu_kernels.STAGES, *gpu_runs.STAGES, *gpu_served.STAGES, *gpu_tests.STAGES]
    assert sorted(stage.__name__ for stage in functions) == sorted(names)
    build = gpu.STAGES[0].deadline_s
    for group in {stage.group for stage in gpu.STAGES} - {0}:
        members = [stage for stage in gpu.STAGES if stage.group == group]
        wheels = gpu.INSTALL_S if "served" in {stage.name for stage in members} else 0
        assert build + wheels + sum(stage.deadline_s for stage in members) <= gpu.TOTAL_S < 600
    tools = [stage.group for stage in gpu.STAGES if stage.name.endswith("check")]
    assert len(set(tools)) == len(tools) == 4, "a tool of the sanitizer is a call of its own"


def test_the_stages_that_are_named_run_in_their_order_behind_a_build_where_there_is_none() -> None:
    only = "engine,operators"
    assert [stage.name for stage in gpu.chosen(only, is_built=True)] == ["operators", "engine"]
    assert [stage.name for stage in gpu.chosen(only, is_built=False)] == ["build", "operators", "engine"]
    assert gpu.chosen(None, is_built=True) == list(gpu.STAGES)
    with pytest.raises(SystemExit, match="there is no stage steps: take build, ceilings"):
        gpu.chosen("steps,build", is_built=True)


def test_a_run_goes_on_whatever_happens_to_its_stages(tmp_path: Path) -> None:
    """Runs the stages of fake_gpu_stages.py; the hanging one has a child that would write a file later."""
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
    assert "log" not in result["skipped"][1] and result["skipped"][0]["log"] == "it broke"


def test_whoever_kills_the_run_finds_what_was_reported_until_then(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    code = (
        "import sys; from pathlib import Path; from bench import gpu\n"
        "stages = [gpu.Stage(name, 60) for name in ('good', 'waiting', 'last')]\n"
        "gpu.run(stages, Path(sys.argv[1]), 90, 'tests.cuda.fake_gpu_stages')"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(out)], cwd=Path(__file__).parents[2])
    try:
        while not out.exists() or "before the end" not in out.read_text():
            assert process.poll() is None, "it ended by itself"
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    result = json.loads(out.read_text())
    assert [check["op"] for check in result["checks"]] == ["good", "before the end"]
    assert result["ceilings"] == {"read": 1}
    [running] = result["skipped"]
    assert (running["what"], running["why"]) == ("waiting", "it was running when all was ended")
    assert not result["ok"]


def test_a_stage_s_figures_are_printed_as_a_table(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    gpu.run([gpu.Stage("step", 20)], tmp_path / "out.json", 60, "tests.cuda.fake_gpu_stages")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("step: done")
    assert lines[1].split()[:4] == ["batch", "context", "weights", "kv"]
    assert lines[2].split() == ["64", "1024", "bf16", "fp8", "512", "top-p", "yes", "no", "3512", "0.873"]
    assert lines[3].split() == ["1", "1024", "!", "out", "of", "memory"]


# Modules that a machine with torch and a GPU may lack, or have in a version that is too old.
MISSING_PACKAGES = (
    "starlette",
    "hypercorn",
    "orjson",
    "msgspec",
    "llguidance",
    "gguf",
    "peft",
    "pytest_asyncio",
    "uvicorn",
    "transformers",  # in a version older than required
)


def test_all_stages_but_the_served_one_run_where_torch_is_all_there_is() -> None:
    """Checks only imports; other tests call the measured code. Weights must be readable without `gguf`."""
    code = f"""
import importlib.abc, sys

class Nothing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in {MISSING_PACKAGES!r}:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Nothing())
from bench import gpu, gpu_kernels, gpu_operators, gpu_runs
from tests.cuda import cases, gpu_device
assert len(list(cases.small())) > 20
from tests.support.random_weights import decoded_values, random_weight
assert decoded_values(random_weight("Q4_K", 2, 512, 1)).isfinite().all()
"""
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True, timeout=280)


def test_whole_models_are_reported_as_a_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_tests, "FILES", ("test_device",))
    monkeypatch.setattr(gpu_tests, "_OPTIONS", ("-q", "-p", "no:cacheprovider"))
    rows: list[tuple[str, dict[str, object]]] = []
    gpu_tests.models(lambda key, row: rows.append((key, row)))
    [(key, row)] = rows
    assert key == "checks" and row["op"] == "models" and row["ok"]
    assert isinstance(row["cases"], int) and row["cases"] > 3


def test_a_model_that_fails_is_named(tmp_path: Path) -> None:
    tests = "import pytest\ndef test_a(): pass\ndef test_b(): assert 0\ndef test_c(): pytest.skip()\n"
    (tmp_path / "test_few.py").write_text(tests)
    command = [sys.executable, "-m", "pytest", "-q", "--rootdir", str(tmp_path), "--junitxml=found.xml"]
    subprocess.run([*command, "test_few.py"], cwd=tmp_path, stdout=subprocess.DEVNULL)
    assert gpu_tests.read_results(tmp_path / "found.xml") == (1, ["test_b"])


def test_gpus_are_held_open_between_the_stages(tmp_path: Path) -> None:
    for name in ("nvidia0", "nvidia1", "nvidiactl"):
        (tmp_path / name).touch()
    (tmp_path / "nvidia2").mkdir()  # cannot be opened

    def held() -> list[str]:
        paths = [path.resolve() for path in Path("/proc/self/fd").iterdir()]
        return sorted(path.name for path in paths if path.parent == tmp_path)

    with gpu.awake_gpus(tmp_path):
        assert held() == ["nvidia0", "nvidia1"]
    assert held() == []


def test_a_run_without_time_left_says_so(tmp_path: Path) -> None:
    result = gpu.run([gpu.Stage("good", 20)], tmp_path / "out", 0.0, "tests.cuda.fake_gpu_stages")
    assert [skipped["why"] for skipped in result["skipped"]] == ["no time was left"]


def test_wheels_that_are_not_there_are_named_and_the_stages_run_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "STAGES", ())
    monkeypatch.setattr(gpu, "_PACKAGES", tmp_path / "packages")
    assert gpu.main(["--wheels", str(tmp_path), "--out", str(tmp_path)]) == 0
    [path] = tmp_path.glob("gpu-*.json")
    [found] = json.loads(path.read_text())["skipped"]
    assert found["what"] == "wheels"
    assert found["why"].startswith("exit status 1") and "No matching distribution" in found["why"]


def test_a_build_is_for_the_gpu_that_is_there_alone() -> None:
    found = [gpu_kernels._architecture(capability) for capability in ((8, 0), (9, 0), (12, 0))]
    assert found == ["8.0", "9.0a", "12.0"]


def test_what_the_machine_needs_is_named_without_torch() -> None:
    found = gpu.requirements()
    assert any(need.startswith("tokenizers") for need in found)
    assert {"pytest", "pytest-asyncio", "gguf"} <= {need.partition(">")[0] for need in found}
    assert not any(need.startswith(("torch", "openai")) for need in found)


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
    assert said[0].startswith(why)
    assert result["checks"] == [{"ok": True}]


def test_all_is_well_only_if_every_stage_ran_and_every_check_passed() -> None:
    result = gpu.empty_result() | {"checks": [{"ok": True}], "sanitizer": {"memcheck": "clean"}}
    assert gpu.is_ok(result)
    assert not gpu.is_ok(result | {"checks": [{"ok": True}, {"ok": False}]})
    assert not gpu.is_ok(result | {"step": [{"us": 3.0, "same_bits": False}]})
    assert not gpu.is_ok(result | {"sanitizer": {"memcheck": 2}})
    skipped = {"what": "step", "why": "no time was left"}
    assert not gpu.is_ok(result | {"skipped": [skipped | {"needed": True}]})
    assert gpu.is_ok(result | {"skipped": [skipped | {"needed": False}]})
