"""Arguments of `serve run` and of Serve's config files become settings, and errors name the mistake."""

from __future__ import annotations

from typing import Any

import pytest

from tgi_asgi.cluster.config import ClusterConfig, name_of
from tgi_asgi.errors import InvalidRequest
from tgi_asgi.settings import DEMO_MODEL


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


def test_an_object_may_be_one_of_the_file_and_null_is_unset() -> None:
    args = {"default_chat_template_kwargs": {"enable_thinking": False}, "max_total_tokens": None}
    [model] = ClusterConfig.from_args(args).models
    assert model.settings.template_variables == {"enable_thinking": False}
    assert model.settings.max_total_tokens is None
    shared = {"num_replicas": 2, "model_id": None, "strict_model_names": None}
    listed = [{"num_replicas": None}, {"model_id": "org/b", "autoscaling_config": {}, "num_replicas": None}]
    first, second = ClusterConfig.from_args({**shared, "models": listed}).models
    assert (first.settings.model_id, first.num_replicas) == (DEMO_MODEL, 1)
    assert (second.settings.strict_model_names, second.num_replicas) == (True, None)


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
        ({"num_threads": "many"}, "NUM_THREADS"),
        ({"max_batch_size": 2.5}, "`max_batch_size` must be an integer, got float"),
        ({"max_batch_size": True}, "`max_batch_size` must be an integer, got bool"),
        ({"prefix_cache": 0}, "`prefix_cache` must be true or false, got int"),
        ({"queue_timeout_s": [1]}, "`queue_timeout_s` must be a number, got list"),
        ({"api_key_file": {"a": "b"}}, "`api_key_file` must be text in quotes, got dict"),
        ({"api_key": 12345}, "`api_key` must be text in quotes, or a list of it, got int$"),
        ({"api_key": ["a", 12345]}, "`api_key` must be text in quotes, or a list of it, got list$"),
        ({"ray_actor_options": "num_gpus=1"}, "`ray_actor_options` must be an object"),
        ({"autoscaling_config": 3}, "`autoscaling_config` must be an object"),
    ],
)
def test_what_is_mistaken_is_named(args: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidRequest, match=named):
        ClusterConfig.from_args(args)
