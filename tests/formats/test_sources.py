"""The model that a name refers to, and the errors for names that refer to none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats.sources import ModelFiles, resolve
from tgi_asgi.settings import Settings
from tgi_asgi.types import Progress


def ignore_progress(stage: str, done: int, total: int | None) -> None:
    """Ignore progress."""


def find(name: str | Path) -> ModelFiles:
    return resolve(Settings(model_id=str(name)), ignore_progress)


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if the code tries to use the Hub."""
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)


@pytest.mark.usefixtures("no_hub")
class TestPaths:
    def test_a_gguf_file_is_served_as_it_is(self, tmp_path: Path) -> None:
        path = tmp_path / "m.gguf"
        path.write_bytes(b"GGUF")
        assert find(path) == ModelFiles("m", None, "gguf", path)

    def test_the_served_name_replaces_the_model_id(self, tmp_path: Path) -> None:
        path = tmp_path / "m.gguf"
        path.write_bytes(b"GGUF")
        settings = Settings(model_id=str(path), served_model_name="mine")
        assert resolve(settings, ignore_progress).model_id == "mine"

    def test_a_directory_needs_config_and_weights(self, tmp_path: Path) -> None:
        with pytest.raises(ModelLoadError, match=r"has no config\.json"):
            find(tmp_path)
        (tmp_path / "config.json").write_text("{}")
        (tmp_path / "pytorch_model.bin").write_bytes(b"")
        with pytest.raises(ModelLoadError, match="pickled weights, which are never read"):
            find(tmp_path)
        (tmp_path / "model.safetensors").write_bytes(b"")
        assert find(tmp_path) == ModelFiles(tmp_path.name, None, "directory", tmp_path)

    def test_a_directory_with_one_gguf_file_is_that_file(self, tmp_path: Path) -> None:
        (tmp_path / "a.gguf").write_bytes(b"GGUF")
        assert find(tmp_path).path == tmp_path / "a.gguf"
        (tmp_path / "b.GGUF").write_bytes(b"GGUF")
        with pytest.raises(ModelLoadError, match=r"several models, name one: a\.gguf, b\.GGUF"):
            find(tmp_path)

    def test_a_directory_with_a_model_in_parts_is_that_model(self, tmp_path: Path) -> None:
        for name in ("m-00002-of-00002.gguf", "m-00001-of-00002.gguf", "mmproj-m-f16.gguf"):
            (tmp_path / name).write_bytes(b"GGUF")
        assert find(tmp_path).path == tmp_path / "m-00001-of-00002.gguf"

    def test_a_projector_beside_a_gguf_file_belongs_to_it(self, tmp_path: Path) -> None:
        for name in ("m-Q4_0.gguf", "mmproj-m-F16.gguf", "mmproj-m-Q8_0.gguf"):
            (tmp_path / name).write_bytes(b"GGUF")
        for model_id in (tmp_path, tmp_path / "m-Q4_0.gguf"):
            found = find(model_id)
            assert (found.projector, found.is_projector_named) == (tmp_path / "mmproj-m-F16.gguf", False)
        named = tmp_path / "mmproj-m-Q8_0.gguf"
        found = resolve(Settings(model_id=str(tmp_path), mmproj=str(named)), ignore_progress)
        assert (found.projector, found.is_projector_named) == (named, True)
        assert resolve(Settings(model_id=str(tmp_path), mmproj="none"), ignore_progress).projector is None
        with pytest.raises(ModelLoadError, match="--mmproj: no such file: 'other"):
            resolve(Settings(model_id=str(tmp_path), mmproj="other.gguf"), ignore_progress)

    def test_a_checkpoint_takes_no_projector(self, tmp_path: Path) -> None:
        for name in ("config.json", "model.safetensors", "mmproj-m-F16.gguf"):
            (tmp_path / name).write_bytes(b"{}")
        assert find(tmp_path).projector is None
        with pytest.raises(ModelLoadError, match="--mmproj is for GGUF models"):
            resolve(
                Settings(model_id=str(tmp_path), mmproj=str(tmp_path / "mmproj-m-F16.gguf")), ignore_progress
            )

    def test_safetensors_go_before_gguf(self, tmp_path: Path) -> None:
        for name in ("m.gguf", "config.json", "model.safetensors"):
            (tmp_path / name).write_bytes(b"{}")
        assert find(tmp_path).kind == "directory"

    @pytest.mark.parametrize(
        ("name", "reason"),
        [
            ("model.bin", "pickled weights are never read"),
            ("model.safetensors", "contains only weights"),
            ("README.md", "not a model"),
        ],
    )
    def test_other_files_are_refused(self, tmp_path: Path, name: str, reason: str) -> None:
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(ModelLoadError, match=reason):
            find(tmp_path / name)

    @pytest.mark.parametrize(
        "name",
        [
            "/no/such",
            "./model",
            "../model",
            "~/no-such-dir-here",
            "a/b/c",
            "model.gguf",
            "x/y.GGUF",
            "org/name:",
            "org/name:a:b",
            "org/name:../x",
            "./dir:Q4_K_M",
            "~no-such-user/model",
            pytest.param("a" * 5000, id="a long name"),
        ],
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
                resolve(Settings(model_id=model_id), ignore_progress)


@pytest.mark.parametrize(
    ("name", "quant"),
    [
        ("gpt2", None),
        ("org/name", None),
        ("Org-1/na_me-1.5B.Instruct", None),
        ("org/name-GGUF:q4_k_m", "q4_k_m"),
        ("org/name-GGUF:UD/name-Q8_0.gguf", "UD/name-Q8_0.gguf"),
    ],
)
def test_other_names_are_ids_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, quant: str | None
) -> None:
    from tgi_asgi.formats import hub_models

    asked = []

    def fetch(
        repo_id: str, revision: str | None, quant: str | None, progress: Progress, *, with_code: bool,
        with_projector: bool,
    ) -> hub_models.Fetched:  # fmt: skip
        assert with_projector
        asked.append((repo_id, revision, quant, with_code))
        return hub_models.Fetched("directory", tmp_path, "abc123")

    monkeypatch.setattr(hub_models, "fetch_model", fetch)
    files = resolve(Settings(model_id=name, revision="v2"), ignore_progress)
    resolve(Settings(model_id=name, revision="v2", trust_remote_code=True), ignore_progress)
    repository = name.partition(":")[0]
    assert asked == [(repository, "v2", quant, False), (repository, "v2", quant, True)]
    assert files == ModelFiles(name, "abc123", "directory", tmp_path)


def test_the_hub_client_is_imported_only_when_it_is_needed(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    script = (
        "import sys; from tgi_asgi.formats.sources import resolve; from tgi_asgi.settings import Settings\n"
        f"resolve(Settings(model_id={str(tmp_path / 'm.gguf')!r}), print)\n"
        "assert not {'huggingface_hub', 'tqdm', 'platformdirs', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
