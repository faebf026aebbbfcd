"""The documents' statements about settings, files, commands and metrics, against the code."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

from bench import peers_page
from tests.support.documents import ROOT, blocks_of, lines_of, pages
from tests.support.scripted_engine import toy_info
from tgi_asgi.models.gguf_module import all_modules
from tgi_asgi.models.gguf_vision.projector import all_projectors
from tgi_asgi.observe.metrics import Metrics
from tgi_asgi.settings import Settings
from tgi_asgi.text.tools import FORMATS, harmony
from tgi_asgi.text.tools.reasoning import STYLES

MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
CONFIGURATION = lines_of("docs/configuration.md")


def _text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def _row(spec: dataclasses.Field[Any]) -> str:
    flags = (f"--{spec.name.replace('_', '-')}", *spec.metadata.get("flags", ()))
    words = {"None": "", "()": "", "True": "on", "False": "off"}
    default = words.get(str(spec.default), f"`{spec.default}`")
    text = spec.metadata["help"]
    if choices := spec.metadata.get("choices"):
        text += f" One of {', '.join(f'`{choice}`' for choice in choices)}."
    return f"| {', '.join(f'`{flag}`' for flag in flags)} | {default} | {text} |"


@pytest.mark.parametrize("spec", dataclasses.fields(Settings), ids=lambda spec: spec.name)
def test_the_table_has_each_setting_as_it_is(spec: dataclasses.Field[Any]) -> None:
    assert _row(spec) in CONFIGURATION, "docs/configuration.md needs the row on the left"


def test_the_table_has_no_other_setting() -> None:
    named = {found[1] for line in CONFIGURATION if (found := re.match(r"\| `--([a-z-]+)`", line))}
    assert named == {spec.name.replace("_", "-") for spec in dataclasses.fields(Settings)}


def test_each_format_of_calls_and_style_of_reasoning_has_its_row() -> None:
    page = _text("docs/structured-outputs.md")
    rows = [f"| {form.families} | `{form.name}` |" for form in FORMATS.values()]
    rows.append(f"| {harmony.FAMILIES} | `{harmony.NAME}` |")
    rows += [f"| {each.families} | `{each.name}` | `{each.start}` … `{each.end}` |" for each in STYLES]
    written = [line for line in page.splitlines() if re.match(r"\| .* \| `\w[\w.-]*` \|", line)]
    assert written == rows


def test_the_worked_example_is_the_file_that_runs() -> None:
    page = _text("docs/adding-a-model.md")
    file = ROOT / "tgi_asgi/models/families/granite.py"
    assert f"```python\n{file.read_text(encoding='utf-8')}```" in page
    tests = (ROOT / "tests/support/families.py").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("    ") and '"granite"' in line]
    assert len(rows) == 2 and all(row in tests.splitlines() for row in rows)


@pytest.mark.parametrize("target", ["serve", "test"])
def test_the_two_commands_of_a_fresh_machine_are_in_the_readme(target: str) -> None:
    assert f"make {target}" in [block.text for block in blocks_of("README.md")]


def test_the_readme_is_short_and_shows_the_page_and_the_commands_first() -> None:
    lines = lines_of("README.md")
    assert len(lines) <= 150
    first = "\n".join(lines[:40])
    assert "page.webp" in first and "make serve" in first


@pytest.mark.parametrize("page", pages())
def test_targets_of_make_and_programs_of_bench_exist(page: str) -> None:
    text = _text(page)
    for target in re.findall(r"(?:`|^)make ([a-z-]+)", text, re.MULTILINE):
        assert re.search(rf"^{target}:", MAKEFILE, re.MULTILINE), f"make {target}"
    for module in re.findall(r"(?:`|python -m )(bench\.[a-z_]+)\b", text):
        assert importlib.util.find_spec(module) or module.startswith("bench.md"), module


@pytest.mark.parametrize("page", pages())
def test_files_that_a_page_names_exist(page: str) -> None:
    roots = (ROOT, ROOT / "tgi_asgi", ROOT / "tgi_asgi/models/generic")
    found = re.findall(r"`((?:tgi_asgi|csrc|tests|bench|deploy|docker)/[\w./-]+\.\w+)`", _text(page))
    missing = [name for name in found if not any((root / name).exists() for root in roots)]
    assert not missing


def test_the_tour_goes_through_twelve_files_and_names_what_is_in_them() -> None:
    parts = re.split(r"^### \d+\. ", _text("docs/tour.md"), flags=re.MULTILINE)[1:]
    assert len(parts) == 12
    for part in parts:
        path, text = re.match(r"`([^`]+)`\n(.*)", part, re.DOTALL).groups()  # type: ignore[union-attr]
        source = (ROOT / path).read_text(encoding="utf-8")
        for name in re.findall(r"`([A-Za-z_]+)`", text.split("\n## ")[0]):
            assert name.removesuffix("s") in source, f"{name} is not in {path}"


def test_the_tour_says_how_long_its_files_are() -> None:
    page = _text("docs/tour.md")
    said = re.search(r"about ([\d,]+) lines", page)
    assert said is not None
    length = sum(len(lines_of(path)) for path in re.findall(r"^### \d+\. `([^`]+)`", page, re.MULTILINE))
    assert abs(int(said[1].replace(",", "")) - length) < 0.1 * length, f"the files have {length} lines"


def test_metrics_of_the_operating_page_are_those_of_the_dashboard_or_wire() -> None:
    metrics = Path(ROOT / "tgi_asgi/observe/metrics.py").read_text(encoding="utf-8")
    for name in re.findall(r"\btgi_[a-z_]+", _text("docs/operating.md")):
        if name not in ("tgi_asgi",):
            base = re.sub(r"_(bucket|sum|count)$", "", name)
            stem = base.removesuffix("_failure") if "batch" in base else base
            assert f'"{base}"' in metrics or f'"{stem}"' in metrics or f'"{name}"' in metrics, name


def test_each_metric_is_on_the_page_of_the_wire_or_among_those_of_tgi() -> None:
    metrics = Metrics()
    metrics.model_loaded(toy_info())
    names = re.findall(r"^# TYPE (\S+)", metrics.render().decode(), re.MULTILINE)
    pages_text = _text("docs/wire.md") + _text("docs/coming-from-tgi.md")
    assert [name for name in names if not re.search(rf"`{name}\b", pages_text)] == []


def test_the_performance_page_is_what_the_record_says() -> None:
    page, plot = peers_page.made()
    assert peers_page.PAGE.read_text(encoding="utf-8") == page, "run `python -m bench.peers_page`"
    assert peers_page.PLOT.read_text(encoding="utf-8") == plot, "run `python -m bench.peers_page`"


def test_the_operating_page_names_each_alert() -> None:
    rules = (ROOT / "deploy/prometheus/alerts.yml").read_text(encoding="utf-8")
    page = _text("docs/operating.md")
    assert set(re.findall(r"alert: (\w+)", rules)) == set(re.findall(r"`(TgiAsgi\w+)`", page))


def test_the_table_of_operators_has_each_and_marks_those_that_gpus_lack() -> None:
    from tgi_asgi.ops import calls, cuda  # torch takes seconds to import
    from tgi_asgi.ops.recorder import Call

    table = _text("docs/kernels.md").partition("| operator | CPU | CUDA |\n")[2].partition("\n\n")[0]
    rows = [row.strip("| ").split(" | ") for row in table.splitlines()[1:]]
    lacking = {_snake_case(kind.__name__) for kind in cuda._CPU_ONLY}
    assert {name.strip("`") for name, _, on_gpu in rows if on_gpu == "-"} == lacking
    kinds = [kind for kind in vars(calls).values() if isinstance(kind, type) and issubclass(kind, Call)]
    operators = {_snake_case(kind.__name__) for kind in kinds if kind is not Call}
    assert {name.strip("`") for name, *_ in rows} == {*operators, "sample"}


def _snake_case(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


def test_the_table_of_families_is_that_of_the_registry() -> None:
    from tests.support.families_page import page  # transformers takes seconds to import

    table = _text("docs/families.md").partition("<!-- families -->\n")[2].partition("\n<!-- /families -->")[0]
    assert table == page(), "docs/families.md needs the output of `python -m tests.support.families_page`"


def test_the_table_of_gguf_modules_is_complete() -> None:
    marked = _text("docs/generic.md").partition("<!-- gguf modules -->\n")[2]
    rows = marked.partition("\n<!-- /gguf modules -->")[0].splitlines()[2:]
    names = {name for row in rows for name in re.findall(r"`([\w-]+)`", row.split("|")[1])}
    assert names == {module.gguf_name for module in all_modules()}


def test_the_table_of_projectors_is_complete() -> None:
    marked = _text("docs/images.md").partition("<!-- gguf projectors -->\n")[2]
    rows = [row.split("|") for row in marked.partition("\n<!-- /gguf projectors -->")[0].splitlines()[2:]]
    found = {kind.strip(" `"): set(re.findall(r"`([\w-]+)`", texts)) for _, kind, _, texts, _ in rows}
    assert found == {kind: set(each.texts) for kind, each in all_projectors().items()}
