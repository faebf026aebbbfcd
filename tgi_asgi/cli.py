"""The `tgi-asgi` command: flags and environment to `Settings`, then `server.run`.

The options are made from the fields of `Settings`, so that a setting is written down once.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import logging
import os
import platform
import sys
from typing import Any

import click

from tgi_asgi import __version__
from tgi_asgi.errors import InvalidRequest, TgiError
from tgi_asgi.observe import logs
from tgi_asgi.serve.launcher_compat import (
    OPTIONS,
    CompatOption,
    Treatment,
    apply_paths,
    check_options,
    environment_changes,
    is_sagemaker,
)
from tgi_asgi.serve.process import end_process
from tgi_asgi.settings import DEMO_MODEL, Settings

logger = logging.getLogger(__name__)

_TYPES: dict[str, click.ParamType[Any]] = {"int": click.INT, "float": click.FLOAT, "str": click.STRING}
_METAVARS = {"int": "N", "float": "X", "str": "TEXT"}


class _GroupedCommand(click.Command):
    """A command whose help lists the options under the settings' groups."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for option in self.get_params(ctx):
            record = option.get_help_record(ctx)
            if record is not None:
                groups.setdefault(getattr(option, "group", "Other"), []).append(record)
        for name, records in groups.items():
            with formatter.section(name):
                formatter.write_dl(records)


class _SettingOption(click.Option):
    """The option of one field of `Settings`; None if it was not given."""

    def __init__(self, spec: dataclasses.Field[Any]) -> None:
        kind = str(spec.type)
        name = spec.name.replace("_", "-")
        extra: dict[str, Any] = {}
        if kind == "bool":
            flag = f"--{name}/--no-{name}"
        else:
            flag = f"--{name}"
            choices = spec.metadata["choices"]
            extra["type"] = click.Choice(choices) if choices else _TYPES[_base_type(kind)]
            extra["metavar"] = (
                None if choices else spec.metadata["kind"].metavar or _METAVARS[_base_type(kind)]
            )
            extra["multiple"] = kind.startswith("tuple")
        self.group = spec.metadata["group"]
        self._is_on = spec.default is True
        super().__init__([flag, *spec.metadata["flags"], spec.name], help=_help(spec), **extra)

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """Show the one form of a switch that changes its default."""
        record = super().get_help_record(ctx)
        if record is None or not self.is_bool_flag:
            return record
        on, off = record[0].split(" / ")
        return (off if self._is_on else on, record[1])

    def get_default(self, ctx: click.Context, call: bool = True) -> None:
        """Give none: what is not given is left to the environment, and then to `Settings`."""
        return None


class _LauncherOption(click.Option):
    """An option of TGI's launcher that is no setting here: ignored with a warning, or refused."""

    group = "Of TGI's launcher"

    def __init__(self, option: CompatOption) -> None:
        refused = option.treatment is Treatment.REFUSED
        form: dict[str, Any] = (
            {"is_flag": True, "flag_value": "true"} if option.is_switch else {"metavar": "X"}
        )
        text = f"{'Refused' if refused else 'Ignored'}: {option.reason}."
        super().__init__([option.flag, option.name], default=None, help=text, **form)


_PATHS = {
    "huggingface_hub_cache": "Folder of the Hub's cache, as HF_HUB_CACHE.",
    "weights_cache_override": "Folder with the model's files; --model-id is then only its name.",
}


class _PathOption(click.Option):
    """An option of TGI's launcher that says where files lie."""

    group = "Of TGI's launcher"

    def __init__(self, name: str, text: str) -> None:
        super().__init__([f"--{name.replace('_', '-')}", name], metavar="PATH", help=text)


def _base_type(kind: str) -> str:
    """Return the type of one value: `int` of "int | None", `str` of "tuple[str, ...]"."""
    return kind.removeprefix("tuple[").split(",")[0].split(" ")[0]


def _help(spec: dataclasses.Field[Any]) -> str:
    notes = []
    if spec.default not in (None, (), False, True):
        notes.append(f"default: {spec.default}")
    notes += [f"env also: {variable}" for variable in spec.metadata["env"]]
    text: str = spec.metadata["help"]
    return f"{text}  [{'; '.join(notes)}]" if notes else text


def _run(print_env: bool, **options: Any) -> None:
    names = {spec.name for spec in dataclasses.fields(Settings)}
    given = {name: value for name, value in options.items() if value not in (None, ())}
    apply_paths(given, os.environ)
    try:
        settings = Settings.from_environ(
            os.environ, **{name: value for name, value in given.items() if name in names}
        )
        warnings = check_options(given, os.environ)
    except InvalidRequest as error:
        raise click.UsageError(error.message) from None
    logs.configure(settings)
    for warning in warnings:
        logger.warning(warning)
    if print_env:
        click.echo(describe_environment(settings))
    if settings.model_id is None:
        click.echo(f"No --model-id given: serving the demonstration model, {DEMO_MODEL}.")
        settings = dataclasses.replace(settings, model_id=DEMO_MODEL)

    from tgi_asgi.serve import server  # hypercorn and Starlette: `--help` needs neither

    try:
        code = server.run(settings)
    except TgiError as error:
        end_process(error.message, 1)
    end_process(None, code)


def describe_environment(settings: Settings) -> str:
    """Return what a bug report needs: versions, machine, settings (keys masked)."""
    lines = [f"tgi-asgi {__version__}, Python {platform.python_version()}, {platform.platform()}"]
    for package in ("torch", "hypercorn", "uvloop", "starlette", "tokenizers", "transformers"):
        try:
            lines.append(f"  {package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"  {package} is not installed")
    lines += [f"  {len(os.sched_getaffinity(0))} cores", f"  {settings!r}"]
    return "\n".join(lines)


def make_command() -> click.Command:
    """Return the click command, with an option for every setting."""
    options: list[click.Parameter] = [_SettingOption(spec) for spec in dataclasses.fields(Settings)]
    options += [_LauncherOption(option) for option in OPTIONS if option.is_flag]
    options += [_PathOption(name, help) for name, help in _PATHS.items()]
    options.append(
        click.Option(["--env", "-e", "print_env"], is_flag=True, help="Print versions and settings first.")
    )
    command = _GroupedCommand(
        "tgi-asgi",
        params=options,
        callback=_run,
        help="Serve a language model over HTTP: TGI's API and OpenAI's.",
        epilog=(
            "Every option is also read from the environment, in upper snake case (--max-batch-size: "
            "MAX_BATCH_SIZE); the flag wins."
        ),
        context_settings={
            "token_normalize_func": lambda token: token.replace("_", "-"),
            "help_option_names": ["-h", "--help"],
            "max_content_width": 100,
        },
    )
    return click.version_option(__version__, "-V", "--version", prog_name="tgi-asgi")(command)


def main() -> None:
    """Run the command; the entry point of `tgi-asgi` and of `python -m tgi_asgi`."""
    arguments = sys.argv[1:]
    try:
        os.environ.update(environment_changes(os.environ, arguments))
    except InvalidRequest as error:
        end_process(error.message, 2)
    make_command().main([] if is_sagemaker(arguments) else arguments, prog_name="tgi-asgi")
