"""The manifests against the project's routes, settings and image; rendered, against Kubernetes' schemas."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.system_programs import require_package
from tgi_asgi.api.table import routes
from tgi_asgi.observe.metrics import Metrics
from tgi_asgi.serve.server import CLOSE_S
from tgi_asgi.settings import Settings

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "kubernetes"
NAME = {"app.kubernetes.io/name": "tgi-asgi"}
OVERLAYS = ("cpu", "gpu", "keda")
VERSIONS = ("1.29", "1.37")  # the oldest with all the fields, and the newest with published schemas


def _load(name: str) -> Any:
    return yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))


@pytest.fixture
def pod() -> Any:
    return _load("base/deployment.yaml")["spec"]["template"]


@pytest.fixture
def variables() -> dict[str, str]:
    """Return the variables that the ConfigMap sets."""
    (generator,) = _load("base/kustomization.yaml")["configMapGenerator"]
    return dict(literal.split("=", 1) for literal in generator["literals"])


def test_probes_ask_paths_that_there_are(pod: Any) -> None:
    (server,) = pod["spec"]["containers"]
    paths = {route.path for route in routes(Settings())}
    probes = [server[f"{kind}Probe"]["httpGet"] for kind in ("startup", "liveness", "readiness")]
    assert [probe["path"] for probe in probes] == ["/livez", "/livez", "/readyz"]
    assert {probe["path"] for probe in probes} <= paths
    (port,) = server["ports"]
    assert {probe["port"] for probe in probes} == {port["name"]}
    assert {each["name"]: each.get("value") for each in server["env"]}["PORT"] == str(port["containerPort"])
    assert pod["metadata"]["annotations"]["prometheus.io/port"] == str(port["containerPort"])


def test_a_pod_is_not_killed_before_it_has_drained(pod: Any, variables: dict[str, str]) -> None:
    settings = Settings.from_environ(variables)
    assert settings.drain_delay_s > 0  # else requests reach a closed port until the endpoints know
    longest_s = settings.drain_delay_s + settings.graceful_termination_timeout + CLOSE_S
    assert longest_s < pod["spec"]["terminationGracePeriodSeconds"] <= longest_s + 30
    (server,) = pod["spec"]["containers"]
    # The probe must fail often enough to mark the pod unready before the server refuses requests.
    readiness = server["readinessProbe"]
    assert readiness["periodSeconds"] * readiness["failureThreshold"] <= settings.drain_delay_s


def test_variables_are_settings(variables: dict[str, str]) -> None:
    fields = {name for spec in Settings.__dataclass_fields__.values() for name in spec.metadata["env"]}
    fields |= {name.upper() for name in Settings.__dataclass_fields__}
    assert variables.keys() <= fields


def test_a_pod_may_do_nothing_that_it_need_not(pod: Any) -> None:
    spec = pod["spec"]
    assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["runAsUser"] == 1000
    assert spec["automountServiceAccountToken"] is False
    for container in (*spec["initContainers"], *spec["containers"]):
        confined = container["securityContext"]
        assert confined["readOnlyRootFilesystem"] and not confined["allowPrivilegeEscalation"]
        assert confined["capabilities"] == {"drop": ["ALL"]}
        dockerfile = (ROOT / "Dockerfile").read_text(encoding="utf-8")
        (volume,) = re.findall(r"^VOLUME (\S+)$", dockerfile, re.MULTILINE)
        assert [mount["mountPath"] for mount in container["volumeMounts"]] == [volume]
    (weights,), (server,) = spec["initContainers"], spec["containers"]
    assert weights["args"] == ["download-weights"]
    assert "HF_TOKEN" not in {each["name"] for each in server["env"]}


def test_all_that_selects_the_pods_selects_them_and_no_others(pod: Any) -> None:
    assert pod["metadata"]["labels"] == NAME
    assert _load("base/deployment.yaml")["spec"]["selector"]["matchLabels"] == NAME
    assert _load("base/service.yaml")["spec"]["selector"] == NAME
    assert _load("base/disruption-budget.yaml")["spec"]["selector"]["matchLabels"] == NAME
    policy = _load("base/network-policy.yaml")["spec"]
    assert policy["podSelector"]["matchLabels"] == NAME
    assert policy["egress"][0]["to"][0]["podSelector"]["matchLabels"] == {"k8s-app": "kube-dns"}


def test_replicas_follow_metrics_that_there_are() -> None:
    samples = set(re.findall(r"^(\w+)[ {]", Metrics().render().decode(), re.MULTILINE))
    spec = _load("overlays/keda/scaled-object.yaml")["spec"]
    queries = {trigger["name"]: trigger["metadata"]["query"] for trigger in spec["triggers"]}
    assert queries.keys() == {"queue", "running"}
    for query in queries.values():
        assert re.findall(r"\btgi_\w+", query)[0] in samples, query
    assert spec["scaleTargetRef"]["name"] == _load("base/deployment.yaml")["metadata"]["name"]


@pytest.fixture(scope="session")
def rendered() -> dict[str, list[Any]]:
    """Return the objects of each overlay."""
    kubectl = require_package("kubectl", "dl.k8s.io")
    shown = subprocess.run(
        [kubectl, "version", "--client"], capture_output=True, text=True, timeout=60
    ).stdout
    version = re.search(r"v1\.(\d+)|Minor:\"(\d+)", shown)
    if version is None or int(version[1] or version[2]) < 21:
        pytest.skip("kubectl is older than 1.21, and so is its kustomize (Debian 12's is 1.20)")
    found = {}
    for name in OVERLAYS:
        command = [kubectl, "kustomize", str(FOLDER / "overlays" / name)]
        run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert run.returncode == 0, run.stderr
        found[name] = list(yaml.safe_load_all(run.stdout))
    return found


@pytest.mark.deploy
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_each_overlay_is_what_kubernetes_takes(
    rendered: dict[str, list[Any]], overlay: str, version: str
) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    kinds = [each["kind"] for each in rendered[overlay]]
    custom = ["ScaledObject"] if overlay == "keda" else []
    expected = ["ConfigMap", "Deployment", "NetworkPolicy", "PodDisruptionBudget", "Service", *custom]
    assert sorted(kinds) == sorted(expected)
    for each in rendered[overlay]:
        if each["kind"] not in custom:  # Kubernetes has no schema of these
            validate.validate(each, version, strict=True)


@pytest.mark.deploy
def test_overlays_say_what_a_pod_gets(rendered: dict[str, list[Any]]) -> None:
    found = {
        name: next(each for each in objects if each["kind"] == "Deployment")["spec"]
        for name, objects in rendered.items()
    }
    containers = {name: spec["template"]["spec"]["containers"][0] for name, spec in found.items()}
    for container in containers.values():  # requests must equal limits, or the node may reclaim some
        resources = container["resources"]
        assert resources["requests"].items() <= resources["limits"].items()
    assert containers["gpu"]["image"] == "tgi-asgi:cuda"
    assert containers["gpu"]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert "nvidia.com/gpu" not in containers["cpu"]["resources"]["limits"]
    assert found["cpu"]["replicas"] == 2
    assert "replicas" not in found["keda"]
    maps = [each["metadata"]["name"] for each in rendered["cpu"] if each["kind"] == "ConfigMap"]
    sources = found["cpu"]["template"]["spec"]["initContainers"][0]["envFrom"], containers["cpu"]["envFrom"]
    assert [source[0]["configMapRef"]["name"] for source in sources] == maps * 2
