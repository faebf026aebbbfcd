"""Mllama, whose decoder reads images through cross-attention: what each token sees, and what is kept."""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
import torch
import transformers
from transformers.models.mllama import modeling_mllama

from tests.support import vision_models as vision
from tests.support.call_count import CallCount
from tests.support.vision_chats import Part, chatting, greedy, url_of
from tests.support.vision_models import Prompt, picture
from tests.support.vision_runs import load, program_of, run, served
from tgi_asgi import ops
from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats.quantised import Quantisation
from tgi_asgi.models.generic.open import OpenGeneric
from tgi_asgi.models.generic.steps import flat_rows
from tgi_asgi.models.generic.vision import cross_attention
from tgi_asgi.models.loading.safetensors import SafetensorsWeights
from tgi_asgi.types import Image

TOLERANCE = 1e-5  # of the largest logit
ANSWER = list(range(120, 126))
# Sizes for one, two, three, four in a row, and four in a square of tiles of 28 x 28.
SIZES = ((20, 20), (50, 25), (28, 84), (112, 28), (56, 50))
NAME = "mllama"

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers' own code


@pytest.fixture(scope="module", autouse=True)
def threads() -> None:
    ops.configure_threads(1, nice=0, pin=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp(NAME)
    vision.make(NAME, made)
    return made


@pytest.fixture
def without_collections() -> Iterator[None]:
    """Free only what nothing refers to."""
    gc.disable()
    yield
    gc.enable()


def prompts_of(folder: Path) -> list[Prompt]:
    """Return prompts with images of each number of tiles, in any place, and one without images."""
    one, two, three, row, square = (picture(*size, seed) for seed, size in enumerate(SIZES))
    parts: list[list[Part]] = [
        ["user: what is ", one, " and ", row, two, " this?"],
        ["no picture here, is there"],
        [three, square, one, "x", two, "which one is the largest of them?"],
        ["this is the longest of all beginnings before an image ", square],
        ["a", two],
    ]
    return [vision.prompt_of(NAME, folder, each) for each in parts]


def difference(found: np.ndarray, wanted: np.ndarray) -> float:
    assert found.shape == wanted.shape
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def test_each_token_sees_what_it_sees_in_transformers(folder: Path, encoded: CallCount) -> None:
    prompts = prompts_of(folder)
    reference = vision.open_reference(folder)
    wanted = [vision.reference(folder, prompt, ANSWER, reference) for prompt in prompts]
    assert [[_num_tiles(image) for image in prompt.images] for prompt in prompts] == [
        [1, 4, 2], [], [3, 4, 1, 2], [4], [2],
    ]  # fmt: skip
    model = load(folder)
    for chunks in ([1000] * 5, [7, 5, 3, 16, 2], [1, 1000, 2, 1, 1]):
        encoded.num = 0
        found, _ = run(model, [(prompt, ANSWER) for prompt in prompts], chunks)
        for logits, expected in zip(found, wanted, strict=True):
            worst = difference(logits, expected)
            print(f"largest difference in chunks of {chunks}: {worst:.2g}")
            assert worst < TOLERANCE
        assert encoded.num == 5


def _num_tiles(image: Any) -> int:
    return int(image.payload["aspect_ratio_mask"].sum())


def test_layers_of_cross_attention_in_another_class_are_refused() -> None:
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(cross_attention_layers=[1]))
    model = type("OtherForConditionalGeneration", (), {"config": config})()
    with pytest.raises(ModelLoadError, match="OtherForConditionalGeneration has layers of cross-attention"):
        cross_attention.adapt(model)


def test_an_id_that_is_only_read_is_never_sampled(folder: Path) -> None:
    model = load(folder)
    (prompt,) = [vision.prompt_of(NAME, folder, ["a", picture(20, 20)])]
    num_logits = model.module.get_output_embeddings().out_features
    image_id = prompt.ids[prompt.images[0].start]
    assert num_logits == image_id < model.config.vocab_size == num_logits + 8
    _, program = run(model, [(prompt, [])], [1000])
    logits = program.run_head([0, len(prompt.ids) - 1])
    assert logits.shape == (2, model.config.vocab_size)
    assert (logits[:, num_logits:] == np.finfo(np.float32).min).all()


