"""The container image, tested without a container engine: its Dockerfile, and its steps in a clean folder."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
import venv
from pathlib import Path
from types import ModuleType

import pytest
from setuptools._distutils import filelist

from tests.support.installing import copy_context

ROOT = Path(__file__).parent.parent
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
SCRIPTS = sorted((ROOT / "docker").glob("*.sh"))


def _instructions() -> list[tuple[str, str]]:
    lines = [line for line in DOCKERFILE.splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in joined.splitlines() if line.strip()]


def _final_stage() -> dict[str, str]:
    """Return the last stage's instructions by name; the last of each kind wins, as in an image."""
    instructions = _instructions()
    last = max(i for i, (name, _) in enumerate(instructions) if name == "FROM")
    return dict(instructions[last:])


@pytest.fixture(scope="module")
def healthcheck() -> ModuleType:
    spec = importlib.util.spec_from_file_location("healthcheck", ROOT / "docker" / "healthcheck.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_starts_as_tgis_image_does() -> None:
    stage = _final_stage()
    assert json.loads(stage["ENTRYPOINT"]) == ["tgi-asgi"]
    assert "CMD" not in stage  # flags, or SageMaker's `serve`, follow the image's name
    environment = dict(re.findall(r"(\w+)=(\S+)", stage["ENV"]))
    assert environment["PORT"] == stage["EXPOSE"] == "80"
    assert environment["HF_HOME"] == stage["VOLUME"] == "/data"
    for name in ("HOME", "TMPDIR", "TGI_ASGI_CACHE", "HF_HOME"):  # the root file system may be read-only
        assert environment[name].startswith("/data")
    assert environment["PATH"].startswith("/opt/tgi-asgi/bin:")
    assert "healthcheck.py" in stage["HEALTHCHECK"]


def test_both_stages_of_a_device_have_one_system() -> None:
    stages = {name: image for image, name in re.findall(r"^FROM (\S+) AS (\S+)$", DOCKERFILE, re.MULTILINE)}
    assert stages["build-cpu"] == stages["run-cpu"] == "${BASE}"
    systems = [stages[f"{stage}-cuda"].rpartition("-")[2] for stage in ("build", "run")]
    assert systems == ["${CUDA_SYSTEM}"] * 2
    assert "devel" in stages["build-cuda"]


def test_a_source_distribution_has_all_that_is_compiled() -> None:
    found = filelist.FileList()
    found.findall(str(ROOT / "csrc"))
    found.allfiles = [os.path.relpath(name, ROOT) for name in found.allfiles or ()]
    for line in (ROOT / "MANIFEST.in").read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            found.process_template_line(line)
    tracked = subprocess.run(
        ["git", "ls-files", "csrc"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.splitlines()
    assert set(tracked) <= set(found.files)


def test_the_context_has_all_that_the_build_copies_and_nothing_else_of_weight(tmp_path: Path) -> None:
    copy_context(tmp_path)
    for name, argument in _instructions():
        if name == "COPY" and "--from" not in argument:
            for source in argument.replace("${WHEELS}", "docker/wheels").split()[:-1]:
                assert (tmp_path / source).exists(), f"COPY {source}"
    assert (tmp_path / "csrc" / "params.h").exists()
    assert (tmp_path / "tgi_asgi" / "cli.py").exists()
    assert not (tmp_path / "tests").exists()
    for script in SCRIPTS:
        assert os.access(tmp_path / "docker" / script.name, os.X_OK), script.name


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_scripts_parse_and_stop_at_the_first_error(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    assert "set -euo pipefail" in script.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "environ", "url"),
    [
        (["tgi-asgi", "--model-id", "m"], {"PORT": "80"}, "http://127.0.0.1:80/health"),
        (["tgi-asgi", "serve"], {"PORT": "80"}, "http://127.0.0.1:8080/health"),
        (["tgi-asgi", "--port", "81"], {"PORT": "80"}, "http://127.0.0.1:81/health"),
        (["docker-init", "--", "tgi-asgi", "--port=82"], {"PORT": "80"}, "http://127.0.0.1:82/health"),
        (
            ["tgi-asgi", "-p", "83"],
            {"PORT": "80", "HOSTNAME": socket.gethostname()},
            "http://127.0.0.1:83/health",
        ),
        (["tgi-asgi"], {"PORT": "80", "AIP_HTTP_PORT": "84"}, "http://127.0.0.1:84/health"),
        (["tgi-asgi", "--hostname", "::"], {"PORT": "80"}, "http://[::1]:80/health"),
        (["tgi-asgi", "--host", "10.0.0.2"], {"PORT": "80"}, "http://10.0.0.2:80/health"),
        (["tgi-asgi", "--host", "eth1.here"], {"PORT": "80"}, "http://eth1.here:80/health"),
        (["tgi-asgi"], {"PORT": "80", "HOSTNAME": "tgi-service"}, "http://127.0.0.1:80/health"),
        (["tgi-asgi"], {"PORT": "80", "HOSTNAME": "10.0.0.3"}, "http://10.0.0.3:80/health"),
        (["tgi-asgi"], {"PORT": "80", "HOSTNAME": "localhost"}, "http://localhost:80/health"),
        (["tgi-asgi"], {"PORT": "80", "SSL_CERTFILE": "c"}, "https://127.0.0.1:80/health"),
        (["tgi-asgi", "--ssl-certfile=c"], {"PORT": "80"}, "https://127.0.0.1:80/health"),
        (["tgi-asgi", "--ssl_certfile", "a_c"], {"PORT": "80"}, "https://127.0.0.1:80/health"),
        (["tgi-asgi", "--uds", "/run/s"], {"PORT": "80"}, "unix:/run/s"),
        (["tgi-asgi"], {"PORT": "80", "UDS": "/run/s"}, "unix:/run/s"),
    ],
)
def test_the_health_check_asks_where_the_server_listens(
    healthcheck: ModuleType, arguments: list[str], environ: dict[str, str], url: str
) -> None:
    assert healthcheck.health_url(arguments, environ) == url


@pytest.mark.install
def test_the_build_s_steps_make_a_working_server_in_a_clean_folder(tmp_path: Path) -> None:
    """Compile everything, which takes two minutes. Torch and the rest come from this environment."""
    source, prefix = tmp_path / "src", tmp_path / "opt"
    copy_context(source)
    venv.create(prefix, with_pip=True)
    (site,) = prefix.glob("lib/python*/site-packages")
    mine = Path(pytest.__file__).parent.parent
    (site / "here.pth").write_text(str(mine), encoding="utf-8")  # pip finds all requirements satisfied
    environ = {**os.environ, "PYTHON": sys.executable, "TORCH_INDEX": ""}
    environ["PATH"] = f"{Path(sys.executable).parent}:{environ['PATH']}"  # for ninja
    for step in ("environment.sh", "install.sh"):
        run = subprocess.run(
            [f"docker/{step}", "cpu", prefix], cwd=source, env=environ, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stdout + run.stderr
    assert (site / "tgi_asgi").is_dir()
    assert list((site / "tgi_asgi").glob("_C*.so"))
    shown = subprocess.run(
        [prefix / "bin" / "text-generation-launcher", "--help"], capture_output=True, text=True
    )
    assert "--model-id" in shown.stdout
