"""The adapters that settings name, in TGI's and vLLM's syntax, and the directories of their locations."""

from __future__ import annotations

from pathlib import Path

import pytest

from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats import hub
from tgi_asgi.formats.peft_config import ADAPTER_FILES
from tgi_asgi.formats.sources import AdapterSource, adapter_sources, max_loaded_adapters, resolve_adapter
from tgi_asgi.settings import Settings


def named(adapters: str = "", *modules: str) -> list[tuple[str, str]]:
    settings = Settings(lora_adapters=(adapters,) if adapters else (), lora_modules=modules)
    return [(source.name, source.location) for source in adapter_sources(settings)]


def test_tgis_list_names_directories_ids_and_revisions(tmp_path: Path) -> None:
    (tmp_path / "sql").mkdir()
    (tmp_path / "at@v2").mkdir()
    assert named(f"org/a, org/b@v2,,poems={tmp_path},{tmp_path}/sql/,{tmp_path}/at@v2, org/c@main ") == [
        ("org/a", "org/a"), ("org/b", "org/b@v2"), ("poems", str(tmp_path)), ("sql", f"{tmp_path}/sql/"),
        ("at@v2", f"{tmp_path}/at@v2"), ("org/c", "org/c@main"),
    ]  # fmt: skip


def test_vllms_modules_are_pairs_or_json() -> None:
    assert named("", "a=/x b=org/y@v1") == [("a", "/x"), ("b", "org/y@v1")]
    assert named("", '{"name": "a b", "path": "/x", "base_model_name": "q"}') == [("a b", "/x")]
    assert named("", '[{"name": "a", "path": "/x"}, {"name": "b", "path": "/y"}]', "c=/z") == [
        ("a", "/x"), ("b", "/y"), ("c", "/z"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("adapters", "modules", "message"),
    [
        ("=x", (), "is written NAME=PATH, got '=x'"),
        ("x=", (), "is written NAME=PATH, got 'x='"),
        ("org/a,org/a@v2", (), "two adapters are called 'org/a'"),
        ("x=/a", ("x=/b",), "two adapters are called 'x'"),
        ("~nosuchuser/x", (), "no such directory: '~nosuchuser/x'"),
        ("a/" * 3000, (), "File name too long"),
        ("", ("/just/a/path",), "takes NAME=PATH, got '/just/a/path'"),
        ("", ('{"name": "x"}',), "takes objects with `name` and `path`"),
        ("", ('["x"]',), "takes objects with `name` and `path`"),
        ("", ('{"name": "x"',), "not valid JSON"),
        ("a\nb=/x", (), "must be 1 to 256 printable characters, got 'a\\nb'"),
        ("a\udcff=/x", (), "must be 1 to 256 printable characters, got 'a\\udcff'"),
        ("", (f"{'a' * 257}=/x",), "must be 1 to 256 printable characters"),
        ("", ("[" * 100_000,), "nests too deep"),
        ("", ('{"name": "' + "x" * 10_000 + '"}',), "takes objects"),
    ],
)
def test_what_is_not_written_so_is_refused_in_few_words(
    adapters: str, modules: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ModelLoadError) as refused:
        named(adapters, *modules)
    assert message in str(refused.value) and len(str(refused.value)) < 400


def test_memory_holds_as_many_as_are_named_if_nobody_says_otherwise() -> None:
    listed = ",".join(f"org/a{at}" for at in range(12))
    assert max_loaded_adapters(Settings(lora_adapters=(listed,))) == 12
    assert max_loaded_adapters(Settings(lora_adapters=(listed,), max_cpu_loras=3)) == 3
    assert max_loaded_adapters(Settings(enable_lora=True)) == 8


def test_a_location_is_a_directory_or_an_id_with_a_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str | None]] = []

    def list_files(repository: str, revision: str | None) -> hub.Listing:
        asked.append((repository, revision))
        return hub.Listing(frozenset(ADAPTER_FILES), is_cached=True)

    def fetch(
        repository: str, revision: str | None, *_: object, patterns: object, is_cached: bool
    ) -> tuple[Path, str]:
        assert patterns == ADAPTER_FILES and is_cached
        assert asked[-1] == (repository, revision)
        return tmp_path, "commit"

    monkeypatch.setattr(hub, "list_files", list_files)
    monkeypatch.setattr(hub, "fetch", fetch)
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "here@v1").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve_adapter(AdapterSource("x", "org/here@v1")) == Path("org/here@v1")
    assert asked == []
    for location in ("org/a", "org/b@v2", "org/c@refs/pr/3"):
        assert resolve_adapter(AdapterSource("x", location)) == tmp_path
    assert asked == [("org/a", None), ("org/b", "v2"), ("org/c", "refs/pr/3")]


@pytest.mark.parametrize(
    "location",
    ["~nosuchuser/x", "~nosuchuser@x", "a" * 5000, "/x\0y", "/no/such", "@v1", "org/a@", "a/b/c", __file__],
)
def test_odd_locations_are_no_directories(location: str) -> None:
    with pytest.raises(ModelLoadError, match="no such directory") as refused:
        resolve_adapter(AdapterSource("x", location))
    assert len(str(refused.value)) < 400
