"""The Hub, played by a small server on this machine, for huggingface_hub's real client."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
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


class FakeHub(BaseHTTPRequestHandler):
    """Repository `org/model`, private: it wants the token `secret`; revisions `main` and `v2`."""

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def log_message(self, *args: object) -> None:
        """Be quiet."""

    def _answer(self, *, with_body: bool) -> None:
        status, headers, body = self._find(self.path.split("?")[0])
        self.send_response(status)
        for name, text in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, text)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def _find(self, path: str) -> tuple[int, dict[str, str], bytes]:
        if self.headers.get("Authorization") != "Bearer secret" or "/org/model/" not in path:
            return 401, {"X-Error-Code": "RepoNotFound"}, b""
        if path in ("/api/models/org/model/revision/main", "/api/models/org/model/revision/v2"):
            siblings = [{"rfilename": name} for name in FILES]
            return self._json({"id": "org/model", "sha": COMMIT, "siblings": siblings})
        if path.startswith("/api/models/org/model/revision/"):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        if path.startswith(f"/api/models/org/model/tree/{COMMIT}"):
            return self._json(
                [
                    {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for name, data in FILES.items()
                ]
            )
        data = FILES.get(path.removeprefix(f"/org/model/resolve/{COMMIT}/"))
        if data is None:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        return 200, {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'}, data

    def _json(self, value: Any) -> tuple[int, dict[str, str], bytes]:
        return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()


@contextlib.contextmanager
def fake_hub() -> Iterator[str]:
    """Run the fake hub; yield its address."""
    with ThreadingHTTPServer(("127.0.0.1", 0), FakeHub) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()
