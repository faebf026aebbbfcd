"""How a model's authors want it sampled: as `transformers` and llama.cpp's converter write it."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers

from tests.support.checkpoints import make_model, save, save_tokenizer
from tests.support.runner_driver import Job, generate
from tgi_asgi.api.sampling import sampling
from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats.gguf import GgufFile
from tgi_asgi.formats.sources import ModelFiles
from tgi_asgi.models.generation_config import (
    MAX_SUPPRESSED,
    gguf_generation_config,
    read_generation_config,
    sampling_defaults,
    suppressed_ids,
)
from tgi_asgi.runner.load import LoadedModel, load
from tgi_asgi.settings import Settings
from tgi_asgi.settings.sampling import NO_DEFAULTS, SamplingDefaults

RECOMMENDED = SamplingDefaults(temperature=0.6, top_k=20, top_p=0.95, min_p=0.05)


def write_config(directory: Path, **values: Any) -> None:
    """Write generation_config.json as `transformers` does."""
    transformers.GenerationConfig(do_sample=True, **values).save_pretrained(directory)


def loaded(files: ModelFiles, **settings: Any) -> LoadedModel:
    model = load(Settings(num_threads=1, thread_nice=0, **settings), files, lambda *progress: None)
    model.runner.close()
    return model


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    directory = tmp_path_factory.mktemp("model")
    made = save(make_model(), directory)
    save_tokenizer(directory)
    write_config(
        directory, **RECOMMENDED.given(), repetition_penalty=1.05, suppress_tokens=[5, 3], max_new_tokens=9
    )
    return made


def test_transformers_file_is_read(files: ModelFiles) -> None:
    found = read_generation_config(files.path)
    expected = RECOMMENDED.replaced_by(SamplingDefaults(repetition_penalty=1.05))
    assert sampling_defaults(found) == expected
    assert suppressed_ids(found, 160) == (3, 5)


def test_a_converted_file_recommends_the_same(files: ModelFiles, tmp_path: Path) -> None:
    metadata = gguf.Metadata.load(model_path=files.path)  # what llama.cpp's converter writes
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    metadata.set_gguf_meta_model(writer)
    writer.add_array("tokenizer.ggml.suppress_tokens", [5, 3])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with GgufFile.open(tmp_path / "model.gguf") as file:
        found = gguf_generation_config(file.metadata)
    assert sampling_defaults(found) == RECOMMENDED
    assert suppressed_ids(found, 160) == (3, 5)


def test_a_model_without_the_file_recommends_nothing(tmp_path: Path) -> None:
    assert sampling_defaults(read_generation_config(tmp_path)) == NO_DEFAULTS
    assert gguf_generation_config({}) == {}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1), ("temperature", "0.6"), ("temperature", True), ("temperature", float("nan")),
        ("temperature", 10**400), ("top_k", 20.5), ("top_k", -2), ("top_k", 2**31), ("top_p", 1.1),
        ("min_p", [0.1]), ("typical_p", 0), ("repetition_penalty", 0),
    ],
)  # fmt: skip
def test_a_value_that_cannot_be_used_is_ignored_and_named(
    name: str, value: Any, caplog: pytest.LogCaptureFixture
) -> None:
    other = "min_p" if name == "top_p" else "top_p"
    with caplog.at_level(logging.WARNING):
        assert sampling_defaults({name: value, other: 0.5}).given() == {other: 0.5}
    assert f"the model's {name} is ignored: it must be" in caplog.text


def test_null_is_no_value(caplog: pytest.LogCaptureFixture) -> None:
    assert sampling_defaults(dict.fromkeys(["temperature", "top_k"])) == NO_DEFAULTS
    assert not caplog.text


@pytest.mark.parametrize("given", [None, 5, "5", {}, [True, "5", -1, 160, None, 2.0]])
def test_ids_that_are_none_are_not_suppressed(given: Any) -> None:
    assert suppressed_ids({"suppress_tokens": given}, 160) == ()


def test_bad_words_of_one_token_are_suppressed() -> None:
    bad = [[7], [1, 2], [159], 4, [], [160], ["a"]]
    assert suppressed_ids({"suppress_tokens": [3], "bad_words_ids": bad}, 160) == (3, 7, 159)
    assert suppressed_ids({"bad_words_ids": bad}, 160, {7}) == (159,)  # transformers lets a text end
    for none in (None, 5, {"a": 1}):
        assert suppressed_ids({"bad_words_ids": none}, 160) == ()


def test_too_many_suppressed_tokens_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    assert suppressed_ids({"suppress_tokens": [*range(600)]}, 1000) == tuple(range(MAX_SUPPRESSED))
    assert "has 600 tokens; only 512 are suppressed" in caplog.text


def test_the_loaded_model_says_how_it_is_sampled(files: ModelFiles, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        info = loaded(files).info
    assert (info.sampling.temperature, info.sampling.top_k, info.suppressed_ids) == (0.6, 20, (3, 5))
    assert "temperature 0.6, top_k 20, top_p 0.95, min_p 0.05, repetition_penalty 1.05" in caplog.text


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"sampling_defaults": "openai"}, NO_DEFAULTS),
        ({"tgi_compat": True}, NO_DEFAULTS),
        ({"override_generation_config": '{"temperature": 0, "top_k": null}'}, (0.0, 20)),
        ({"sampling_defaults": "openai", "override_generation_config": '{"top_k": 3}'}, (None, 3)),
    ],
)
def test_the_administrator_decides(settings: dict[str, Any], expected: Any) -> None:
    chosen = Settings(**settings).choose_sampling(RECOMMENDED)
    assert expected in (chosen, (chosen.temperature, chosen.top_k))


def test_a_damaged_file_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ModelLoadError, match=r"generation_config\.json"):
        read_generation_config(tmp_path)


async def test_greedy_text_without_suppressed_tokens_is_that_of_transformers(tmp_path: Path) -> None:
    model = make_model()
    files = save(model, tmp_path)
    save_tokenizer(tmp_path)
    prompt = [1, 7, 30, 12]

    def reference() -> list[int]:
        generate: Any = model.generate
        out = generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=None)
        return list(map(int, out[0, len(prompt) :]))

    plain = reference()
    model.generation_config.suppress_tokens = sorted(set(plain))
    model.generation_config.save_pretrained(tmp_path)
    served = load(Settings(num_threads=1, thread_nice=0, dtype="float32"), files, lambda *progress: None)
    job = Job(prompt, num_tokens=8, sampling=sampling(served.info, temperature=0))
    await generate(served.runner, [job])
    served.runner.close()
    assert job.token_ids == reference() and not set(job.token_ids) & set(plain)


def test_config_json_suppresses_tokens_of_models_older_than_the_file(tmp_path: Path) -> None:
    edit(tmp_path, suppress_tokens=[5], bad_words_ids=[[7]], temperature=0.5)
    found = read_generation_config(tmp_path)
    assert suppressed_ids(found, 160) == (5, 7)
    assert sampling_defaults(found) == NO_DEFAULTS  # such names may mean anything in config.json
    write_config(tmp_path)
    assert suppressed_ids(read_generation_config(tmp_path), 160) == ()


def edit(directory: Path, **values: Any) -> None:
    """Change values of a directory's config.json, which is made if there is none."""
    path = directory / "config.json"
    config = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**config, **values}))


