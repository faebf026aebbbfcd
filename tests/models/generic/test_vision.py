"""Vision models of every family: their logits equal those of transformers, however steps are cut."""

from __future__ import annotations

import asyncio
import functools
import gc
import json
import shutil
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import PIL.Image
import pytest
import tokenizers
import torch
import transformers

from tests.support import vision_models as vision
from tests.support.call_count import CallCount, count_calls
from tests.support.vision_chats import Part, chatting, content_of, greedy, url_of
from tests.support.vision_models import picture
from tests.support.vision_runs import load, load_native, program_of, run, served
from tests.support.vision_table import FAMILIES
from tgi_asgi.errors import InvalidRequest
from tgi_asgi.models.family import Model
from tgi_asgi.models.generic.model import GenericModel
from tgi_asgi.models.generic.vision import tower
from tgi_asgi.models.generic.vision.without_torchvision import Lfm2Images
from tgi_asgi.types import Image

TOLERANCE = 1e-3  # of the largest logit
# One of each kind: tiles, class token, axes and deepstack, bidirectional attention, other inputs, states,
# a decoder with its own head, a resampler, one sequence at a time, experts for images alone.
FEW = (
    "smolvlm", "llava", "qwen2_vl", "qwen3_vl", "gemma3", "gemma4", "paligemma", "lfm2_vl", "granite4_vision",
    "llama4", "idefics2_split", "qwen4_exp", "ernie4_5_vl",
)  # fmt: skip
WITH_TOWER = [name for name in FAMILIES if name != "gemma4_unified"]  # others have layers to break off in
# Whose text a native family computes.
NATIVE = (
    "aya_vision", "cohere2_vision", "deepseek_vl", "deepseek_vl_hybrid", "gemma3", "gemma4", "gemma4_large",
    "glm4v", "glm_ocr", "glmga", "granite_vision", "idefics2", "idefics2_split", "idefics3", "internvl",
    "lfm2_vl", "lighton_ocr", "llava", "llava_next", "llava_onevision", "minicpmv4_6", "minicpmv4_7",
    "mistral3", "paddleocr_vl", "pixtral", "qwen2_5_omni", "qwen2_5_vl", "qwen2_vl", "qwen3_5", "qwen3_5_moe",
    "qwen3_vl", "smolvlm",
)  # fmt: skip
ANSWER = list(range(120, 126))

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers' own code


def of_each(names: Sequence[str]) -> list[Any]:
    """Return these families as parameters, with those outside `FEW` marked `models`."""
    return [pytest.param(name, marks=() if name in FEW else pytest.mark.models) for name in names]


@pytest.fixture(scope="module")
def loaded(folder_of: Callable[[str], Path]) -> Callable[[str], GenericModel]:
    """Return a function that loads each family's module once."""
    return functools.cache(lambda name: load(folder_of(name)))


def distance(found: np.ndarray, wanted: np.ndarray) -> float:
    assert found.shape == wanted.shape
    assert np.isfinite(found).all()
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def prompts_of(name: str, folder: Path) -> list[vision.Prompt]:
    parts: list[list[Part]] = [
        ["what is ", picture(50, 30), " and ", picture(40, 70, 1), " this?"],
        ["no picture here, is there"],
        ["one ", picture(130, 33, 2), "?"],
    ]
    return [vision.prompt_of(name, folder, each) for each in parts]


@pytest.mark.parametrize("name", of_each(list(FAMILIES)))
def test_logits_are_those_of_transformers_however_prompts_are_cut(
    name: str, folder_of: Callable[[str], Path], loaded: Callable[[str], GenericModel]
) -> None:
    """Both ways to compute the text, if there are two, give the logits of `transformers`."""
    folder = folder_of(name)
    prompts = prompts_of(name, folder)
    reference = vision.open_reference(folder)
    wanted = [vision.reference(folder, prompt, ANSWER, reference) for prompt in prompts]
    native = load_native(folder)
    assert (native is not None) == (name in NATIVE)
    check_logits(loaded(name), prompts, wanted)
    if native is not None:
        check_logits(native, prompts, wanted)


