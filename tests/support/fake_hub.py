"""A small local server that imitates the Hub for huggingface_hub's real client."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b"{}",
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "additional_chat_templates/tool_use.jinja": b"{{ tools }}",
    "model.safetensors": bytes(50_000),
    "consolidated.safetensors": bytes(10),
    "pytorch_model.bin": b"pickle",
    "original/params.json": b"{}",
    "modeling_own.py": b"class Model: ...",
    "README.md": b"# A model",
}


@dataclass
class Repository:
    """A repository of one commit, with the revisions `main` and `v2`.

    Attributes:
        is_private: Whether it requires the token `secret`; without it, the repository is not found.
        is_gated: Whether its files can be listed but not downloaded, by anyone.
        cuts: Number of responses with each of these files that break off in the middle.
    """

    files: Mapping[str, bytes]
    is_private: bool = False
    is_gated: bool = False
    cuts: dict[str, int] = field(default_factory=dict)


@dataclass
class Hub:
    """A test's view of a running hub.

    Attributes:
        requests: Method, path and requested range of each request, in order.
    """

    address: str
    repositories: Mapping[str, Repository]
    requests: list[tuple[str, str, str]] = field(default_factory=list)

    def fetched(self) -> list[str]:
        """Return the names of files whose contents were requested."""
        return [path.partition(f"/resolve/{COMMIT}/")[2] for method, path, _ in self.requests
                if method == "GET" and "/resolve/" in path]  # fmt: skip


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def log_message(self, *args: object) -> None:
        """Suppress the default log."""

    def _answer(self, *, with_body: bool) -> None:
        path = urllib.parse.unquote(self.path.split("?")[0])
        self.hub.requests.append((self.command, path, self.headers.get("Range", "")))
        status, headers, body = self._find(path)
        start = 0
        if status == 200 and (asked := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))):
            start, status = int(asked[1]), 206
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        self.send_response(status)
        for name, text in {"Content-Length": str(len(body) - start), **headers}.items():
            self.send_header(name, text)
        self.end_headers()
        if not with_body:
            return
        repository = self.hub.repositories.get("/".join(path.split("/")[1:3]))
        name = path.partition(f"/resolve/{COMMIT}/")[2]
        if repository is not None and repository.cuts.get(name, 0) > 0:
            repository.cuts[name] -= 1
            self.wfile.write(body[start : (start + len(body)) // 2])
            self.close_connection = True
            return
        self.wfile.write(body[start:])

    def _find(self, path: str) -> tuple[int, dict[str, str], bytes]:
        words = path.removeprefix("/api/models/").strip("/").split("/")
        repo_id, action = "/".join(words[:2]), words[2:]
        repository = self.hub.repositories.get(repo_id)
        is_known = self.headers.get("Authorization") == "Bearer secret"
        if repository is None or (repository.is_private and not is_known):
            return 401, {"X-Error-Code": "RepoNotFound"}, b""
        if path.startswith("/api/"):
            return self._describe(repo_id, repository, action)
        if repository.is_gated:
            return 403, {"X-Error-Code": "GatedRepo"}, b""
        data = repository.files.get(path.removeprefix(f"/{repo_id}/resolve/{COMMIT}/"))
        if data is None:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        return 200, {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'}, data

    def _describe(
        self, repo_id: str, repository: Repository, action: list[str]
    ) -> tuple[int, dict[str, str], bytes]:
        if action[:1] == ["tree"] and action[1:2] == [COMMIT]:
            return _json(
                [
                    {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for name, data in repository.files.items()
                ]
            )
        if action in ([], ["revision", "main"], ["revision", "v2"]):
            siblings = [{"rfilename": name} for name in repository.files]
            return _json({"id": repo_id, "sha": COMMIT, "siblings": siblings})
        return 404, {"X-Error-Code": "RevisionNotFound"}, b""


def _json(value: Any) -> tuple[int, dict[str, str], bytes]:
    return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()


@contextlib.contextmanager
def running_hub(repositories: Mapping[str, Repository]) -> Iterator[Hub]:
    """Run a hub with these repositories, keyed by their ids."""
    hub = Hub("", repositories)
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        hub.address = f"http://127.0.0.1:{server.server_port}"
        yield hub
        server.shutdown()
        thread.join()


@contextlib.contextmanager
def fake_hub() -> Iterator[str]:
    """Run a hub with one private repository, `org/model`; yield its address."""
    with running_hub({"org/model": Repository(FILES, is_private=True)}) as hub:
        yield hub.address
