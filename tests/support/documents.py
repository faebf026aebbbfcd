"""Blocks of code, links and headings of this repository's documents, for tests."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
COMMANDS = ("shell", "python", "js")  # the languages that tests run
OTHERS = ("json", "toml", "yaml", "nginx", "caddy", "ini", "http", "text", "markdown", "cpp", "mermaid")
_FENCE = re.compile(r"^ *(`{3,})(\S*)")
_MARK = re.compile(r"^ *<!-- not run: (.+) -->$")
_LINK = re.compile(r"(?<!!)\[(?:[^][]|\[[^]]*\]|!\[[^]]*\]\([^)]*\))*\]\(([^)\s]+)\)|!\[[^]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#{1,6} (.+?) *$")


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block.

    Attributes:
        page: Its file, relative to the repository's root.
        line: Line of its fence, from 1.
        reason: Why no test runs it, from the preceding line, such as `<!-- not run: needs Docker -->`.
    """

    page: str
    line: int
    language: str
    text: str
    reason: str | None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def pages() -> list[str]:
    """List the documents, relative to the repository's root."""
    beside = (*ROOT.glob("*.md"), ROOT / "bench/README.md")
    found = sorted(path.relative_to(ROOT).as_posix() for path in (*beside, *ROOT.glob("docs/**/*.md")))
    return [page for page in found if page != "CHANGELOG.md"]  # it describes the past


def lines_of(page: str) -> list[str]:
    """Return the lines of a document."""
    return (ROOT / page).read_text(encoding="utf-8").splitlines()


def blocks_of(page: str) -> list[Block]:
    """Return the fenced blocks of a document in order."""
    found: list[Block] = []
    lines = lines_of(page)
    at = 0
    while at < len(lines):
        opening = _FENCE.match(lines[at])
        if opening is None:
            at += 1
            continue
        end = next(i for i in range(at + 1, len(lines)) if lines[i].strip() == opening[1])
        indent = len(lines[at]) - len(lines[at].lstrip())
        text = "\n".join(line[indent:] for line in lines[at + 1 : end])
        mark = _MARK.match(lines[at - 1]) if at else None
        found.append(Block(page, at + 1, opening[2], text, mark and mark[1]))
        at = end + 1
    return found


def prose_of(page: str) -> Iterator[tuple[int, str]]:
    """Yield number and text of the lines outside fenced blocks."""
    fence = None
    for number, line in enumerate(lines_of(page), 1):
        found = _FENCE.match(line)
        if fence is None and found is None:
            yield number, line
        elif fence is None and found is not None:
            fence = found[1]
        elif line.strip() == fence:
            fence = None


def links_of(page: str) -> list[tuple[int, str]]:
    """Return the links and pictures of a document: (line, target)."""
    return [
        (number, found[1] or found[2])
        for number, line in prose_of(page)
        for found in _LINK.finditer(re.sub(r"`[^`]*`", "", line))
    ]


def anchors_of(page: str) -> set[str]:
    """Return the anchors of a document's headings, as GitHub and Python-Markdown make them."""
    found: set[str] = set()
    for _, line in prose_of(page):
        if heading := _HEADING.match(line):
            text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading[1]).lower()
            found.add(re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", text).strip()))
    return found
