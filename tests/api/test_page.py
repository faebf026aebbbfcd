"""The pages' files: routes and headers, and that the files fetch nothing from elsewhere."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import httpx
import pytest
from setuptools.dist import Distribution

from tests.support.client import client_of
from tests.support.scripted_engine import ScriptedEngine, scripted_app
from tgi_asgi.api.page.files import FOLDER, POLICY, TYPES, wants_html
from tgi_asgi.settings import Settings

ROOT = Path(__file__).parent.parent.parent
FILES = sorted(FOLDER.iterdir())
CHROME = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,*/*;q=0.8"
MAX_BYTES = 300_000
MAX_LINES = 300
# Addresses in the files that are not fetched: a namespace, and examples in comments.
NAMES = {"http://www.w3.org/2000/svg", "https://d", "https://a"}


async def get(
    path: str,
    *,
    method: str = "GET",
    settings: Settings | None = None,
    is_loaded: bool = True,
    **headers: str,
) -> httpx.Response:
    app = scripted_app(ScriptedEngine(), settings)
    if not is_loaded:
        app.context.served = None
        app.context.report("reading weights", 1, 4)
    async with client_of(app) as client:
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        return await client.request(method, path, headers=names)


@pytest.mark.parametrize(
    ("accept", "is_page"),
    [
        (CHROME, True),
        ("text/html", True),
        ("Text/HTML; charset=utf-8", True),
        ("application/json, text/html;q=0.1", True),
        ("text/html;q=0, */*", False),
        ("text/html;level=1;q=0.0", False),
        ("*/*", False),
        ("text/*", False),
        ("application/json", False),
        ("text/htmlx", False),
        ("", False),
        (None, False),
    ],
)
def test_the_page_is_for_those_who_name_html(accept: str | None, is_page: bool) -> None:
    assert wants_html(accept.encode() if accept is not None else None) is is_page


async def test_a_browser_gets_the_chat_at_the_root() -> None:
    response = await get("/", accept=CHROME)
    assert (response.status_code, response.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert response.content == (FOLDER / "index.html").read_bytes()
    assert response.headers["vary"] == "accept"


@pytest.mark.parametrize("accept", ["*/*", "application/json"])
async def test_all_others_get_the_health_check(accept: str) -> None:
    well = await get("/", accept=accept)
    assert (well.status_code, well.content, well.headers["vary"]) == (200, b"", "accept")
    loading = await get("/", accept=accept, is_loaded=False)
    assert (loading.status_code, loading.json()["error_type"]) == (503, "healthcheck")


async def test_the_pages_are_there_while_the_model_loads_and_health_tells_how_far_it_is() -> None:
    for path in ("/", "/docs", "/page/main.js"):
        assert (await get(path, accept=CHROME, is_loaded=False)).status_code == 200
    health = (await get("/health", is_loaded=False)).json()
    assert (health["state"], health["progress"]) == (
        "loading",
        {"stage": "reading weights", "done": 1, "total": 4},
    )


async def test_the_files_need_no_key_and_what_they_show_does() -> None:
    keyed = Settings(api_key=("k",))
    for path in ("/", "/docs", "/page/chat.js"):
        assert (await get(path, accept=CHROME, settings=keyed)).status_code == 200
    for path in ("/v1/models", "/info", "/api-doc/openapi.json"):
        assert (await get(path, accept=CHROME, settings=keyed)).status_code == 401


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
async def test_every_file_has_its_type_and_the_policy(path: Path) -> None:
    response = await get(f"/page/{path.name}")
    assert response.status_code == 200
    assert response.content == path.read_bytes()
    assert response.headers["content-type"] == TYPES[path.suffix].decode()
    assert response.headers["content-security-policy"] == POLICY
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["cache-control"] == "no-cache"


def test_the_policy_lets_in_nothing_but_files_of_the_server() -> None:
    directives = dict(directive.split(" ", 1) for directive in POLICY.split("; "))
    assert directives["default-src"] == directives["base-uri"] == directives["frame-ancestors"] == "'none'"
    assert directives["script-src"] == directives["style-src"] == directives["connect-src"] == "'self'"
    assert "unsafe" not in POLICY and "http" not in POLICY and "*" not in POLICY
    assert directives["require-trusted-types-for"] == "'script'"


@pytest.mark.parametrize("path", ["/", "/docs", "/page/base.css"])
async def test_a_file_that_the_browser_has_is_not_sent_again(path: str) -> None:
    first = await get(path, accept=CHROME)
    etag = first.headers["etag"]
    for known in (etag, f"W/{etag}", f'"other", {etag}', "*"):
        again = await get(path, accept=CHROME, if_none_match=known)
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", etag)
        assert again.headers["content-security-policy"] == POLICY
    assert (await get(path, accept=CHROME, if_none_match='"other"')).status_code == 200


async def test_the_docs_below_their_own_path_are_sent_beside_it() -> None:
    response = await get("/docs/")
    assert (response.status_code, response.headers["location"]) == (308, "../docs")


async def test_head_gets_the_headers_alone() -> None:
    whole = await get("/page/main.js")
    head = await get("/page/main.js", method="HEAD")
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == whole.headers["content-length"] == str(len(whole.content))
    assert head.headers["etag"] == whole.headers["etag"]


@pytest.mark.parametrize(
    "name", ["missing.js", "files.py", "..%2ffiles.py", "%2e%2e/files.py", "main.js/x", ""]
)
async def test_nothing_else_is_served(name: str) -> None:
    assert (await get(f"/page/{name}")).status_code == 404


async def test_the_pages_can_be_left_out() -> None:
    bare = Settings(web_pages=False)
    root = await get("/", accept=CHROME, settings=bare)
    assert (root.status_code, root.content) == (200, b"")
    assert "vary" not in root.headers
    for path in ("/docs", "/page/main.js"):
        assert (await get(path, settings=bare)).status_code == 404


def test_the_pages_are_small_and_their_files_are_short() -> None:
    assert sum(path.stat().st_size for path in FILES) <= MAX_BYTES
    assert all(path.suffix in TYPES for path in FILES)
    assert [p.name for p in FILES if len(p.read_text("utf-8").splitlines()) > MAX_LINES] == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_file_names_another_host_or_writes_html(path: Path) -> None:
    text = path.read_text("utf-8")
    assert set(re.findall(r"\w+://[^\s\"'`)(\\;,<>]+", text)) <= NAMES
    assert not re.search(r"""(?:src|href|url|from|import)\s*[=(]?\s*["']?//""", text)
    banned = (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "DOMParser",
        "srcdoc",
    )
    assert [word for word in banned if word in text] == []
    if path.suffix == ".html":
        assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", text)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_file_that_a_file_names_is_there(path: Path) -> None:
    text = path.read_text("utf-8")
    named = re.findall(r"""from "\./([^"]+)";""", text) if path.suffix == ".js" else []
    named += re.findall(r"""(?:src|href)="page/([^"]+)\"""", text)
    assert {name for name in named if not (FOLDER / name).is_file()} == set()


def test_a_wheel_has_all_files_of_the_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]
    made: dict[str, Any] = {
        "packages": ["tgi_asgi", "tgi_asgi.api.page"],
        "package_data": config["package-data"],
    }
    command: Any = Distribution(made).get_command_obj("build_py")
    command.ensure_finalized()
    packed = {Path(folder, name).resolve() for _, folder, _, names in command.data_files for name in names}
    assert set(FILES) <= packed
