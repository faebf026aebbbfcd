"""What the site needs beyond mkdocs.yml: documents from outside docs/, and links that leave it.

The documents are written for GitHub, with links from file to file. On the site, links to pages stay links to
pages; those to other files go to the repository, whose address pyproject.toml has.
"""

from __future__ import annotations

import posixpath
import re
import tomllib
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
BROUGHT = ("CONTRIBUTING.md", "CHANGELOG.md", "bench/README.md")
_LINK = re.compile(r"(?<=\]\()([^)\s:]+?)(#[^)\s]*)?(?=\))")
_WHOLE_LINK = re.compile(r"(?<!!)\[((?:`[^`]*`|[^][`])*)\]\(outside:([^)]*)\)")
_CODE = re.compile(r"(^ *```.*?^ *```$|`[^`\n]+`)", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    """Bring the documents that lie beside docs/."""
    for name in BROUGHT:
        files.append(File.generated(config, name, content=(ROOT / name).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Point links at pages of the site or at the repository."""
    name = page.file.src_uri
    folder = posixpath.dirname(name if name in BROUGHT else f"docs/{name}")
    address = _repository()

    def link(found: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, found[1]))
        anchor = found[2] or ""
        inside = target if target in BROUGHT else target.removeprefix("docs/")
        if target in BROUGHT or target.startswith("docs/"):
            return posixpath.relpath(inside, posixpath.dirname(name) or ".") + anchor
        return f"{address}/blob/main/{target}{anchor}" if address else f"outside:{target}"

    parts = _CODE.split(markdown)  # odd ones are code, where nothing is a link
    parts[::2] = [_LINK.sub(link, text) for text in parts[::2]]
    return _WHOLE_LINK.sub(r"\1", "".join(parts))


def _repository() -> str:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    urls = {name.lower(): url for name, url in project.get("urls", {}).items()}
    found: str = urls.get("repository") or urls.get("source") or ""
    return found.rstrip("/")
