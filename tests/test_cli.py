"""The command line: options generated from the settings, precedence, help, errors in one line."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner, Result

from tgi_asgi import __version__
from tgi_asgi import cli as cli_module
from tgi_asgi.cli import make_command
from tgi_asgi.errors import ModelLoadError
from tgi_asgi.serve import server
from tgi_asgi.settings import DEMO_MODEL, Settings


class _Run:
    """Invokes the command with the server replaced, and records the settings it would have served with."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.settings: Settings | None = None
        self.ended: list[int] = []  # with these codes
        self.error: ModelLoadError | None = None
        monkeypatch.setattr(server, "run", self._serve)
        monkeypatch.setattr("os._exit", self.ended.append)
        for spec in dataclasses.fields(Settings):
            monkeypatch.delenv(spec.name.upper(), raising=False)

    def _serve(self, settings: Settings) -> int:
        self.settings = settings
        if self.error is not None:
            raise self.error
        return 0

    def __call__(self, *arguments: str, **environ: str) -> Result:
        return CliRunner(env=environ).invoke(make_command(), arguments)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, restored_loggers: None) -> _Run:
    return _Run(monkeypatch)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--port", "8080"], {"port": 8080}),
        (["-p", "8080", "-g", "5"], {"port": 8080, "graceful_termination_timeout": 5}),
        (["--host", "127.0.0.1"], {"hostname": "127.0.0.1"}),
        (["--uds", "/run/socket"], {"uds": "/run/socket"}),
        (["--ssl-certfile", "c", "--ssl-keyfile", "k"], {"ssl_certfile": "c", "ssl_keyfile": "k"}),
        (
            ["--drain-delay", "5", "--first-event-timeout", "0"],
            {"drain_delay_s": 5.0, "first_event_timeout_s": 0},
        ),
        (["--max-batch-size", "4"], {"max_batch_size": 4}),
        (["--max_batch_size=4"], {"max_batch_size": 4}),
        (["--api-key", "a", "--api-key", "b"], {"api_key": ("a", "b")}),
        (["--no-prefix-cache", "--json-output"], {"prefix_cache": False, "json_output": True}),
        (["--dtype", "float32", "--target-inter-token-ms", "20"], {"dtype": "float32"}),
    ],
)
def test_flags_become_settings(run: _Run, arguments: list[str], expected: dict[str, object]) -> None:
    result = run("--model-id", "m", *arguments)
    assert result.exit_code == 0, result.output
    assert run.settings is not None
    assert {name: getattr(run.settings, name) for name in expected} == expected


def test_every_setting_is_an_option_with_help() -> None:
    options = {option.name: option for option in make_command().params}
    for spec in dataclasses.fields(Settings):
        option = options[spec.name]
        assert f"--{spec.name.replace('_', '-')}" in option.opts
        assert isinstance(option, click.Option) and option.help is not None
        assert spec.metadata["help"] in option.help


def test_variables_are_read_and_flags_win(run: _Run) -> None:
    assert run("--port", "2", MODEL_ID="m", PORT="1", MAX_BATCH_SIZE="9").exit_code == 0
    assert run.settings == Settings(model_id="m", port=2, max_batch_size=9)
    assert run("--port", "2", MODEL_ID="m", PORT="not read").exit_code == 0


def test_a_flag_turns_off_what_a_variable_turned_on(run: _Run) -> None:
    assert run("--no-json-output", MODEL_ID="m", JSON_OUTPUT="true").exit_code == 0
    assert run.settings is not None
    assert run.settings.json_output is False


def test_without_a_model_it_says_that_it_serves_the_demonstration_model(run: _Run) -> None:
    result = run()
    assert result.output.count("\n") == 1
    assert DEMO_MODEL in result.output
    assert run.settings == Settings(model_id=DEMO_MODEL)


def test_with_json_output_every_line_is_an_object(run: _Run) -> None:
    run.error = ModelLoadError("no such model")
    result = run("--json-output")
    lines = [json.loads(line) for line in result.output.splitlines()]
    assert [line["level"] for line in lines] == ["INFO", "ERROR"]
    assert DEMO_MODEL in lines[0]["message"]
    assert lines[1]["message"] == "no such model"
    assert run.ended[0] == 1