@pytest.mark.parametrize(("is_exact", "item_bytes"), [(True, 4), (False, 2)])
def test_a_request_counts_what_is_kept_of_its_images(is_exact: bool, item_bytes: int, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    opened = OpenGeneric(folder, config, trusts_code=False)
    processor = opened.image_processor(folder)
    assert processor is not None
    weights = SafetensorsWeights(folder, Quantisation.from_json(config))
    model: Any = opened.load(weights, ops.Packing(is_exact), 2048)
    (made,) = processor.process([Image(picture(20, 20), b"d" * 32, "image")])
    encoding = model.tower.encode(made.payload)
    # Keys and values of two layers, with two heads of 16 for each of 17 rows of four tiles.
    assert encoding.num_bytes == 2 * 2 * 2 * 16 * 17 * 4 * item_bytes
    assert made.num_bytes == encoding.num_bytes + sum(each.nbytes for each in made.payload.values())


def test_bfloat16_is_close(folder: Path) -> None:
    prompts = [prompt for prompt in prompts_of(folder) if prompt.images]
    exact, rounded = (load(folder, is_exact=is_exact) for is_exact in (True, False))
    wanted, found = (
        run(model, [(prompt, ANSWER) for prompt in prompts], [1000] * len(prompts))[0]
        for model in (exact, rounded)
    )
    for logits, expected in zip(found, wanted, strict=True):
        assert 1e-5 < difference(logits, expected) < 0.05


def test_a_checkpoint_of_the_decoder_alone_is_served_for_text(folder: Path, tmp_path: Path) -> None:
    model = vision.open_reference(folder)
    alone = transformers.MllamaForCausalLM(model.config.text_config)
    alone.model.load_state_dict(model.model.language_model.state_dict())
    alone.lm_head.load_state_dict(model.lm_head.state_dict())
    alone.save_pretrained(tmp_path)
    ids = np.arange(60, 100)
    with torch.inference_mode():
        wanted = alone.eval()(input_ids=torch.from_numpy(ids)[None], use_cache=False).logits[0].numpy()
    loaded: Any = load(tmp_path)
    pool = loaded.backend.pool(loaded.config.caches, num_blocks=3, block_size=16, dtype="float32")
    found = loaded.program(pool.layers, 48).run(flat_rows([(0, ids, 0)], 3), range(40))
    assert difference(found, wanted) < TOLERANCE


def of_logits(logits: np.ndarray) -> np.ndarray:
    """Return log-probabilities."""
    found: np.ndarray = torch.from_numpy(logits).double().log_softmax(-1).numpy()
    return found


TURNS: list[list[Part]] = [
    ["what is ", picture(50, 30), " and ", picture(28, 100, 1), picture(20, 20, 2), " this?"],
    ["no picture"],
    [picture(112, 28, 3)],
    ["what is ", picture(20, 20, 4), " and ", picture(28, 100, 1), picture(20, 20, 2), " this?"],
]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_batch_prefill_tokens": 48, "image_cache": 1},
        {"prefix_cache": False, "max_batch_total_tokens": 448},  # too little for all: some are preempted
    ],
    ids=str,
)
async def test_clients_get_the_probabilities_of_transformers(
    options: dict[str, Any], folder: Path, encoded: CallCount
) -> None:
    num_tokens = 50
    async with chatting(folder, **options) as (ask, app):
        encoded.num = 0
        given = {
            "logprobs": True,
            "max_tokens": num_tokens,
            "extra_body": {"ignore_eos": True, "return_token_ids": True, "skip_special_tokens": False},
        }
        asked = [ask(parts, n=n, **given) for n in (1, 3) for parts in TURNS]
        found = await asyncio.gather(*asked)
        served: Any = app.context.served
        encodings, stats = program_of(app).encodings, served.engine.stats
        assert encoded.num == 5
        assert (stats.preemptions > 0) == ("max_batch_total_tokens" in options)
        await ask(["a step after which nothing is held"])
        assert encodings._held == {}
        assert app.context.image_budget.held == 0
    reference = vision.open_reference(folder)
    for parts, *answers in zip(TURNS, found, found[len(TURNS) :], strict=False):
        prompt = vision.prompt_of(NAME, folder, ["user: ", *parts, "\nassistant: "])
        for choice in (choice for answer in answers for choice in answer.choices):
            ids = choice.token_ids
            assert len(ids) == num_tokens
            wanted = of_logits(vision.reference(folder, prompt, ids[:-1], reference))[len(prompt.ids) - 1 :]
            assert ids == wanted.argmax(-1).tolist()
            logprobs = [token.logprob for token in choice.logprobs.content]
            assert np.abs(wanted.max(-1) - logprobs).max() < 1e-4