PROMPT = [1, 7, 30, 12, 7, 30]
# The first tokens of the greedy answer to `PROMPT` are these four.
FIRST, SECOND, THIRD, FOURTH = 136, 117, 158, 78
SETTINGS: tuple[dict[str, Any], ...] = (
    {}, {"suppress_tokens": [FIRST]}, {"bad_words_ids": [[FIRST]]}, {"bad_words_ids": [[THIRD, FOURTH]]},
    {"bad_words_ids": [[FIRST]], "eos_token_id": FIRST}, {"suppress_tokens": [FIRST], "eos_token_id": FIRST},
    {"eos_token_id": [FOURTH, 5]}, {"repetition_penalty": 1.5}, {"repetition_penalty": 0.5},
    {"no_repeat_ngram_size": 1}, {"min_length": 14, "eos_token_id": FOURTH}, {"guidance_scale": 2.0},
    {"min_new_tokens": 8, "eos_token_id": FOURTH}, {"begin_suppress_tokens": [FIRST]}, {"num_beams": 3},
    {"sequence_bias": [[[9], 99.0]]}, {"exponential_decay_length_penalty": [1, 5.0], "eos_token_id": 9},
    {"temperature": 0.5, "top_k": 5, "top_p": 0.5, "min_p": 0.5}, {"num_beams": 1, "min_length": 0},
)  # fmt: skip
FOLLOWED = ("suppress_tokens", "repetition_penalty", "eos_token_id")


@pytest.mark.parametrize("given", SETTINGS, ids=str)
async def test_a_setting_changes_greedy_text_as_in_transformers_or_is_logged(
    given: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = save(make_model(), tmp_path)
    save_tokenizer(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": None, **given}))
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    out = model.generate(torch.tensor([PROMPT]), max_new_tokens=8, do_sample=False)[0, len(PROMPT) :].tolist()
    served = load(Settings(num_threads=1, thread_nice=0, dtype="float32"), files, lambda *progress: None)
    job = Job(PROMPT, num_tokens=8, sampling=sampling(served.info, served.info.sampling, temperature=0))
    await generate(served.runner, [job])
    served.runner.close()
    ends = [at for at, token_id in enumerate(job.token_ids) if token_id in served.info.eos_token_ids]
    is_same = job.token_ids[: ends[0] + 1 if ends else None] == out
    is_logged = "not followed, although" in caplog.text
    assert is_same or is_logged
    assert not (is_logged and set(given) <= {*FOLLOWED})
