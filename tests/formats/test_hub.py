"""Downloads from the Hub: huggingface_hub's real client against a small local server with the real protocol.

Each case runs in its own process, because huggingface_hub reads its environment when it is imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.fake_hub import COMMIT, FILES, fake_hub

SCRIPT = """
import json, sys
from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats.sources import resolve
from tgi_asgi.settings import Settings
steps = []
try:
    settings = Settings.from_environ(model_id=sys.argv[1], revision=sys.argv[2] or None)
    files = resolve(settings, lambda *step: steps.append(step))
except ModelLoadError as error:
    print(json.dumps({"error": str(error)}))
else:
    names = sorted(str(path.relative_to(files.path)) for path in files.path.rglob("*") if path.is_file())
    print(json.dumps({"revision": files.revision, "kind": files.kind, "names": names, "steps": steps}))
"""


@pytest.fixture
def hub() -> Iterator[str]:
    """Run the fake hub and yield its address."""
    with fake_hub() as address:
        yield address


def fetch(tmp_path: Path, endpoint: str, model_id: str, revision: str = "", **environ: str) -> Any:
    kept = {name: text for name, text in os.environ.items() if not name.startswith("HF_")}
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, model_id, revision],
        env={**kept, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hf"), **environ},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return json.loads(run.stdout)


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
