"""llama.cpp's own sources, as the source package of `llama-cpp-python` carries them: what tests compare with.

    models = llama_cpp_source() / "models"      # vocabularies with test vectors, chat templates
    converter = llama_cpp_source() / "convert_hf_to_gguf.py"

Fetched once into build/ (77 MB over the network); nothing of it is part of this repository.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import re
import shutil
import socket
import tarfile
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

import pytest

RELEASE = "llama_cpp_python-0.3.36"
# pip would have to build the package to download its source, so this is a plain request.
# The address and the hash are those that PyPI states.
URL = (
    "https://files.pythonhosted.org/packages/ec/e9/"
    f"e7de2b0463ea3ffbf0ede6cb21b58c1258a8f6521aae45ca773a59fe7cf3/{RELEASE}.tar.gz"
)
SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
STORE = Path(__file__).parents[2] / "build" / "llama_cpp"
# What is unpacked: the folder's name says so, that a change of this list fetches anew.
MEMBERS = re.compile(
    r"llama_cpp/llama_chat_format\.py"
    r"|vendor/llama\.cpp/(LICENSE|convert_\w+\.py|(conversion|gguf-py|models)/.*|src/llama-vocab\.cpp)"
)
TIMEOUT_S = 60  # of the network's silence


def llama_cpp_source() -> Path:
    """Return the root of llama.cpp's sources (`vendor/llama.cpp`), fetched if they are not there yet.

    Skips the test that asks where there is no network; every other failure is one.
    """
    return package_source() / "vendor" / "llama.cpp"


def package_source() -> Path:
    """Return the root of the package itself, which has templates of its own in `llama_cpp`; else as above."""
    key = hashlib.sha256(f"{SHA256} {MEMBERS.pattern}".encode()).hexdigest()[:8]
    folder = STORE / f"{RELEASE}-{key}"
    if not folder.exists():
        STORE.mkdir(parents=True, exist_ok=True)
        with (STORE / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # let go of when the file closes
            if not folder.exists():
                _fetch(folder)
    return folder


def _fetch(folder: Path) -> None:
    """Download, check and unpack beside `folder`, then put it in place by one rename."""
    for left_over in STORE.glob(".partial-*"):  # of a process that was killed: the lock is ours
        shutil.rmtree(left_over)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=STORE) as partial:
        archive = Path(partial) / "archive"
        try:
            with urllib.request.urlopen(URL, timeout=TIMEOUT_S) as response, archive.open("wb") as file:
                shutil.copyfileobj(response, file, 1 << 20)
        except urllib.error.URLError as error:
            if not _is_offline(error.reason):
                raise
            pytest.skip(f"no network to fetch {RELEASE} with: {error.reason}")
        with archive.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != SHA256:
            raise RuntimeError(f"{URL} has the SHA-256 {digest}, not {SHA256}")
        unpacked = Path(partial) / "unpacked"
        with tarfile.open(archive) as tar:
            for member in tar:
                if member.isfile() and MEMBERS.fullmatch(member.name.removeprefix(RELEASE + "/")):
                    tar.extract(member, unpacked, filter="data")
        (unpacked / RELEASE).rename(folder)


def _is_offline(reason: object) -> bool:
    """Tell whether nothing could be reached at all, as against a server that answers with an error."""
    if isinstance(reason, (ConnectionRefusedError, socket.gaierror)):
        return True
    return isinstance(reason, OSError) and reason.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH)