def check_logits(
    model: GenericModel | Model, prompts: Sequence[vision.Prompt], wanted: Sequence[np.ndarray]
) -> None:
    for chunks in ([1000, 5, 7], [1, 1000, 1000]):  # each prompt whole and in pieces, beside others
        with pytest.MonkeyPatch.context() as patch:
            encoded = count_calls(patch, tower.Tower, "begin")
            found, _ = run(model, [(prompt, ANSWER) for prompt in prompts], chunks)
        for logits, expected in zip(found, wanted, strict=True):
            assert distance(logits, expected) < TOLERANCE
        assert encoded.num == 3


def test_a_slot_keeps_no_pixels_when_its_request_has_gone(
    folder_of: Callable[[str], Path], encoded: CallCount
) -> None:
    folder = folder_of("qwen2_vl")
    prompt = vision.prompt_of("qwen2_vl", folder, ["a ", picture(50, 30)])
    pixels = weakref.ref(prompt.images[0].payload["pixel_values"])
    _, program = run(load(folder), [(prompt, ANSWER)], [7])
    del prompt
    gc.collect()
    assert encoded.num == 1
    assert pixels() is None
    del program  # which lived until here


@pytest.mark.parametrize("name", of_each(list(FAMILIES)))
def test_an_image_matters_and_which_one_it_is(
    name: str, folder_of: Callable[[str], Path], loaded: Callable[[str], GenericModel]
) -> None:
    parts: list[list[Part]] = [["a ", picture(50, 30, seed), "?"] for seed in (3, 4)]
    prompts = [vision.prompt_of(name, folder_of(name), each) for each in parts]
    (one, other), _ = run(loaded(name), [(prompt, []) for prompt in prompts], [1000, 1000])
    assert distance(one[-1:], other[-1:]) > 10 * TOLERANCE


@pytest.mark.parametrize("name", of_each(WITH_TOWER))
def test_a_tower_that_is_broken_off_gives_the_same(
    name: str,
    folder_of: Callable[[str], Path],
    loaded: Callable[[str], GenericModel],
    computed_pieces: CallCount,
) -> None:
    tower = loaded(name).tower
    assert tower is not None
    (image,) = vision.prompt_of(name, folder_of(name), [picture(130, 90)]).images
    whole = tower.encode(image.payload)
    tower.begin(image.payload)
    num_calls, before = 1, computed_pieces.num
    while (encoding := tower.resume(0.0)) is None:
        num_calls += 1
    assert 10 <= computed_pieces.num - before == num_calls - 1  # the last call finds every piece computed
    for found, wanted in zip((encoding.rows, *encoding.deep), (whole.rows, *whole.deep), strict=True):
        assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", of_each(WITH_TOWER))
def test_attention_in_pieces_gives_the_same(
    name: str,
    folder_of: Callable[[str], Path],
    loaded: Callable[[str], GenericModel],
    monkeypatch: pytest.MonkeyPatch,
    computed_pieces: CallCount,
) -> None:
    encoder = loaded(name).tower
    assert encoder is not None
    (image,) = vision.prompt_of(name, folder_of(name), [picture(130, 90)]).images
    before = computed_pieces.num
    whole = encoder.encode(image.payload)
    num_whole = computed_pieces.num - before
    monkeypatch.setattr(encoder.backend, "attention_size", 1, raising=False)
    monkeypatch.setattr(tower, "_MIN_QUERIES", 3)
    cut = encoder.encode(image.payload)
    assert computed_pieces.num - before > 2 * num_whole
    for found, wanted in zip((cut.rows, *cut.deep), (whole.rows, *whole.deep), strict=True):
        assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-5)


