"""compose, systemd and Prometheus files: against settings, files and metrics, and by their own checkers."""

from __future__ import annotations

import configparser
import contextlib
import json
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.support.server_process import ServerProcess, free_port
from tests.support.system_programs import require_package
from tgi_asgi.observe.metrics import Metrics
from tgi_asgi.serve.server import CLOSE_S
from tgi_asgi.settings import Settings

DEPLOY = Path(__file__).parents[2] / "deploy"
UNIT = DEPLOY / "systemd" / "tgi-asgi.service"
MAX_EXPOSED = 20  # tenths, of `systemd-analyze security`; services with any hardening have less than 50


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
    _run(analyze, "security", "--offline=yes", f"--threshold={MAX_EXPOSED}", copy)


# Prometheus


@pytest.mark.deploy
def test_a_prometheus_scrapes_a_server_and_answers_what_is_asked_of_it(tmp_path: Path) -> None:
    """Evaluate all expressions of the dashboard, the alerts and the autoscaler after one served request."""
    prometheus = require_package("prometheus", "prometheus")
    config = _load("prometheus/prometheus.yml")
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(DEPLOY / "prometheus" / "alerts.yml")]
    port = free_port()
    url = f"http://127.0.0.1:{port}/api/v1"
    with ServerProcess("tests.server.fake_server", "--model-id", "fake") as server:
        server.wait_until_healthy()
        httpx.post(server.url + "/generate", json={"inputs": "go", "parameters": {"max_new_tokens": 3}})
        config["scrape_configs"][0]["static_configs"] = [{"targets": [f"127.0.0.1:{server.port}"]}]
        (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
        command = [
            prometheus,
            f"--config.file={tmp_path}/prometheus.yml",
            f"--storage.tsdb.path={tmp_path}/data",
        ]
        with (tmp_path / "log").open("w") as log:
            process = subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{port}"], stderr=log)
        try:
            _wait_for(lambda: _value(url, "tgi_request_count"), "1", tmp_path / "log")
            for expression in _all_expressions():
                answer = httpx.get(f"{url}/query", params={"query": expression}).json()
                assert answer["status"] == "success", (expression, answer)
            # Sums of existing metrics are numbers even while nothing runs.
            assert _value(url, "sum(tgi_queue_size) + sum(tgi_requests_running)") == "0"
            rules = httpx.get(f"{url}/rules").json()["data"]["groups"][0]["rules"]
            assert {rule["health"] for rule in rules} <= {"ok", "unknown"}
            assert not [rule["name"] for rule in rules if rule["state"] != "inactive"]
        finally:
            process.terminate()
            process.wait(60)


def _wait_for(read: Callable[[], str | None], value: str, log: Path) -> None:
    give_up_s = time.monotonic() + 60
    found = None
    while found != value:
        assert time.monotonic() < give_up_s, f"{found}\n{log.read_text(encoding='utf-8')}"
        time.sleep(0.1)
        # Either no server listens yet, or Prometheus still reads its store and answers 503 in plain text.
        with contextlib.suppress(httpx.TransportError, httpx.HTTPStatusError):
            found = read()


def _value(url: str, query: str) -> str | None:
    response = httpx.get(f"{url}/query", params={"query": query})
    response.raise_for_status()
    answer = response.json()
    results = answer.get("data", {}).get("result", [])
    return results[0]["value"][1] if results else None


def _all_expressions() -> list[str]:
    panels = json.loads((DEPLOY / "grafana.json").read_text(encoding="utf-8"))["panels"]
    dashboard = [target["expr"] for panel in panels for target in panel.get("targets", ())]
    spec = _load("kubernetes/overlays/keda/scaled-object.yaml")["spec"]
    scaling = [trigger["metadata"]["query"] for trigger in spec["triggers"]]
    asked = [expression.replace("$__rate_interval", "1m") for expression in dashboard]
    assert len(asked) > 20
    return [*asked, *scaling, *_expressions("prometheus/alerts.yml")]


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
