"""Downloads from the Hub: huggingface_hub's real client against a small local server with the real protocol.

Each case runs in its own process, because huggingface_hub reads its environment when it is imported.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.fake_hub import COMMIT, FILES, fake_hub
from tests.support.forked import run_forked


@pytest.fixture
def hub() -> Iterator[str]:
    """Run the fake hub and yield its address."""
    with fake_hub() as address:
        yield address


def fetch(tmp_path: Path, endpoint: str, model_id: str, revision: str = "", **environ: str) -> Any:
    where = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hf"), "REVISION": revision}
    run = run_forked(["tests.formats.resolve_names", model_id], {**where, **environ})
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    if folder := found.get("path"):
        paths = Path(folder).rglob("*")
        found["names"] = sorted(str(path.relative_to(folder)) for path in paths if path.is_file())
    return found


def test_what_a_model_needs_is_fetched_with_token_revision_and_progress(hub: str, tmp_path: Path) -> None:
    answer = fetch(tmp_path, hub, "org/model", "v2", HF_TOKEN="secret")
    assert answer.get("error") is None
    assert answer["revision"] == COMMIT and answer["kind"] == "directory"
    unwanted = {
        "README.md",
        "modeling_own.py",
        "consolidated.safetensors",
        "original/params.json",
        "pytorch_model.bin",
    }
    assert answer["names"] == sorted(FILES.keys() - unwanted)
    stage, done, total = answer["steps"][-1]
    assert stage == "downloading org/model at v2" and total == done >= 50_000
    # Afterwards the model is in the cache, and no network is needed.
    again = fetch(tmp_path, "http://127.0.0.1:9", "org/model", "v2", HF_HUB_OFFLINE="1")
    assert again["names"] == answer["names"] and again["revision"] == COMMIT


def test_a_model_s_code_is_fetched_for_those_who_trust_it(hub: str, tmp_path: Path) -> None:
    answer = fetch(tmp_path, hub, "org/model", HF_TOKEN="secret", TRUST_REMOTE_CODE="true")
    assert "modeling_own.py" in answer["names"]


@pytest.mark.parametrize(
    ("model_id", "revision", "environ", "reason"),
    [
        ("org/model", "v3", {"HF_TOKEN": "secret"}, "has no revision 'v3' on the Hub"),
        ("org/other", "", {"HF_TOKEN": "secret"}, "no model 'org/other'"),
        ("org/model", "", {}, "a private one needs HF_TOKEN"),
        ("org/model", "", {"HF_HUB_OFFLINE": "1"}, "nor in the Hub's cache"),
        ("org/model", "", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "the Hub cannot be reached"),
    ],
)
def test_what_cannot_be_fetched_is_explained(
    hub: str, tmp_path: Path, model_id: str, revision: str, environ: dict[str, str], reason: str
) -> None:
    assert reason in fetch(tmp_path, hub, model_id, revision, **environ)["error"]
