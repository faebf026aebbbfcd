"""The Grafana dashboard uses only metrics that exist."""

from __future__ import annotations

import json
import re
from pathlib import Path

from tgi_asgi.observe.metrics import Metrics

BOARD = json.loads((Path(__file__).parents[2] / "deploy" / "grafana.json").read_text(encoding="utf-8"))


def test_every_expression_of_the_dashboard_has_its_metric() -> None:
    samples = set(re.findall(r"^(\w+)[ {]", Metrics().render().decode(), re.MULTILINE))
    targets = [target for panel in BOARD["panels"] for target in panel.get("targets", ())]
    assert len(targets) > 20
    for target in targets:
        names = re.findall(r"\btgi_\w+", target["expr"])
        assert names, target
        assert set(names) <= samples, target["expr"]
        assert target["expr"].count("(") == target["expr"].count(")")


def test_panels_have_ids_of_their_own_and_do_not_overlap() -> None:
    panels = BOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for panel in panels
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) == 23
