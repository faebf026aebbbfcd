"""docs/coming-from-tgi.md against the code: its tables are current and cover everything in TGI."""

from __future__ import annotations

import re

import pytest

from tests.serve.test_launcher_compat import LAUNCHER as KNOWN_FLAGS
from tests.support import tgi_page
from tgi_asgi.serve.launcher_compat import OPTIONS, RENAMED, environment_changes

PAGE = tgi_page.PAGE.read_text(encoding="utf-8")


def test_the_tables_are_what_the_code_says() -> None:
    expected = tgi_page.written(PAGE, tgi_page.tables())
    assert expected == PAGE, "run `python -m tests.support.tgi_page` to update the tables"


def test_every_flag_of_the_launcher_is_in_the_table() -> None:
    assert set(KNOWN_FLAGS.split()) == tgi_page.LAUNCHER.keys()


def test_what_the_code_knows_of_tgi_is_on_the_page() -> None:
    """Except two switches of older TGI versions, which the code tolerates."""
    older = {"disable_usage_stats", "disable_crash_reports"}
    listed = {*tgi_page.LAUNCHER, *(name.lower() for name in tgi_page.VARIABLES)}
    assert {option.name for option in OPTIONS} - older <= listed
    assert {old for old, _ in RENAMED} <= set(tgi_page.VARIABLES)


@pytest.mark.parametrize(("name", "word"), [("sharded", "refused"), ("ngrok", "ignored"), ("port", "same")])
def test_the_three_fates_are_told_apart(name: str, word: str) -> None:
    (row,) = re.findall(rf"^\| `--{name.replace('_', '-')}` \| [^|]*\| (\w+)", PAGE, re.MULTILINE)
    assert row == word


def test_a_default_that_is_another_is_told() -> None:
    assert "| `--waiting-served-ratio` | `0.3` | same; default `0.0` |" in PAGE
    assert "| `--max-waiting-tokens` | `20` | same |" in PAGE


def test_a_flag_that_nobody_knows_has_no_row() -> None:
    with pytest.raises(KeyError):
        tgi_page._verdict("frobnicate", "")


def test_a_page_without_a_place_for_a_table_is_no_page() -> None:
    with pytest.raises(ValueError, match="0 places for flags"):
        tgi_page.written("nothing", {"flags": []})


def test_the_variables_that_tgi_s_images_set_mean_here_what_they_meant_there() -> None:
    """Check the images for CUDA, ROCm and Intel; then Gaudi; then CPUs and Neuron."""
    usual = {"HF_HOME": "/data", "HF_HUB_ENABLE_HF_TRANSFER": "1", "PORT": "80"}
    assert environment_changes(usual) == {}
    gaudi = {**usual, "ATTENTION": "paged", "PREFIX_CACHING": "0", "PREFILL_CHUNKING": "0"}
    assert environment_changes(gaudi) == {"PREFIX_CACHE": "0"}
    assert environment_changes({"HUGGINGFACE_HUB_CACHE": "/data", "PORT": "80"}) == {"HF_HUB_CACHE": "/data"}


@pytest.mark.parametrize("name", ["coming-from-tgi.md", "deploying.md"])
def test_what_the_page_points_at_is_there(name: str) -> None:
    folder = tgi_page.PAGE.parent
    text = re.sub("`[^`\n]*`", "", (folder / name).read_text(encoding="utf-8"))
    links = re.findall(r"\]\((?!https?:)([^)#]*)(?:#([\w-]+))?\)", text)
    assert len(links) > 5
    for path, anchor in links:
        target = folder / path if path else folder / name
        assert target.exists(), path
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {
                re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings
            }
