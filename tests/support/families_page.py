"""The registry's part of `docs/families.md`; `python -m tests.support.families_page` prints it.

A family's requirements on the GPU are derived from the configurations that its tests use.
"""

from __future__ import annotations

import copy
import importlib
import json
import pkgutil
from collections.abc import Iterator, Sequence
from typing import Any

import transformers

from tests.support.families import CASES
from tests.support.family_case import FamilyCase, overlaid
from tests.support.like_llama import LIKE_LLAMA
from tgi_asgi.models import families
from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.family import Family
from tgi_asgi.models.loading.recognise import read_config, with_architecture
from tgi_asgi.models.needs import needs_of
from tgi_asgi.runner.cuda_load import SUPPORTED_NEEDS


def page() -> str:
    """Return the table."""
    return "\n".join(_lines())


def _lines() -> Iterator[str]:
    given = [config_of(case) for case in CASES] + [case.published for case in LIKE_LLAMA if case.is_read]
    configs = [read_config(with_architecture(config)) for config in given]
    yield "| models | `architectures` of config.json | GGUF | on a GPU |"
    yield "|---|---|---|---|"
    for module in pkgutil.iter_modules(families.__path__):
        found = importlib.import_module(f"{families.__name__}.{module.name}")
        rows: Sequence[Family] = found.FAMILIES
        title = " ".join((found.__doc__ or "").split("\n\n")[0].split()).partition(":")[0].rstrip(".")
        names = ", ".join(f"`{family.architecture}`" for family in rows if not family.is_gguf_only) or "-"
        stored = (name for family in rows for name in (family.gguf_name, *family.other_gguf_names) if name)
        ggufs = dict.fromkeys(f"`{name}`" for name in stored)
        of_module = [config for family, config in configs if family in rows]
        yield f"| {title} | {names} | {', '.join(ggufs) or '-'} | {_on_gpu(of_module)} |"


def _on_gpu(configs: Sequence[ModelConfig]) -> str:
    """Return whether the GPU kernels support models of these configurations, or what they lack."""
    lacking = [needs_of(config) - SUPPORTED_NEEDS for config in configs]
    if not any(lacking):
        return "yes"
    words = ", ".join(sorted({str(need) for each in lacking for need in each}))
    return f"lacks {words}" if all(lacking) else f"those without {words}"


def config_of(case: FamilyCase) -> dict[str, Any]:
    """Return the config.json of a case without making its model."""
    made = getattr(transformers, case.architecture).config_class(**copy.deepcopy(dict(case.config)))
    saved = {"architectures": [case.architecture], **json.loads(made.to_json_string())}
    return overlaid({key: value for key, value in saved.items() if key not in case.drops}, case.json)


if __name__ == "__main__":
    print(page())
