"""The `tgi-asgi` command: turns flags and environment into `Settings`, then calls `server.run`.

The options are generated from the fields of `Settings`, so each setting is declared once. Subcommands such as
`tgi-asgi benchmark` are modules of `commands/`.
"""

from __future__ import annotations

import dataclasses
import importlib
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
from tgi_asgi.serve import launcher_compat
from tgi_asgi.serve.launcher_compat import CompatOption
from tgi_asgi.serve.process import end_on_signals, end_process, open_standard_streams, say
from tgi_asgi.settings import DEMO_MODEL, Settings, flag_of
from tgi_asgi.system import num_processors

logger = logging.getLogger(__name__)

_TYPES = {"int": (int, "N"), "float": (float, "X"), "str": (str, "TEXT")}
_LAUNCHER = "TGI launcher"
_LORA_MODULES = flag_of("lora_modules")
PATHS = {
    "huggingface_hub_cache": "Hugging Face Hub cache folder, like HF_HUB_CACHE.",
    "weights_cache_override": "Folder with the model files; --model-id is then only the model's name.",
}


COMMANDS = ("download-weights", "benchmark")


class _Program(click.Group):
    """The server command, whose help lists options by settings group, and its subcommands.

    Subcommands are imported only when used, because the server needs none of them. A word that cannot be a
    subcommand is the model: `tgi-asgi org/name --port 80`.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        args, model = _one_module_each(args), None
        while rest := self.make_parser(ctx).parse_args(list(args))[1]:
            if not _names_model(rest[0]):
                break
            if model is not None:
                raise click.UsageError(f"two models given: {model} and {rest[0]}", ctx)
            model = rest[0]
            del args[len(args) - len(rest)]
        rest = super().parse_args(ctx, args)
        if model is not None:
            if ctx.params.get("model_id") is not None:
                raise click.UsageError(f"two models given: {model} and {ctx.params['model_id']}", ctx)
            ctx.params["model_id"] = model
        return rest

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] == "serve" and len(args) > 1:  # as vLLM has it; a lone `serve` is SageMaker's
            ctx.fail(f"serving needs no command: tgi-asgi {' '.join(args[1:])}")
        if args[0] not in COMMANDS:
            ctx.fail(f"No such command {args[0]!r}; use --model-id for a model name without a slash")
        return super().resolve_command(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"tgi_asgi.commands.{cmd_name.replace('-', '_')}")
        command: click.Command = module.command
        return command

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for option in self.get_params(ctx):
            if record := option.get_help_record(ctx):
                groups.setdefault(getattr(option, "group", "Other"), []).append(record)
        for name, records in groups.items():
            with formatter.section(name):
                formatter.write_dl(records)
        self.format_commands(ctx, formatter)


def _names_model(word: str) -> bool:
    """Return whether a word names a model; commands have neither a slash nor a suffix."""
    return "/" in word or word.startswith("pypi:") or word.lower().endswith(".gguf")


def _one_module_each(args: list[str]) -> list[str]:
    """Return arguments with --lora-modules before each of its values: vLLM's takes several in a row."""
    found: list[str] = []
    num_values: int | None = None  # since the flag
    for word in args:
        is_another = bool(num_values) and not word.startswith("-") and ("=" in word or word.startswith("{"))
        found += [_LORA_MODULES, word] if is_another else [word]
        if launcher_compat.spelled_flag(word) == _LORA_MODULES:
            num_values = int("=" in word)
        elif num_values is not None:
            num_values = num_values + 1 if is_another or not num_values else None
    return found


class _Option(click.Option):
    """An option with a group. Its value is None if not given, so the environment and `Settings` decide."""

    def __init__(self, group: str, *names: str, is_on: bool = False, **form: Any) -> None:
        super().__init__(names, default=None, **form)
        self.group = group
        self._is_on = is_on

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """Show a switch that is off without its `--no-` form."""
        record = super().get_help_record(ctx)
        if record is None or not self.secondary_opts or self._is_on:
            return record
        return record[0].split(" / ")[0], record[1]