def test_help_lists_the_options_by_group() -> None:
    text = CliRunner().invoke(make_command(), ["--help"]).output
    headings = [line for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert headings == [
        "Model:", "Server:", "Limits:", "Engine:", "TGI launcher:", "Other:", "Commands:"
    ]  # fmt: skip
    assert "--no-json-output" not in text
    assert "default: 3000" in text


def test_help_describes_the_form_that_it_shows() -> None:
    """A switch that is on has both forms and its default: its text is not that of its `--no-` form."""
    text = " ".join(CliRunner().invoke(make_command(), ["--help"]).output.split())
    assert "--prefix-cache / --no-prefix-cache Reuse the KV blocks of earlier prompts. [default: on]" in text
    assert "[auto|int8|fp8_e4m3fn|fp8_e5m2]" in text, "choices as variables and the documents spell them"
    assert "429 (0: any). [default: 0]" in text


@pytest.mark.parametrize("name", cli_module.COMMANDS)
def test_a_command_beside_the_server_has_help_and_takes_no_flags_of_it(run: _Run, name: str) -> None:
    assert f"tgi-asgi {name}" in run(name, "--help").output.replace("root", "tgi-asgi")
    result = run("--port", "80", name, "--help")
    assert result.exit_code == 2
    assert f"--port must come after {name}" in result.output
    assert run.settings is None


def test_another_word_is_no_command_and_starts_no_server(run: _Run) -> None:
    result = run("benchmrak")
    assert result.exit_code == 2
    assert "No such command 'benchmrak'; use --model-id for a model name without a slash" in result.output
    assert run.settings is None


@pytest.mark.parametrize(
    "model", ["org/name", "org/name-GGUF:Q4_K_M", "./folder", "m.gguf", "pypi:package==1.0", "benchmark/m"]
)
def test_a_word_with_a_slash_is_the_model(run: _Run, model: str) -> None:
    assert run(model).exit_code == 0
    assert run.settings == Settings(model_id=model)
    for arguments in ([model, "--port", "80"], ["--port", "80", model], ["-p80", model, "--no-web-pages"]):
        assert run(*arguments, MODEL_ID="another/one").exit_code == 0
        assert run.settings is not None
        assert (run.settings.model_id, run.settings.port) == (model, 80)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a/b", "c/d"], "two models given: a/b and c/d"),
        (["a/b", "--model-id", "c/d"], "two models given: a/b and c/d"),
        (["--model-id", "a/b", "c/d"], "two models given: c/d and a/b"),
        (["a/b", "benchmrak"], "No such command 'benchmrak'"),
        (["serve", "a/b"], "serving needs no command: tgi-asgi a/b"),
        (["a/b", "benchmark"], "--model-id must come after benchmark"),
        (["a/b", "--prot", "80"], "No such option"),
    ],
)
def test_a_model_is_named_once_and_beside_no_command(run: _Run, arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert run.settings is None


@pytest.mark.parametrize("model", [["--model-id", "a/b"], ["a/b"]])
def test_adapters_follow_their_flag_one_after_the_other_as_in_vllm(run: _Run, model: list[str]) -> None:
    modules = ("sql=/adapters/sql", "js=org/js", '{"name": "c", "path": "/c"}')
    for arguments in (
        [*model, "--lora-modules", *modules],
        ["--lora-modules", *modules, "--enable-lora", *model],
        [*model, "--lora-modules", *modules[:2], "--lora-modules", modules[2]],
        ["--lora-modules", *modules, *model],
        [*model, f"--lora-modules={modules[0]}", *modules[1:]],
        [*model, "--lora_modules", *modules],
    ):
        assert run(*arguments).exit_code == 0
        assert run.settings is not None
        assert (run.settings.model_id, run.settings.lora_modules) == ("a/b", modules)


def test_version() -> None:
    assert CliRunner().invoke(make_command(), ["--version"]).output == f"tgi-asgi, version {__version__}\n"


def test_env_prints_versions_and_settings_without_keys(run: _Run) -> None:
    text = run("--env", "--model-id", "m", "--api-key", "secret", "--port", "1234").output
    assert "Python" in text
    assert "torch 2." in text
    assert "port=1234" in text
    assert "secret" not in text


@pytest.mark.parametrize(
    ("arguments", "environ", "message"),
    [
        (["--port", "x"], {}, "'x' is not a valid integer"),
        (["--port", "70000"], {}, "--port must be in 0..65535"),
        (["--prot", "1"], {}, "--port"),
        (["--dtype", "int3"], {}, "'int3' is not one of"),
        (["--api-key", ""], {}, "--api-key must not be empty"),
        ([], {"PORT": "x"}, "PORT='x' is not a valid int"),
        ([], {"LOG_LEVEL": "loud"}, "--log-level must be one of debug, info, warn, error, got 'loud'"),
        (["--max-input-tokens", "9", "--max-total-tokens", "9"], {}, "--max-input-tokens must be below"),
    ],
)
def test_a_wrong_option_is_one_line_and_exit_code_2(
    run: _Run, arguments: list[str], environ: dict[str, str], message: str
) -> None:
    result = run(*arguments, **environ)
    assert result.exit_code == 2
    assert message in result.output.splitlines()[-1]
    assert "Traceback" not in result.output
    assert run.settings is None


def test_an_option_of_the_launcher_is_ignored_with_a_warning(run: _Run) -> None:
    result = run("--model-id", "m", "--cuda-graphs", "1", "--disable-usage-stats")
    assert result.exit_code == 0
    lines = result.stderr.splitlines()
    assert "WARNING --disable-usage-stats is ignored: " in "".join(lines)
    assert "WARNING --cuda-graphs is ignored: " in "".join(lines)
    assert len(lines) == 2
    assert run.settings == Settings(model_id="m")


def test_an_option_that_would_be_missed_is_refused(run: _Run) -> None:
    result = run("--model-id", "m", "--sharded", "true")
    assert result.exit_code == 2
    assert "--sharded=true is not supported" in result.output


def test_sagemaker_s_one_argument_means_its_port_and_its_variables(
    run: _Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["tgi-asgi", "serve"])
    monkeypatch.setattr(cli_module, "end_on_signals", lambda: None)
    for name in ("PORT", "MODEL_ID", "HF_MODEL_ID"):  # monkeypatch then restores them
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("HF_MODEL_ID", "org/name")
    with pytest.raises(SystemExit):
        cli_module.main()
    assert run.settings == Settings(model_id="org/name", port=8080)


def test_a_model_that_cannot_be_loaded_is_one_line_and_exit_code_1(run: _Run) -> None:
    run.error = ModelLoadError("m.gguf is cut short")
    result = run("--model-id", "m.gguf")
    assert run.ended[0] == 1
    assert result.output == "tgi-asgi: m.gguf is cut short\n"


@pytest.mark.parametrize("name", ["tgi_asgi", "tgi_asgi.cli"])
def test_the_module_runs_as_a_command(name: str) -> None:
    shown = subprocess.check_output([sys.executable, "-m", name, "--version"], text=True)
    assert shown == f"tgi-asgi, version {__version__}\n"
