"""Idefics 2: images side by side share a token, and a word after one gets a space, as by its processor."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import PIL.Image
import pytest
import transformers

from tests.models.generic.test_http import serving
from tests.support import vision_models as vision
from tests.support.vision_chats import url_of
from tests.support.vision_models import picture
from tgi_asgi import ops
from tgi_asgi.errors import InvalidRequest
from tgi_asgi.types import Image

# That of the published checkpoints.
TEMPLATE = (
    "{% for message in messages %}{{message['role'].capitalize()}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
IMAGE = "{}"

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers' own code


@pytest.fixture(scope="module", params=["idefics2", "idefics2_split"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    ops.configure_threads(1, nice=0, pin=False)
    made = tmp_path_factory.mktemp(request.param)
    vision.make(request.param, made)
    (made / "chat_template.jinja").write_text(TEMPLATE)
    return made


def pictures(count: int) -> list[PIL.Image.Image]:
    return [picture(50, 30 + 9 * seed, seed) for seed in range(count)]


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[httpx.Client]:
    with serving(folder, model_impl="auto", max_total_tokens=4096) as client:
        yield client


def ids_of(client: httpx.Client, path: str, body: dict[str, Any]) -> list[int]:
    """Return the tokens of a request's prompt."""
    found: list[Any] = client.post(path, json=body).raise_for_status().json()
    return found["tokens"] if isinstance(found, dict) else [each["id"] for each in found]


@pytest.mark.parametrize(
    "text",
    ["a {} b {}{} c", "{}word", "{}\nline", "{}", "{}{}{}", "{}<end_of_utterance>", "{}{}word{}<pad>{}.",
     "{} <fake_token_around_image>x<fake_token_around_image>{}", "{}<fake_token_around_image>x",
     "{}é {}<x {}<s>"],
)  # fmt: skip
def test_a_prompt_has_the_tokens_of_its_own_processor(text: str, folder: Path, client: httpx.Client) -> None:
    given = pictures(text.count(IMAGE))
    own: Any = vision.processor_of(folder)._processor
    (wanted,) = own(images=given, text=[text.replace(IMAGE, "<image>")])["input_ids"]
    inputs = text.format(*(f"![]({url_of(each)})" for each in given))
    assert ids_of(client, "/tokenize", {"inputs": inputs}) == list(wanted)


@pytest.mark.parametrize(
    "turns",
    [
        [[None, "what?"]],
        [["these two:", None, None, "and", None], ["yes"], [None]],
        [["no picture"], ["so?"], [None, None]],
        [[None, "\nwhat is <this>?"]],
    ],
)
def test_a_chat_has_the_tokens_of_its_own_processor(
    turns: list[list[str | None]], folder: Path, client: httpx.Client
) -> None:
    given = iter(pictures(sum(turn.count(None) for turn in turns)))
    messages: list[dict[str, Any]] = [
        {
            "role": ("user", "assistant")[i % 2],
            "content": [
                {"type": "image", "image": next(given)} if part is None else {"type": "text", "text": part}
                for part in turn
            ],
        }
        for i, turn in enumerate(turns)
    ]
    processor = transformers.AutoProcessor.from_pretrained(folder)
    (wanted,) = processor.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=True, return_dict=True
    )["input_ids"]
    for message in messages:
        message["content"] = [
            {"type": "image_url", "image_url": {"url": url_of(part["image"])}} if "image" in part else part
            for part in message["content"]
        ]
    assert ids_of(client, "/tokenize", {"messages": messages}) == list(wanted)


def test_tokens_that_a_client_writes_are_plain_text(folder: Path, client: httpx.Client) -> None:
    """They neither merge with the image's nor count as one."""
    text = "<fake_token_around_image><image>x"
    content = [
        {"type": "image_url", "image_url": {"url": url_of(picture(50, 30))}},
        {"type": "image_url", "image_url": {"url": url_of(picture(40, 30))}},
        {"type": "text", "text": text},
    ]
    found = ids_of(client, "/tokenize", {"messages": [{"role": "user", "content": content}]})
    tokenizer: Any = vision.processor_of(folder)._processor.tokenizer
    image, fence = (
        tokenizer.convert_tokens_to_ids(each) for each in ("<image>", "<fake_token_around_image>")
    )
    tiles = 5 if json.loads((folder / "preprocessor_config.json").read_text())["do_image_splitting"] else 1
    assert (found.count(image), found.count(fence)) == (2 * tiles * 4, 2 * tiles + 1)
    last = len(found) - 1 - found[::-1].index(fence)
    assert tokenizer.decode(found[last + 1 :]).startswith(text)


def test_a_tokenizer_that_does_not_name_its_tokens_gives_the_same(tmp_path: Path) -> None:
    """As that of the published checkpoints."""
    vision.make("idefics2", tmp_path)
    image = Image(picture(50, 30), bytes(32), "image")
    (named,) = vision.processor_of(tmp_path).process([image])
    path = tmp_path / "tokenizer_config.json"
    options = json.loads(path.read_text())
    del options["extra_special_tokens"]
    path.write_text(json.dumps(options))
    (found,) = vision.processor_of(tmp_path).process([image])
    assert (found.text, found.fence, found.token_id) == (named.text, named.fence, named.token_id)


def test_an_image_that_cannot_be_split_is_a_client_s_mistake(tmp_path: Path) -> None:
    vision.make("idefics2_split", tmp_path)
    with pytest.raises(InvalidRequest, match="`image_url` is an image that the model does not take"):
        vision.processor_of(tmp_path).process([Image(picture(1, 1), bytes(32), "image_url")])
