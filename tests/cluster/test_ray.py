"""The cluster on Ray Serve: the same calls between actors, and what happens when an actor is lost."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml

from bench.cluster import RayCluster, lose_one
from tests.support.local_cluster import toy_loader
from tgi_asgi.cluster import app

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.filterwarnings("ignore"),  # Ray's own warnings
]

DEPLOY = Path(__file__).parents[2] / "deploy/ray"
KEYS = {"authorization": "Bearer k"}


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[RayCluster]:
    """Yield a local Ray cluster."""
    with RayCluster() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def url(ray_cluster: RayCluster) -> Iterator[str]:
    """Yield the URL of three replicas of one toy model and one of another, with an API key."""
    models = [{"model_id": "toy/model", "num_replicas": 3}, {"model_id": "toy/other"}]
    arguments = {"models": models, "api_key": ["k"], "debug_endpoints": True, "log_level": "warn"}
    yield ray_cluster.serve(arguments, loader=toy_loader(num_blocks=2048))
    ray_cluster.delete()


def chat(content: str, model: str = "toy/model") -> dict[str, object]:
    return {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": 5,
        "temperature": 0,
    }


def test_users_meet_one_server(url: str) -> None:
    with httpx.Client(base_url=url, headers=KEYS, timeout=30) as client:
        answers = [
            client.post("/v1/chat/completions", json=chat("hi", name)) for name in ("toy/model", "toy/other")
        ]
        unknown = client.post("/v1/chat/completions", json=chat("hi", "toy/none"))
        bad = client.post("/v1/chat/completions", json={**chat("hi"), "temperature": -1})
        listed = client.get("/v1/models").json()
        metrics = client.get("/metrics").text
        keyless = httpx.post(url + "/v1/chat/completions", json=chat("hi"), timeout=30)
        native = client.post("/generate", json={"inputs": "hi", "parameters": {"max_new_tokens": 3}})
    assert [answer.json()["model"] for answer in answers] == ["toy/model", "toy/other"]
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")
    assert (bad.status_code, bad.json()["error"]["param"]) == (400, "temperature")
    assert (keyless.status_code, keyless.headers["www-authenticate"]) == (401, "Bearer")
    assert [each["id"] for each in listed["data"]] == ["toy/model", "toy/other"]
    assert 'tgi_request_count{model_name="toy/other"} 1' in metrics
    assert native.json()["generated_text"]


def test_a_conversation_finds_its_blocks(url: str) -> None:
    cached, total = 0, 0
    with httpx.Client(base_url=url, headers=KEYS, timeout=30) as client:
        for turn in range(1, 8):
            usage = client.post("/v1/chat/completions", json=chat("a word " * 40 * turn)).json()["usage"]
            cached += usage["prompt_tokens_details"]["cached_tokens"]
            total += usage["prompt_tokens"]
    assert cached > 0.7 * total


def test_a_lost_replica_takes_its_own_streams_alone(ray_cluster: RayCluster) -> None:
    arguments = {"model_id": "toy/model", "num_replicas": 2, "debug_endpoints": True, "log_level": "warn"}
    url = ray_cluster.serve(arguments, name="loss", loader=toy_loader(num_blocks=4096, step_s=0.02))
    found = asyncio.run(lose_one(ray_cluster, url, 12, name="loss"))
    ray_cluster.delete("loss")
    assert 0 < found["on_the_killed"] < 12
    assert found["ends"] == {"error event": found["on_the_killed"], "whole": 12 - found["on_the_killed"]}
    assert found["sent_after"] == {"whole": 5}
    assert found["replaced_after_s"] is not None


def test_ray_takes_the_files_of_deploy() -> None:
    from ray.serve.schema import ServeDeploySchema

    local = yaml.safe_load((DEPLOY / "serve.yaml").read_text(encoding="utf-8"))
    service = yaml.safe_load((DEPLOY / "kuberay.yaml").read_text(encoding="utf-8"))
    for config in (local, yaml.safe_load(service["spec"]["serveConfigV2"])):
        [application] = ServeDeploySchema(**config).applications
        assert application.import_path == "tgi_asgi.cluster:app"
        assert app(application.args) is not None
