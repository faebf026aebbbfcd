"""compose, systemd and Prometheus: against our settings, files and metrics, and by their own checkers."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.programs import require_package
from tgi_asgi.observe.metrics import Metrics
from tgi_asgi.serve.server import CLOSE_S
from tgi_asgi.settings import Settings

DEPLOY = Path(__file__).parents[2] / "deploy"
UNIT = DEPLOY / "systemd" / "tgi-asgi.service"
MOST_EXPOSED = (
    20  # tenths, of `systemd-analyze security`: services that are hardened at all have less than 50
)


def _run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    return run


def _load(name: str) -> Any:
    return yaml.safe_load((DEPLOY / name).read_text(encoding="utf-8"))


# compose


def test_compose_gives_the_server_time_to_drain_and_no_rights() -> None:
    server = _load("compose/compose.yaml")["services"]["server"]
    longest_s = Settings().drain_delay_s + Settings().graceful_termination_timeout + CLOSE_S
    assert int(server["stop_grace_period"].removesuffix("s")) >= longest_s
    assert server["user"] == "1000:1000" and server["read_only"] and server["cap_drop"] == ["ALL"]
    port = server["environment"]["PORT"]
    assert server["ports"] == [f"${{BIND:-127.0.0.1}}:{port}:{port}"]
    (job,) = _load("prometheus/prometheus.yml")["scrape_configs"]
    assert job["static_configs"] == [{"targets": [f"server:{port}"]}]


def test_compose_mounts_files_that_there_are_where_their_readers_look() -> None:
    services = _load("compose/compose.yaml")["services"]
    mounts = {}
    for service in services.values():
        for mount in service["volumes"]:
            source, target, *_ = mount.split(":")
            if source.startswith("."):
                assert (DEPLOY / "compose" / source).is_file(), source
                mounts[target] = (DEPLOY / "compose" / source).resolve()
    assert mounts["/etc/prometheus/alerts.yml"] == DEPLOY / "prometheus" / "alerts.yml"
    (provider,) = _load("compose/grafana/dashboards.yaml")["providers"]
    home = services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert mounts[home] == DEPLOY / "grafana.json"
    assert Path(home).parent == Path(provider["options"]["path"])
    (source,) = _load("compose/grafana/datasources.yaml")["datasources"]
    assert source["url"] == "http://prometheus:9090" and source["type"] == "prometheus"


@pytest.mark.deploy
def test_compose_s_own_reader_takes_the_file() -> None:
    docker = shutil.which("docker")
    path = DEPLOY / "compose" / "compose.yaml"
    if docker and subprocess.run([docker, "compose", "version"], capture_output=True).returncode == 0:
        command = [docker, "compose"]
    else:
        command = [require_package("docker-compose", "docker-compose")]
    shown = yaml.safe_load(_run(*command, "-f", path, "config").stdout)
    assert shown["services"].keys() == {"server", "prometheus", "grafana"}


# systemd


def _unit() -> configparser.SectionProxy:
    reader = configparser.ConfigParser(strict=False, interpolation=None)
    reader.optionxform = str  # type: ignore[assignment,method-assign]
    reader.read(UNIT, encoding="utf-8")
    return reader["Service"]


def test_the_unit_waits_for_the_model_and_for_the_drain() -> None:
    unit = _unit()
    assert (unit["Type"], unit["TimeoutStartSec"]) == ("notify", "infinity")
    longest_s = Settings().drain_delay_s + Settings().graceful_termination_timeout + CLOSE_S
    assert int(unit["TimeoutStopSec"]) >= longest_s
    assert unit["ExecReload"].startswith("/bin/kill -HUP ")


def test_the_unit_s_variables_are_settings() -> None:
    assert _unit()["EnvironmentFile"] == "/etc/tgi-asgi.env"
    text = (DEPLOY / "systemd" / "tgi-asgi.env").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    settings = Settings.from_environ(dict(line.split("=", 1) for line in lines))
    assert (settings.hostname, settings.port) == ("127.0.0.1", 3000)
    assert settings.model_id is not None
    for name in re.findall(r"^#?([A-Z_]+)=", text, re.MULTILINE):
        assert name == "HF_TOKEN" or name.lower() in Settings.__dataclass_fields__


@pytest.mark.deploy
def test_systemd_takes_the_unit_and_finds_it_confined(tmp_path: Path) -> None:
    analyze = require_package("systemd-analyze", "systemd")
    text = UNIT.read_text(encoding="utf-8")
    copy = tmp_path / UNIT.name
    copy.write_text(text.replace("/opt/tgi-asgi/bin/tgi-asgi", "/bin/true"), encoding="utf-8")
    assert copy.read_text(encoding="utf-8") != text
    shown = _run(analyze, "verify", "--man=no", copy)
    assert not [line for line in shown.stderr.splitlines() if UNIT.name in line], shown.stderr
    _run(analyze, "security", "--offline=yes", f"--threshold={MOST_EXPOSED}", copy)


# Prometheus


def _expressions(name: str) -> list[str]:
    return [rule["expr"] for group in _load(name)["groups"] for rule in group["rules"]]


def test_alerts_ask_for_metrics_and_labels_that_there_are() -> None:
    text = Metrics().render().decode()
    samples = set(re.findall(r"^(\w+)[ {]", text, re.MULTILINE))
    for expression in _expressions("prometheus/alerts.yml"):
        names = set(re.findall(r"\btgi_\w+", expression))
        assert names <= samples, expression
        assert names or expression.startswith("up{"), expression
    failures = set(re.findall(r'tgi_request_failure\{err="(\w+)"\}', text))
    asked = re.findall(r'err=~?"([\w|]+)"', "".join(_expressions("prometheus/alerts.yml")))
    assert asked
    assert {each for values in asked for each in values.split("|")} <= failures
    test = (DEPLOY / "prometheus" / "alerts.test.yml").read_text(encoding="utf-8")
    assert set(re.findall(r"\btgi_\w+", test)) <= samples


@pytest.mark.deploy
def test_promtool_takes_the_configuration_and_alerts_fire_when_they_should() -> None:
    promtool = require_package("promtool", "prometheus")
    folder = DEPLOY / "prometheus"
    assert "SUCCESS: 9 rules found" in _run(promtool, "check", "rules", folder / "alerts.yml").stdout
    _run(promtool, "check", "config", folder / "prometheus.yml")
    _run(promtool, "test", "rules", folder / "alerts.test.yml")
