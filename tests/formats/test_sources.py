"""Which model a name means, and what is said of names that mean none."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats.sources import ModelFiles, resolve
from tgi_asgi.settings import Settings
from tgi_asgi.types import Progress


def quietly(stage: str, done: int, total: int | None) -> None:
    """Ignore progress."""


def find(name: str | Path) -> ModelFiles:
    return resolve(Settings(model_id=str(name)), quietly)


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if the Hub is asked."""
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)


@pytest.mark.usefixtures("no_hub")
class TestPaths:
    def test_a_gguf_file_is_served_as_it_is(self, tmp_path: Path) -> None:
        path = tmp_path / "m.gguf"
        path.write_bytes(b"GGUF")
        assert find(path) == ModelFiles("m", None, "gguf", path)

    def test_a_directory_needs_config_and_weights(self, tmp_path: Path) -> None:
        with pytest.raises(ModelLoadError, match=r"has no config\.json"):
            find(tmp_path)
        (tmp_path / "config.json").write_text("{}")
        (tmp_path / "pytorch_model.bin").write_bytes(b"")
        with pytest.raises(ModelLoadError, match=r"has no \.safetensors file; pickled weights are"):
            find(tmp_path)
        (tmp_path / "model.safetensors").write_bytes(b"")
        assert find(tmp_path) == ModelFiles(tmp_path.name, None, "directory", tmp_path)

    def test_a_directory_with_one_gguf_file_is_that_file(self, tmp_path: Path) -> None:
        (tmp_path / "a.gguf").write_bytes(b"GGUF")
        assert find(tmp_path).path == tmp_path / "a.gguf"
        (tmp_path / "b.GGUF").write_bytes(b"GGUF")
        with pytest.raises(ModelLoadError, match=r"several models, name one: a\.gguf, b\.GGUF"):
            find(tmp_path)

    @pytest.mark.parametrize(
        ("name", "reason"),
        [
            ("model.bin", "pickled weights are never read"),
            ("model.safetensors", "weights alone"),
            ("README.md", "not a model"),
        ],
    )
    def test_other_files_are_refused(self, tmp_path: Path, name: str, reason: str) -> None:
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(ModelLoadError, match=reason):
            find(tmp_path / name)

    @pytest.mark.parametrize(
        "name",
        ["/no/such", "./model", "../model", "~/no-such-dir-here", "a/b/c", "model.gguf", "x/y.GGUF"],
    )
    def test_a_path_that_does_not_exist_is_no_hub_id(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ModelLoadError, match="no such file or directory: "):
            find(name)

    def test_no_name_at_all_says_how_to_give_one(self) -> None:
        for model_id in (None, ""):
            with pytest.raises(ModelLoadError, match="--model-id or MODEL_ID"):
                resolve(Settings(model_id=model_id), quietly)


@pytest.mark.parametrize("name", ["gpt2", "org/name", "Org-1/na_me-1.5B.Instruct"])
def test_other_names_are_ids_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    from tgi_asgi.formats import hub

    asked = []

    def fetch(
        repo_id: str, revision: str | None, progress: Progress, *, patterns: Sequence[str]
    ) -> tuple[Path, str]:
        asked.append((repo_id, revision, any("*.py" in pattern for pattern in patterns)))
        return tmp_path, "abc123"

    monkeypatch.setattr(hub, "fetch", fetch)
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).write_text("{}")
    files = resolve(Settings(model_id=name, revision="v2"), quietly)
    resolve(Settings(model_id=name, revision="v2", trust_remote_code=True), quietly)
    assert asked == [(name, "v2", False), (name, "v2", True)]
    assert files == ModelFiles(name, "abc123", "directory", tmp_path)


def test_the_hub_client_is_imported_only_when_it_is_needed(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    script = (
        "import sys; from tgi_asgi.formats.sources import resolve; from tgi_asgi.settings import Settings\n"
        f"resolve(Settings(model_id={str(tmp_path / 'm.gguf')!r}), print)\n"
        "assert not {'huggingface_hub', 'tqdm', 'platformdirs', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
