"""Arguments of `serve run` and of Serve's config files become settings, and errors name the mistake."""

from __future__ import annotations

from typing import Any

import pytest

from tgi_asgi.cluster.config import ClusterConfig, name_of
from tgi_asgi.errors import InvalidRequest


def test_texts_of_a_command_line_mean_what_a_file_says() -> None:
    texts = {
        "model_id": "org/m",
        "num_replicas": "2",
        "num_threads": "4",
        "prefix_cache": "false",
        "api_key": "k",
    }
    typed = {
        "model_id": "org/m",
        "num_replicas": 2,
        "num_threads": 4,
        "prefix_cache": False,
        "api_key": ["k"],
    }
    assert ClusterConfig.from_args(texts) == ClusterConfig.from_args(typed)
    [model] = ClusterConfig.from_args(texts).models
    assert (model.num_replicas, model.settings.num_threads) == (2, 4)


@pytest.mark.parametrize(
    ("args", "cores", "threads"),
    [
        ({"num_threads": 8}, 8, 8),
        ({"ray_actor_options": {"num_cpus": 4}}, 4, 4),
        ({"num_threads": 8, "ray_actor_options": {"num_cpus": 2}}, 2, 8),
        ({}, None, None),
    ],
)
def test_threads_and_rays_cores_follow_each_other(
    args: dict[str, Any], cores: int | None, threads: int | None
) -> None:
    [model] = ClusterConfig.from_args(args).models
    assert model.ray_actor_options.get("num_cpus") == cores
    assert model.settings.num_threads == threads


def test_models_share_what_is_said_once() -> None:
    listed = [{"model_id": "org/a"}, {"model_id": "org/b", "num_replicas": 3, "max_total_tokens": 100}]
    config = ClusterConfig.from_args({"models": listed, "num_replicas": 2, "max_total_tokens": 900})
    assert [(name_of(each), each.num_replicas, each.settings.max_total_tokens) for each in config.models] == [
        ("org/a", 2, 900),
        ("org/b", 3, 100),
    ]
    assert all(each.settings.strict_model_names for each in config.models)


@pytest.mark.parametrize(
    ("args", "named"),
    [
        ({"modell_id": "x"}, "modell_id"),
        ({"port": 80}, "http_options"),
        ({"num_replicas": 0}, "num_replicas"),
        ({"num_replicas": 2, "autoscaling_config": {"max_replicas": 4}}, "exclusive"),
        ({"models": {"a": 1}}, "models"),
        ({"models": [{"model_id": "a"}, {"model_id": "a"}]}, "same name"),
        ({"ingress": {"replicas": 2}}, "ingress"),
        ({"max_batch_size": "many"}, "MAX_BATCH_SIZE"),
    ],
)
def test_what_is_mistaken_is_named(args: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidRequest, match=named):
        ClusterConfig.from_args(args)