async def test_blocks_are_shared_only_by_prompts_with_the_same_images(folder: Path) -> None:
    beginning = "this beginning of a prompt fills some blocks before any image "
    one, other = picture(50, 30), picture(50, 30, 1)
    async with chatting(folder) as (ask, _):
        cached = []
        for parts in ([one], [one], [other], [one, " ", other], []):
            answer = await ask([beginning, *parts, "?"])
            cached.append(answer.usage.prompt_tokens_details.cached_tokens)
            assert answer.choices[0].message.content == greedy(NAME, folder, [beginning, *parts, "?"], 6)
    assert [count > 0 for count in cached] == [False, True, False, False, False]


async def test_a_turn_after_one_with_images_goes_on_from_it(folder: Path, encoded: CallCount) -> None:
    first: list[Part] = ["what is in this picture ", picture(50, 30), "?"]
    async with chatting(folder, image_cache=1) as (ask, _):
        encoded.num = 0
        answer = (await ask(first)).choices[0].message.content
        again = await ask(first, [answer], ["and now?"])
    assert again.usage.prompt_tokens_details.cached_tokens >= 32
    assert encoded.num == 1  # the cache keeps the latest, however large
    parts = [*first, f"\nassistant: {answer}\nuser: and now?"]
    assert again.choices[0].message.content == greedy(NAME, folder, parts, 6)


async def test_a_cancelled_stream_lets_go_of_its_images(folder: Path, without_collections: None) -> None:
    async with chatting(folder, image_cache=1) as (ask, app):
        encodings = program_of(app).encodings
        parts: list[Part] = ["what are ", picture(50, 30), picture(20, 20, 1)]
        stream = await ask(parts, max_tokens=400, stream=True, extra_body={"ignore_eos": True})
        await anext(aiter(stream))
        assert len(encodings._held) == 2
        await stream.close()
        async with asyncio.timeout(10):
            while app.context.image_budget.held:
                await asyncio.sleep(0.01)
        await ask(["next"])
        assert encodings._held == {}
        assert len(encodings._known) == 1  # the cache keeps the latest, however large


async def test_a_schema_holds_for_answers_about_images(folder: Path) -> None:
    schema = {"type": "object", "properties": {"n": {"enum": ["one", "two"]}}, "required": ["n"],
              "additionalProperties": False}  # fmt: skip
    given = {"type": "json_schema", "json_schema": {"name": "a", "strict": True, "schema": schema}}
    async with chatting(folder) as (ask, _):
        parts: list[Part] = ["how many? ", picture(50, 30), picture(20, 20, 1)]
        both = await asyncio.gather(
            ask(parts, max_tokens=40, response_format=given), ask(["how many?"], max_tokens=40)
        )
    assert json.loads(both[0].choices[0].message.content)["n"] in ("one", "two")


def test_a_tower_s_mask_is_computed_once_however_often_it_is_broken_off(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, name = modeling_mllama, "_prepare_aspect_ratio_attention_mask"
    compute, calls = getattr(own, name), []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return compute(*args, **kwargs)

    monkeypatch.setattr(own, name, counted)
    tower = load(folder).tower
    assert tower is not None
    (image,) = vision.prompt_of(NAME, folder, [picture(50, 30)]).images
    tower.begin(image.payload)
    while tower.resume(0.0) is None:
        pass
    assert len(calls) == 1
    assert getattr(own, name) is counted  # other models in this process keep their code


async def test_tokens_of_prompts_have_the_probabilities_of_transformers(folder: Path) -> None:
    parts: list[Part] = ["what is this ", picture(50, 30), picture(20, 20, 1), " here?"]
    body = {
        "inputs": "".join(part if isinstance(part, str) else f"![]({url_of(part)})" for part in parts),
        "parameters": {"max_new_tokens": 1, "details": True, "decoder_input_details": True},
    }
    options = {"enable_prefill_logprobs": True, "max_batch_prefill_tokens": 16}
    async with served(folder, **options) as (url, _), httpx.AsyncClient(base_url=url, timeout=60) as http:
        await http.post("/generate", json=body)  # computes what the second could find in the cache
        details = (await http.post("/generate", json=body)).json()["details"]
    prompt = vision.prompt_of(NAME, folder, parts)
    assert [token["id"] for token in details["prefill"]] == prompt.ids
    wanted = of_logits(vision.reference(folder, prompt))
    for at, token in enumerate(details["prefill"][1:], start=1):
        if at not in [image.start for image in prompt.images]:  # no logit
            assert abs(token["logprob"] - wanted[at - 1, prompt.ids[at]]) < 1e-4