# Families whose processor classes transformers can load without torchvision.
@pytest.mark.parametrize(
    ("name", "kind"),
    [("llava", "Llava"), ("llava_next", "LlavaNext"), ("idefics3", "Idefics3"), ("gemma3", "Gemma3"),
     ("aya_vision", "AyaVision"), ("granite4_vision", "Granite4Vision")],
)  # fmt: skip
def test_prompts_are_those_of_the_processor_of_transformers(
    name: str, kind: str, folder_of: Callable[[str], Path]
) -> None:
    folder = folder_of(name)
    parts: list[Part] = ["a ", picture(50, 30), " b ", picture(40, 90, 1), " c"]
    prompt = vision.prompt_of(name, folder, parts)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    images = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    options = dict(FAMILIES[name].processor)
    processor = getattr(transformers, f"{kind}Processor")(images, tokenizer, **options)
    text = "".join(part if isinstance(part, str) else processor.image_token for part in parts)
    pictures = [part for part in parts if not isinstance(part, str)]
    given = processor(images=[pictures] if name == "idefics3" else pictures, text=[text])
    assert list(given["input_ids"][0]) == prompt.ids


@pytest.mark.parametrize("num_images", [1, 3])
def test_one_of_several_images_is_seen_otherwise_by_onevision(
    num_images: int, folder_of: Callable[[str], Path]
) -> None:
    folder = folder_of("llava_onevision")
    parts = [part for seed in range(num_images) for part in ("a ", picture(50, 80, seed))]
    prompt = vision.prompt_of("llava_onevision", folder, parts)
    wanted = vision.reference(folder, prompt)
    (found,), _ = run(load(folder), [(prompt, [])], [1000])
    assert distance(found, wanted) < TOLERANCE
    assert prompt.images[0].num_tokens == (17 if num_images > 1 else 72)


def test_work_grows_with_the_number_of_images_not_its_square(
    folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    processor = vision.processor_of(folder_of("llava_onevision"))
    prepare, counts = processor._processor._process_images, []

    def counted(images: list[list[PIL.Image.Image]], **options: Any) -> Any:
        counts.append(sum(map(len, images)))
        return prepare(images, **options)

    monkeypatch.setattr(processor._processor, "_process_images", counted)
    images = [Image(picture(50, 80, seed), bytes([seed]) * 32, "image") for seed in range(5)]
    found, (pair, _), (alone,) = (processor.process(images[:count]) for count in (5, 2, 1))
    assert counts == [2] * 7 + [1]
    assert {each.num_tokens for each in found} == {pair.num_tokens} != {alone.num_tokens}


@pytest.mark.parametrize("options", [{"is_exact": False}, {"quantised": "Q8_0", "is_exact": False}])
def test_packed_towers_are_close(options: dict[str, Any], folder_of: Callable[[str], Path]) -> None:
    folder = folder_of("llava")
    prompt = vision.prompt_of("llava", folder, [picture(50, 30)])
    exact, packed = (load(folder, **each).tower for each in ({}, options))
    assert exact is not None
    assert packed is not None
    payload = prompt.images[0].payload
    wanted, found = exact.encode(payload).rows, packed.encode(payload).rows
    assert float((found - wanted).norm() / wanted.norm()) < 0.03


def test_a_strip_that_the_processor_refuses_is_a_client_s_mistake(folder_of: Callable[[str], Path]) -> None:
    processor = vision.processor_of(folder_of("qwen2_vl"))
    with pytest.raises(InvalidRequest, match="`image_url` is an image that the model does not take"):
        processor.process([Image(picture(4000, 3), b"d" * 32, "image_url")])


# A native text with one axis and with several, a module, and a module that runs one sequence at a time.
@pytest.mark.parametrize(
    "name",
    ["smolvlm", "qwen2_vl", "llama4", "qwen4_exp"]
    + [pytest.param(name, marks=pytest.mark.models) for name in ("llava", "idefics2_split")],
)
async def test_a_client_gets_what_transformers_would_answer(
    name: str, folder_of: Callable[[str], Path]
) -> None:
    folder = folder_of(name)
    turns: list[list[Part]] = [
        ["what is ", picture(50, 30), " and ", picture(40, 70, 1), " this?"],
        ["no picture"],
        [picture(130, 33, 2)],
    ]
    wanted = [greedy(name, folder, parts, 6) for parts in turns]
    async with chatting(folder, max_batch_prefill_tokens=48) as (ask, _):
        found = await asyncio.gather(*(ask(parts) for parts in turns), ask(turns[0], n=2))
    assert [each.choices[0].message.content for each in found] == [*wanted, wanted[0]]
    assert found[-1].choices[1].message.content == wanted[0]


@pytest.mark.parametrize("before", ["", "<s>", "</s>"])
async def test_a_chat_begins_as_the_processor_of_transformers_begins_it(
    before: str, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(folder_of("llava"), tmp_path / "copy")
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    backend.save(str(folder / "tokenizer.json"))
    options = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "chat_template.jinja").write_text(before + options["chat_template"])
    parts: list[Part] = ["what is ", picture(50, 30), " this?"]
    given = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part}
        for part in parts
    ]
    processor = transformers.AutoProcessor.from_pretrained(folder)
    chat = [{"role": "user", "content": given}]
    (wanted,) = processor.apply_chat_template(
        chat, tokenize=True, add_generation_prompt=True, return_dict=True
    )["input_ids"]
    async with served(folder) as (url, _), httpx.AsyncClient(base_url=url, timeout=60) as http:
        body = {"messages": [{"role": "user", "content": content_of(parts)}]}
        found = (await http.post("/tokenize", json=body)).json()["tokens"]
        plain = (await http.post("/tokenize", json={**body, "add_special_tokens": False})).json()["tokens"]
        shown = (await http.post("/chat_tokenize", json=body)).json()["tokenize_response"]
    assert found == [each["id"] for each in shown] == list(wanted)
    assert plain == found[before != "<s>" :]


