"""Each command of README and docs that can run here, exactly as written, against a real server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server.conftest import require_node, require_program
from tests.support.documents import COMMANDS, Block, blocks_of, pages
from tests.support.guide import Guide
from tests.support.hub_stand_ins import StandIns
from tests.support.server_process import ServerProcess

BLOCKS = [
    pytest.param(block, id=str(block), marks=[] if page == "README.md" else pytest.mark.thorough)
    for page in pages()
    for block in blocks_of(page)
    if block.language in COMMANDS and block.reason is None
]


class Guides:
    """Creates the documents' guides; a guide's server runs until another document is read."""

    def __init__(self, folder: Path, request: pytest.FixtureRequest) -> None:
        self._folder, self._request = folder, request
        self._stand_ins = StandIns(folder / "hub")
        self._page = ""
        self._guide: Guide | None = None

    def of(self, page: str) -> Guide:
        if self._guide is None or page != self._page:
            self.close()
            folder = self._folder / page.replace("/", "-")
            folder.mkdir()
            self._page = page
            self._guide = Guide(page, folder, self._demo, self._stand_ins)
        return self._guide

    def close(self) -> None:
        if self._guide is not None:
            self._guide.close()

    def _demo(self) -> ServerProcess:
        demo: ServerProcess = self._request.getfixturevalue("demo")
        return demo


@pytest.fixture(scope="module")
def guides(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Guides]:
    """Yield the documents; stop the last server at the end."""
    found = Guides(tmp_path_factory.mktemp("guides"), request)
    yield found
    found.close()


@pytest.mark.parametrize("block", BLOCKS)
def test_a_command_of_the_documents_runs(block: Block, guides: Guides, demo_gguf: Path) -> None:
    """The demonstration model must exist already: the servers fetch nothing."""
    if block.language == "js":
        require_node()
    if "curl" in block.text:
        require_program("curl")
    guides.of(block.page).run(block)
