"""The documents themselves: links and anchors, the site's navigation, and how each code block is tested."""

from __future__ import annotations

import json
import re
import tomllib
from typing import Any

import pytest
import yaml

from tests.support.documents import (
    COMMANDS,
    OTHERS,
    ROOT,
    Block,
    anchors_of,
    blocks_of,
    links_of,
    pages,
    prose_of,
)

BLOCKS = [block for page in pages() for block in blocks_of(page)]
# Reasons for not running a block. `part of` and `run by` name a file of the repository.
REASONS = re.compile(
    r"needs (root|the network|Docker|Docker and a GPU|a GPU( and nvcc)?|buildah|Kubernetes|systemd|Ray|npm|"
    r"nginx|Caddy|Claude Code|Codex|vLLM|guidellm|aiperf|llama\.cpp|another server|an account)"
    r"( \(make [a-z-]+ runs it\))?|takes minutes|(part of|run by) [\w./-]+"
)
PROGRAMS = re.compile(
    r"(?:\$ )?(?:sudo )?(?:[A-Z_]+=\S+ )*"
    r"(?:tgi-asgi|make|curl|pip|python3?|docker|kubectl|helm|apt(?:-get)?|uv|npm|systemctl) "
)


@pytest.mark.parametrize("page", pages())
def test_links_lead_to_a_page_and_a_heading(page: str) -> None:
    folder = (ROOT / page).parent
    for line, target in links_of(page):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (folder / path).resolve() if path else ROOT / page
        assert file.exists(), f"{page}:{line}: {target}"
        if anchor:
            assert file.suffix == ".md", f"{page}:{line}: {target}"
            assert anchor in anchors_of(file.relative_to(ROOT).as_posix()), f"{page}:{line}: {target}"


def test_the_site_s_navigation_names_each_page_once() -> None:
    nav = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), yaml.BaseLoader)["nav"]
    named = list(_leaves(nav))
    assert sorted(named) == sorted(set(named))
    brought = {"CONTRIBUTING.md", "CHANGELOG.md", "bench/README.md"}  # docs/hooks.py adds these
    assert {f"docs/{name}" for name in named if name not in brought} == {
        page for page in pages() if page.startswith("docs/")
    }


def _leaves(nav: Any) -> Any:
    if isinstance(nav, str):
        yield nav
    else:
        for each in nav.values() if isinstance(nav, dict) else nav:
            yield from _leaves(each)


@pytest.mark.parametrize("page", pages())
def test_code_stands_in_fences(page: str) -> None:
    """Indented blocks would be neither run nor marked as not run."""
    before, in_list = "", False
    for number, line in prose_of(page):
        if line.strip() and not line.startswith(" "):
            in_list = bool(re.match(r"([-*]|\d+\.) ", line))
        is_code = line.startswith("    ") and not before.strip() and not in_list
        assert not is_code, f"{page}:{number}: {line.strip()}"
        before = line


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_a_block_is_run_or_says_why_not(block: Block) -> None:
    """Command blocks without a reason are run by tests/server/test_guides.py."""
    assert block.language in (*COMMANDS, *OTHERS), f"{block} has the language {block.language!r}"
    if block.reason is not None:
        assert block.language in COMMANDS, f"{block} has a reason but is never run"
        assert REASONS.fullmatch(block.reason), f"{block}: {block.reason}"
        if found := re.fullmatch(r"(?:part of|run by) ([\w./-]+)", block.reason):
            assert (ROOT / found[1]).is_file()
        if found := re.search(r"\(make ([a-z-]+) runs it\)", block.reason):
            assert f"\n{found[1]}: " in (ROOT / "Makefile").read_text(encoding="utf-8")
    elif block.language not in COMMANDS:
        commands = [line for line in block.text.splitlines() if PROGRAMS.match(line)]
        assert not commands, f"{block} hides commands in {block.language!r}: {commands[0]}"


@pytest.mark.parametrize(
    "block", [block for block in BLOCKS if block.language in ("json", "toml", "yaml")], ids=str
)
def test_a_block_of_data_can_be_read(block: Block) -> None:
    readers: dict[str, Any] = {"json": json.loads, "toml": tomllib.loads, "yaml": yaml.safe_load_all}
    assert list(readers[block.language](block.text))


def test_every_page_has_one_title() -> None:
    for page in pages():
        titles = [line for _, line in prose_of(page) if line.startswith("# ")]
        assert len(titles) == 1, page