def test_the_processor_of_lfm2_adds_no_special_tokens(folder_of: Callable[[str], Path]) -> None:
    names = ("llava", "lfm2_vl", "mistral3")
    found = [vision.processor_of(folder_of(name)).adds_special_tokens for name in names]
    assert found == [True, False, True]


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
async def test_images_side_by_side_are_refused_where_the_model_would_take_them_for_one(
    name: str, folder_of: Callable[[str], Path]
) -> None:
    image = f"![]({url_of(picture(50, 30))})"
    async with served(folder_of(name)) as (url, _), httpx.AsyncClient(base_url=url, timeout=60) as http:
        parameters = {"max_new_tokens": 1}
        apart = await http.post("/generate", json={"inputs": f"{image} {image}", "parameters": parameters})
        beside = await http.post("/generate", json={"inputs": f"{image}{image}", "parameters": parameters})
    assert (apart.status_code, beside.status_code) == (200, 422 if name == "qwen2_vl" else 200)
    assert name != "qwen2_vl" or "`inputs` must have text between two images" in beside.json()["error"]


@pytest.mark.parametrize(
    ("name", "has_cache"), [("llava", True), ("llava", False), ("lfm2_vl", True), ("qwen3_5", True)]
)
async def test_an_image_of_the_turn_before_is_not_encoded_again(
    name: str, has_cache: bool, folder_of: Callable[[str], Path], encoded: CallCount
) -> None:
    """The last two have recurrent layers, whose states are kept."""
    async with chatting(folder_of(name), prefix_cache=has_cache) as (ask, _):
        encoded.num = 0
        first: list[Part] = ["what is ", picture(50, 30)]
        answer = (await ask(first)).choices[0].message.content
        assert encoded.num == 1
        again = await ask(first, [answer], ["and now?"])
        assert encoded.num == 1
        assert (again.usage.prompt_tokens_details.cached_tokens >= 16) == has_cache
        await ask(["what is ", picture(50, 30, 1)])
        assert encoded.num == 2