def _setting_option(spec: dataclasses.Field[Any]) -> _Option:
    flag, given = flag_of(spec.name), spec.metadata
    names = (*given["flags"], spec.name)
    default = {"None": "", "()": "", "False": "", "True": "on"}.get(str(spec.default), str(spec.default))
    notes = [f"default: {default}"] if default else []
    notes += [f"env also: {variable}" for variable in given["env"]]
    help = f"{given['help']}  [{'; '.join(notes)}]" if notes else given["help"]
    if spec.type == "bool":
        switch = f"{flag}/--no-{flag[2:]}"
        return _Option(given["group"], switch, *names, help=help, is_on=spec.default is True)
    kind = str(spec.type)  # "int | None", "tuple[str, ...]"
    base, metavar = _TYPES[kind.removeprefix("tuple[").split(",")[0].split(" ")[0]]
    form: dict[str, Any] = {"type": base, "metavar": given["kind"].metavar or metavar}
    if given["choices"]:
        # click would show dashes for underscores, which variables do not accept.
        form = {"type": click.Choice(given["choices"]), "metavar": f"[{'|'.join(given['choices'])}]"}
    return _Option(given["group"], flag, *names, help=help, multiple=kind.startswith("tuple"), **form)


def _launcher_option(option: CompatOption) -> _Option:
    fate = "Refused" if option.is_refused else "Ignored"
    form: dict[str, Any] = {"is_flag": True, "flag_value": "true"} if option.is_switch else {"metavar": "X"}
    return _Option(_LAUNCHER, flag_of(option.name), help=f"{fate}: {option.reason}.", **form)


def _run(print_env: bool, **options: Any) -> None:
    context = click.get_current_context()
    if context.invoked_subcommand is not None:
        if misplaced := [name for name, value in options.items() if value not in (None, ())]:
            raise click.UsageError(f"{flag_of(misplaced[0])} must come after {context.invoked_subcommand}")
        return
    names = {spec.name for spec in dataclasses.fields(Settings)}
    given = {name: value for name, value in options.items() if value not in (None, ())}
    launcher_compat.apply_paths(given, os.environ)
    try:
        settings = Settings.from_environ(os.environ, **{name: given[name] for name in names & given.keys()})
        warnings = launcher_compat.check_options(given, os.environ, settings.num_shard)
    except InvalidRequest as error:
        raise click.UsageError(error.message) from None
    logs.configure(settings)
    for warning in warnings:
        logger.warning(warning)
    if print_env:
        say(describe_environment(settings))
    if settings.model_id is None:
        note = f"No --model-id given: serving the demonstration model, {DEMO_MODEL}."
        if settings.json_output:
            logger.info(note)
        else:
            say(note)
        settings = dataclasses.replace(settings, model_id=DEMO_MODEL)

    from tgi_asgi.serve import server  # hypercorn and Starlette, which `--help` does not need

    try:
        code = server.run(settings)
    except TgiError as error:
        end_process(error.message, 1, is_logged=settings.json_output)
    end_process(None, code)


def describe_environment(settings: Settings) -> str:
    """Return the details for a bug report: versions, machine and settings, with keys masked."""
    lines = [f"tgi-asgi {__version__}, Python {platform.python_version()}, {platform.platform()}"]
    for package in ("torch", "hypercorn", "uvloop", "starlette", "tokenizers", "transformers"):
        try:
            lines.append(f"  {package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"  {package} is not installed")
    lines += [f"  {num_processors()} cores", f"  {settings!r}"]
    return "\n".join(lines)


def make_command() -> click.Command:
    """Return the click command, with an option for every setting. Without a subcommand it runs the server."""
    options: list[click.Parameter] = [_setting_option(spec) for spec in dataclasses.fields(Settings)]
    options += [_launcher_option(option) for option in launcher_compat.OPTIONS if option.is_flag]
    options += [_Option(_LAUNCHER, flag_of(name), help=help, metavar="PATH") for name, help in PATHS.items()]
    options.append(
        click.Option(["--env", "-e", "print_env"], is_flag=True, help="Print versions and settings first.")
    )
    command = _Program(
        "tgi-asgi",
        invoke_without_command=True,
        subcommand_metavar="[MODEL | COMMAND ...]",
        params=options,
        callback=_run,
        help="Serve a language model over HTTP, by the APIs of OpenAI, Anthropic, Ollama and TGI.",
        epilog=(
            "MODEL is a value for --model-id that contains a slash. Every option is also read from the "
            "environment, in upper snake case (--max-batch-size: MAX_BATCH_SIZE); the flag wins."
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
    open_standard_streams()
    end_on_signals()
    arguments = sys.argv[1:]
    try:
        os.environ.update(launcher_compat.environment_changes(os.environ, arguments))
    except InvalidRequest as error:
        end_process(error.message, 2)
    make_command().main([] if launcher_compat.is_sagemaker(arguments) else arguments, prog_name="tgi-asgi")


if __name__ == "__main__":
    main()
