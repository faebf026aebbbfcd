"""The image without a container engine: built by buildah in chroots, run by runc, as root on Debian.

Nothing comes from a registry: debootstrap makes the base. If pip needs a certificate bundle on this machine
(PIP_CERT), the base gets it too, as a company's own base image would.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "image"
TOOLS = ("buildah", "debootstrap", "runc")
SUITE = os.environ.get("IMAGE_SUITE", "bookworm")
MIRROR = os.environ.get("IMAGE_MIRROR", "http://deb.debian.org/debian")
BASE, IMAGE = f"localhost/debian:{SUITE}", "localhost/tgi-asgi"
USER = 1000
CERTIFICATES = "/etc/ssl/host-certificates.pem"
_STOP_TIMEOUT_S = 60


def buildah_command(*arguments: object) -> list[str]:
    """Return buildah's command line, with separate storage for these tests."""
    state = ["--storage-driver", "vfs", "--root", FOLDER / "storage", "--runroot", FOLDER / "run"]
    return [str(word) for word in ("buildah", *state, *arguments)]


def buildah(*arguments: object) -> str:
    """Run buildah and return its output; its progress on stderr stays visible."""
    command = buildah_command(*arguments)
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def make_base() -> None:
    """Make the image `BASE` of Debian's smallest variant, unless an earlier run has made it."""
    if BASE in buildah("images", "--format", "{{.Name}}:{{.Tag}}").splitlines():
        return
    root = FOLDER / "root"
    shutil.rmtree(root, ignore_errors=True)
    subprocess.run(["debootstrap", "--variant=minbase", SUITE, str(root), MIRROR], check=True)
    for used_up in ("var/cache/apt/archives", "var/lib/apt/lists"):
        shutil.rmtree(root / used_up)
        (root / used_up / "partial").mkdir(parents=True)
    if certificates := os.environ.get("PIP_CERT"):
        target = root / CERTIFICATES.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(certificates, target)
        (root / "etc/pip.conf").write_text(f"[global]\ncert = {CERTIFICATES}\n", encoding="utf-8")
    container = buildah("from", "scratch")
    buildah("add", "--quiet", container, root, "/")
    buildah("commit", "--quiet", "--rm", container, BASE)
    shutil.rmtree(root)


def build(context: Path, *arguments: str) -> None:
    """Build the CPU image from the files in `context`; `arguments` are buildah's."""
    # The Dockerfile gives DEVICE this default, but buildah 1.28 uses it only if it is passed explicitly.
    base = ("--build-arg", "DEVICE=cpu", "--build-arg", f"BASE={BASE}")
    file = ("--file", ROOT / "Dockerfile")
    buildah("build", "--isolation", "chroot", "--tag", IMAGE, *file, *base, *arguments, context)


def configuration() -> dict[str, Any]:
    """Return the image's configuration: Env, Entrypoint, WorkingDir and so on."""
    inspected = json.loads(buildah("inspect", "--type", "image", IMAGE))
    config: dict[str, Any] = inspected["OCIv1"]["config"]
    return config


@contextmanager
def mounted() -> Iterator[Path]:
    """Mount the image's files on this machine; yield the path, which is valid until the context ends."""
    container = buildah("from", IMAGE)
    try:
        yield Path(buildah("mount", container))
    finally:
        buildah("umount", container)
        buildah("rm", container)


class Container:
    """One run of the image, whose files are in `root`.

    It has user 1000, no capabilities, a read-only root, `data` as /data, and the host's network.
    """

    def __init__(self, root: Path, data: Path, *arguments: str, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self._name = f"tgi-asgi-{os.getpid()}-{port}"
        self._bundle = FOLDER / self._name
        self._bundle.mkdir(parents=True)
        data.mkdir(exist_ok=True)
        os.chown(data, USER, USER)
        config = configuration()
        environ = [*config["Env"], f"PORT={port}"]
        spec = _specification(root, data, [*config["Entrypoint"], *arguments], environ, config["WorkingDir"])
        (self._bundle / "config.json").write_text(json.dumps(spec), encoding="utf-8")
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        command = [*self._runc(), "run", "--bundle", str(self._bundle), self._name]
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
        subprocess.run([*self._runc(), "delete", "--force", self._name], check=False)
        shutil.rmtree(self._bundle)

    def wait_until_healthy(self, limit_s: float) -> float:
        """Wait until /health answers 200; return the seconds that took.

        Raises:
            RuntimeError: if the container has ended.
            TimeoutError: if it does not answer within `limit_s`.
        """
        start = time.monotonic()
        while time.monotonic() - start < limit_s:
            if self._process is None or self._process.poll() is not None:
                raise RuntimeError("the container has ended")
            try:
                if httpx.get(f"{self.url}/health").status_code == 200:
                    return time.monotonic() - start
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        raise TimeoutError(f"not healthy within {limit_s:g} s")

    def execute(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command inside, as `docker exec` does."""
        words = [*self._runc(), "exec", self._name, *command]
        return subprocess.run(words, capture_output=True, text=True, check=False)

    def stop(self) -> int:
        """Send SIGTERM, as `docker stop` does; return the exit status."""
        assert self._process is not None
        subprocess.run([*self._runc(), "kill", self._name, "TERM"], check=True)
        return self._process.wait(_STOP_TIMEOUT_S)

    def _runc(self) -> list[str]:
        return ["runc", "--root", str(FOLDER / "runc")]


def _specification(
    root: Path, data: Path, arguments: list[str], environ: list[str], folder: str
) -> dict[str, Any]:
    """Return runc's configuration: its own default, with the host's network and a read-only root."""
    subprocess.run(["runc", "spec", "--bundle", str(data)], check=True)
    path = data / "config.json"
    spec: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    path.unlink()
    process = spec["process"]
    process |= {"terminal": False, "user": {"uid": USER, "gid": USER}, "args": arguments, "cwd": folder}
    process |= {"env": environ, "noNewPrivileges": True}
    process["capabilities"] = {kind: [] for kind in process["capabilities"]}
    process.pop("rlimits", None)
    spec["root"] = {"path": str(root), "readonly": True}
    # With the host's network a container has no /sys of its own, and control groups may not be mountable.
    kept = ("/proc", "/dev", "/dev/pts", "/dev/shm", "/dev/mqueue")
    spec["mounts"] = [mount for mount in spec["mounts"] if mount["destination"] in kept]
    spec["mounts"] += [
        _bound("/sys", "/sys", "ro"),
        _bound(str(data), "/data", "rw"),
        _bound("/etc/resolv.conf", "/etc/resolv.conf", "ro"),
    ]
    kinds = spec["linux"]["namespaces"]
    spec["linux"]["namespaces"] = [kind for kind in kinds if kind["type"] not in ("network", "cgroup")]
    spec["linux"].pop("resources", None)
    return spec


def _bound(source: str, destination: str, mode: str) -> dict[str, Any]:
    return {"destination": destination, "type": "bind", "source": source, "options": ["rbind", mode]}