async def test_streams_have_tokens_while_an_image_is_encoded(
    folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, computed_pieces: CallCount
) -> None:
    stacked = tower._stacked

    def slowly(parts: list[Any]) -> Any:
        time.sleep(0.05)  # much longer than a step, even on a busy machine
        return stacked(parts)

    async with chatting(folder_of("llava"), target_inter_token_ms=1.0) as (ask, app):
        program, seen = program_of(app), set[int]()
        run_and_sample = program.run_and_sample

        def watched(*arguments: Any) -> Any:  # each step that samples a token for the stream
            seen.add(computed_pieces.num)
            return run_and_sample(*arguments)

        monkeypatch.setattr(tower, "_stacked", slowly)
        monkeypatch.setattr(program, "run_and_sample", watched)
        stream = await ask(["tell"], max_tokens=400, stream=True, extra_body={"ignore_eos": True})
        await anext(aiter(stream))
        asked = asyncio.ensure_future(ask(["what is ", picture(50, 30, 7)]))
        async for _ in stream:
            pass
        assert (await asked).choices[0].message.content is not None
    assert len(seen) >= 4  # tokens were sampled between the tower's seven pieces


async def test_without_a_processor_the_model_takes_text_alone(
    folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(folder_of("llava"), tmp_path / "copy")
    (folder / "preprocessor_config.json").unlink()
    (folder / "processor_config.json").unlink()
    async with chatting(folder) as (ask, _):
        assert (await ask(["no picture"])).choices
        with pytest.raises(openai.BadRequestError, match="image"):
            await ask([picture(9, 9)])


@pytest.mark.parametrize(("name", "side"), [("mistral3", 14), ("pixtral", 7)])
def test_pixtral_s_rows_end_with_a_break_and_the_image_with_an_end(
    name: str, side: int, folder_of: Callable[[str], Path]
) -> None:
    (made,) = vision.processor_of(folder_of(name)).process([Image(picture(50, 30), b"d" * 32, "image")])
    (size,) = made.payload["image_sizes"].tolist()
    rows = ["[IMG]" * (size[1] // side)] * (size[0] // side)
    assert made.text == f"{'[IMG_BREAK]'.join(rows)}[IMG_END]"


def test_an_image_that_mistral_s_code_fails_on_is_a_client_s_mistake(
    folder_of: Callable[[str], Path],
) -> None:
    with pytest.raises(InvalidRequest, match="it is too small"):
        vision.processor_of(folder_of("mistral3")).process([Image(picture(1, 1), b"d" * 32, "image")])


def test_pixtral_itself_takes_an_image_of_one_patch(folder_of: Callable[[str], Path]) -> None:
    folder = folder_of("pixtral")
    prompt = vision.prompt_of("pixtral", folder, ["a ", picture(1, 1), "?"])
    assert [image.num_tokens for image in prompt.images] == [1]
    [found], _ = run(load(folder), [(prompt, ANSWER)], [3])
    wanted = vision.reference(folder, prompt, ANSWER, vision.open_reference(folder))
    assert distance(found, wanted) < TOLERANCE


@pytest.mark.parametrize(
    "change", [{"do_normalize": False}, {"do_rescale": None}, {"do_pad": False}, {"resample": 3}], ids=str
)
def test_what_lfm2_s_files_cannot_ask_for_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(change))} must be"):
        Lfm2Images(change)


def test_one_mean_may_stand_for_all_of_lfm2_s_colours() -> None:
    one, three = (Lfm2Images({"image_mean": mean})([picture(50, 30)]) for mean in (0.4, [0.4] * 3))
    assert torch.equal(one["pixel_values"], three["pixel_values"])


@pytest.mark.parametrize(
    ("size", "grid", "seen"),  # according to Lfm2VlImageProcessor of transformers 5.23
    [((50, 30), (1, 1), (224, 352)), ((800, 600), (1, 1), (416, 576)), ((33, 1200), (1, 1), (1568, 64)),
     ((3000, 2000), (2, 3), (416, 608))],
)  # fmt: skip
def test_lfm2_s_images_are_cut_as_its_own_processor_does(
    size: tuple[int, int], grid: tuple[int, int], seen: tuple[int, int]
) -> None:
    made = Lfm2Images({})([picture(*size)])
    assert (made["image_rows"], made["image_cols"], made["image_sizes"]) == ([grid[0]], [grid[1]], [seen])
    num_tiles = grid[0] * grid[1] + (grid != (1, 1))
    assert made["pixel_values"].shape == (num_tiles, 1024, 768)
    assert made["spatial_shapes"][-1].tolist() == [seen[0] // 16, seen[1] // 16]
