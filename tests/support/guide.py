"""Run the commands of a document in order, with the servers that it starts, as a reader would.

A block that begins with `tgi-asgi` or `hypercorn` starts a server with each of its commands. Each server must
become healthy and exit with 0; the last one stays for the following blocks. Blocks before the first such
block use a server with the demonstration model. Free ports replace 3000 and 8080.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import httpx

from tests.support.documents import ROOT, Block, blocks_of
from tests.support.forked import KEPT_VARIABLES
from tests.support.hub_stand_ins import StandIns
from tests.support.server_process import ServerProcess, free_port

_TIMEOUT_S = 240  # the machine may be busy
_NODE = ROOT / "tests/server/node/node_modules"
_SERVER = re.compile(
    r"(?:[A-Z_]+=\S+ )*(?:tgi-asgi|text-generation-launcher|hypercorn)(?= |$)(?! (?:--help|--version|[a-z]))"
)
_ADDRESS = re.compile(r"(localhost|127\.0\.0\.1|0\.0\.0\.0):(?:3000|8080)\b")
_BIN = str(Path(sys.executable).parent)


def is_server(block: Block) -> bool:
    """Return whether a block starts servers."""
    return block.language == "shell" and _SERVER.match(block.text) is not None


class Guide:
    """One document with its own folder; later blocks find the files that earlier blocks wrote."""

    def __init__(
        self, page: str, folder: Path, demo: Callable[[], ServerProcess], stand_ins: StandIns
    ) -> None:
        self._blocks = blocks_of(page)
        self._demo, self._stand_ins = demo, stand_ins
        # These two documents say that their commands run in the repository's root.
        self._folder = ROOT if page in ("CONTRIBUTING.md", "bench/README.md") else folder
        (folder / ".curlrc").write_text("silent\nshow-error\nfail-with-body\n", encoding="utf-8")
        self._environ = {
            **{name: value for name, value in os.environ.items() if name in KEPT_VARIABLES},
            "PATH": f"{_BIN}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "CURL_HOME": str(folder),
        }
        self._server: ServerProcess | None = None
        self._started: Block | None = None
        self._done: set[Block] = set()

    def run(self, block: Block) -> None:
        """Run a block after the blocks that it depends on.

        Raises:
            AssertionError: if a command fails, prints nothing where output is expected, or a server does not
                serve.
        """
        if block in self._done:
            return
        earlier = [each for each in self._blocks if each.line < block.line and each.reason is None]
        for each in earlier:  # files and keys that later blocks need
            if each.language == "shell" and not is_server(each) and "curl" not in each.text:
                self.run(each)
        if is_server(block):
            self._serve(block)
        else:
            started = [each for each in earlier if is_server(each)]
            if started and self._started != started[-1]:
                self._serve(started[-1])
            self._call(block)
        self._done.add(block)

    def close(self) -> None:
        """Stop the server that the document started last."""
        stopped, self._server = self._server, None
        if stopped is not None:
            with stopped as server:
                server.signal()
                assert server.wait() == 0, server.output()

    def _serve(self, block: Block) -> None:
        for command in re.sub(r"\\\n\s*", "", block.text).splitlines():
            self.close()
            self._stand_ins.make_for(command)
            self._server = self._start(command)
            self._server.wait_until_healthy()
        self._started = block

    def _start(self, command: str) -> ServerProcess:
        assert _SERVER.match(command), f"not a server: {command}"
        port = free_port()
        command = re.sub(r"--port \d+", f"--port {port}", _ADDRESS.sub(rf"\1:{port}", command))
        uds = re.search(r"--uds (\S+)", command)
        server = ServerProcess(
            command,
            program=("/bin/bash", "-c"),
            cwd=self._folder,
            port=port,
            environ={**self._environ, **self._stand_ins.environ},
            client=partial(_client, str(self._folder / uds[1]) if uds else None),
        )
        if "--ssl-certfile" in command:
            server.url = server.url.replace("http:", "https:")
        return server

    def _call(self, block: Block) -> None:
        port = (self._server or self._demo()).port
        self._stand_ins.make_for(block.text)  # an adapter that a request loads
        text = _ADDRESS.sub(rf"\1:{port}", block.text).replace(".venv/bin/", f"{_BIN}/")
        done = subprocess.run(
            self._command(block.language, text),
            cwd=self._folder,
            env=self._environ,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
        assert done.returncode == 0, f"{block}: {done.returncode}\n{text}\n{done.stdout}\n{done.stderr}"
        if re.search(r"curl|print\(|console\.log", text):
            assert done.stdout.strip(), f"{block} prints nothing\n{done.stderr}"

    def _command(self, language: str, text: str) -> list[str]:
        if language == "shell":
            return ["/bin/bash", "-euo", "pipefail", "-c", text]
        if language == "python":
            return [sys.executable, "-W", "error::DeprecationWarning:__main__", "-c", text]
        script = self._folder / "example.mjs"
        script.write_text(text, encoding="utf-8")
        modules = self._folder / "node_modules"
        if not modules.exists():
            modules.symlink_to(_NODE)
        return [shutil.which("node") or "node", str(script)]


def _client(uds: str | None) -> httpx.Client:
    """Return a client that trusts every certificate, since the documents make their own.

    Raises:
        httpx.ConnectError: if the Unix socket has no listener (httpx would leave its own socket open).
    """
    if uds is not None:
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(uds)
            except OSError as error:
                raise httpx.ConnectError(str(error)) from None
    return httpx.Client(transport=httpx.HTTPTransport(verify=False, uds=uds))
