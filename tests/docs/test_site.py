"""The documents as a site: it builds without warnings, has every page, and fetches nothing from elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.documents import ROOT, pages

pytestmark = pytest.mark.docs


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    return folder


def test_every_document_is_a_page(site: Path) -> None:
    for page in pages():
        if page in ("README.md", "SECURITY.md"):  # pages of the repository, not of the site
            continue
        name = page.removeprefix("docs/").removesuffix(".md")
        folder = {"index": "", "bench/README": "bench"}.get(name, name)
        assert (site / folder / "index.html").is_file(), page


def test_tables_lists_and_marks_are_rendered(site: Path) -> None:
    for path in site.rglob("index.html"):
        body = re.sub(r"<(pre|code).*?</\1>", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        article = body[body.index("<article") : body.index("</article>")]
        text = re.sub(r"<!--.*?-->", "", article, flags=re.DOTALL)
        assert "&lt;!-- not run:" not in text, f"{path}: a mark is rendered"
        assert not re.search(r"<p>[^<]*\|\s*-{3}", text), f"{path}: a table is not rendered"
        assert not re.search(r"<p>(?:[^<]|<(?!/p>))*\n[-*] ", text), f"{path}: a list is not rendered"


def test_the_pages_fetch_nothing_from_elsewhere(site: Path) -> None:
    for path in site.rglob("*.html"):
        tags = re.findall(r"<(?:script|link|img|iframe)\b[^>]*>", path.read_text(encoding="utf-8"))
        fetched = [tag for tag in tags if re.search(r"(?:src|href)=\"?(?:https?:)?//", tag)]
        assert not [tag for tag in fetched if 'rel="canonical"' not in tag and "rel=canonical" not in tag], (
            path
        )
