"""The served model, assembled from the settings: files, runner, tokenizer, engine and adapters.

`app.py` calls `load_model` in the loading thread, unless it was given another loader. Most imports are inside
the functions, because the server answers `/health` before they are done, and only some models need torch.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from tgi_asgi.api.context import NO_NAMES
from tgi_asgi.api.served import Served
from tgi_asgi.errors import ModelLoadError
from tgi_asgi.settings import Settings
from tgi_asgi.types import Adapters, Progress

if TYPE_CHECKING:
    from tgi_asgi.formats.sources import AdapterSource
    from tgi_asgi.runner.load import LoadedModel

logger = logging.getLogger(__name__)

# In the ImportError of an extension that has no kernels for this machine: csrc/bindings/module.cpp.
_NO_KERNELS = ("TGI_ISA", "lacks the kernels")


def load_model(settings: Settings, progress: Progress) -> Served:
    """Find, read and warm up the model, in the loading thread. Imports torch only if the model needs it.

    Raises:
        ModelLoadError: if it cannot be found, read or served.
    """
    from tgi_asgi.formats.sources import resolve

    files = resolve(settings, progress)
    named = named_adapters(settings, files.model_id)
    progress("loading libraries", 0, None)
    from tgi_asgi.engine.engine import Engine

    try:
        from tgi_asgi.runner.load import load
    except ImportError as error:
        if not any(words in str(error) for words in _NO_KERNELS):
            raise
        raise ModelLoadError(str(error)) from None

    loaded = load(settings, files, progress)
    _warn_guessed_tool_format(settings, loaded)
    engine = Engine(loaded.runner, loaded.tokenizer, settings, loaded.info)
    if loaded.shards is not None:
        loaded.shards.others.watch(engine.mark_lost)
    return Served(
        engine, loaded.tokenizer, loaded.chat_template, loaded.info, engine.stats, loaded.image_processor,
        make_adapters(settings, loaded, named),
    )  # fmt: skip


def named_adapters(settings: Settings, model_id: str) -> list[AdapterSource]:
    """Return the adapters named in the settings; called before the model is read, which may take minutes.

    Raises:
        ModelLoadError: if an adapter option is malformed, or a name refers to the model itself.
    """
    from tgi_asgi.formats.sources import adapter_sources

    sources = adapter_sources(settings)
    for source in sources:
        if source.name in (*NO_NAMES, model_id):
            raise ModelLoadError(
                f"an adapter cannot be called {source.name!r}, the name of the model itself: write NAME=PATH"
            )
    return sources


def make_adapters(settings: Settings, loaded: LoadedModel, named: list[AdapterSource]) -> Adapters | None:
    """Return the manager of a model's adapters, none of them read yet, or None if the model serves none."""
    from tgi_asgi.engine import adapters
    from tgi_asgi.formats.sources import max_loaded_adapters, resolve_adapter

    loader = loaded.adapters
    if loader is None:
        return None
    return adapters.Adapters(
        lambda source: loader.load(resolve_adapter(source)),
        named,
        max_loaded=max_loaded_adapters(settings),
        taken=(*NO_NAMES, loaded.info.model_id),
    )


def _warn_guessed_tool_format(settings: Settings, loaded: LoadedModel) -> None:
    """Log a warning at start-up if the tool call format is a guess."""
    from tgi_asgi.text.tools import assumption

    template = loaded.chat_template
    if template is not None and settings.tool_format == "auto":
        warning = assumption(template.tool_source, has_tools=template.mentions("tools"))
        if warning is not None:
            logger.warning(warning)
