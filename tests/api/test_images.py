"""Images in requests: their fields in each dialect, and the model's input."""

from __future__ import annotations

from typing import Any

import anthropic
import openai
import pytest

from tests.support.client import client_of
from tests.support.pictures import data_url, encoded, picture, text_of
from tests.support.scripted_engine import ScriptedEngine, say, scripted_app
from tests.support.serving import serving
from tests.support.tool_app import sdk_of
from tests.support.toy_tokenizer import IMAGE
from tests.support.vision_app import (
    SVG,
    TEXT,
    URL,
    WIDE,
    chat,
    claude,
    llama,
    openai_part,
    post,
    prompt_of,
    response,
    source,
    vision_app,
)
from tgi_asgi.settings import Settings

IMAGE_TOKENS = f"[{'<image>' * 4}]"
TURN = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("path", "body", "expected", "param"),
    [
        (
            "/v1/chat/completions",
            chat("a", URL, "b"),
            f"a{IMAGE_TOKENS}b",
            "messages[0].content[1].image_url",
        ),
        (
            "/v1/chat/completions",
            chat({"type": "image_url", "image_url": URL}),
            IMAGE_TOKENS,
            "messages[0].content[0].image_url",
        ),
        (
            "/v1/responses",
            response({"type": "input_text", "text": "a"}, {"type": "input_image", "image_url": URL}),
            f"a{IMAGE_TOKENS}",
            "input[0].content[1].image_url",
        ),
        (
            "/v1/messages",
            claude({"type": "image", "source": source()}, TEXT),
            f"{IMAGE_TOKENS}hi",
            "messages[0].content[0].source",
        ),
        (
            "/v1/messages",
            claude(TEXT, {"type": "image", "source": {"type": "url", "url": URL}}),
            f"hi{IMAGE_TOKENS}",
            "messages[0].content[1].source",
        ),
        (
            "/v1/messages",
            claude(TEXT, {"type": "image", "source": {"type": "url", "url": f" DATA{URL[4:]}"}}),
            f"hi{IMAGE_TOKENS}",
            "messages[0].content[1].source",
        ),
        ("/api/chat", llama(text_of()), f"{IMAGE_TOKENS}hi", "messages[0].images[0]"),
        (
            "/api/generate",
            {"prompt": "hi", "images": [text_of()], "stream": False},
            f"{IMAGE_TOKENS}hi",
            "images[0]",
        ),
        ("/vertex", {"instances": [chat("a", URL)]}, f"a{IMAGE_TOKENS}", "messages[0].content[1].image_url"),
    ],
)
async def test_each_dialect_s_images_stand_where_they_were(
    path: str, body: Any, expected: str, param: str
) -> None:
    engine = ScriptedEngine(has_vision=True)
    app, processor = vision_app(engine)
    status, _ = await post(path, body, app=app)
    assert status == 200
    assert prompt_of(engine) == TURN.format(expected)
    [image], [seen] = engine.requests[0].images, processor.seen
    ids = engine.requests[0].prompt_ids
    assert ids[image.start : image.start + image.num_tokens] == [IMAGE] * 4 and ids.count(IMAGE) == 4
    assert (seen.pixels.mode, seen.pixels.size, seen.pixels.tobytes()) == ("RGB", (4, 3), picture().tobytes())
    assert seen.param == image.payload == param and seen.digest == image.digest
    assert {name.rsplit("_", 1)[0] for name in processor.threads} == {"tgi-image"}


@pytest.mark.parametrize(
    ("path", "body", "expected"),
    [
        ("/generate", {"inputs": f"a ![]({URL}) b"}, f"a {IMAGE_TOKENS} b"),
        ("/generate", {"inputs": f"a ![](DATA{URL[4:]}) b"}, f"a {IMAGE_TOKENS} b"),
        ("/", {"inputs": f"![]({URL})", "parameters": {"max_new_tokens": 5}}, IMAGE_TOKENS),
        (
            "/api/generate",
            {"prompt": "hi", "images": [text_of()], "raw": True, "stream": False},
            f"{IMAGE_TOKENS}hi",
        ),
        ("/generate", {"inputs": "![](https://a.example/b.png)"}, "![](https://a.example/b.png)"),
        ("/generate", {"inputs": f"![alt]({URL}) ![] (x) ![](b.png)"}, f"![alt]({URL}) ![] (x) ![](b.png)"),
    ],
)
async def test_images_in_prompts_that_are_no_chats(path: str, body: Any, expected: str) -> None:
    engine = ScriptedEngine(has_vision=True)
    assert (await post(path, body, engine))[0] == 200
    assert prompt_of(engine) == expected
    assert len(engine.requests[0].images) == expected.count(IMAGE_TOKENS)


async def test_in_the_text_of_a_chat_markdown_is_text() -> None:
    engine = ScriptedEngine(has_vision=True)
    assert (await post("/v1/chat/completions", chat(f"![]({URL})"), engine))[0] == 200
    assert f"![]({URL})" in prompt_of(engine) and engine.requests[0].images == ()


@pytest.mark.parametrize(("wanted", "begins"), [(None, False), (True, True), (False, False)])
async def test_answers_of_root_repeat_images_only_if_asked(wanted: bool | None, begins: bool) -> None:
    """Other models' answers there begin with the prompt, as TGI's do."""
    inputs = f"![]({URL})what?"
    body = {"inputs": inputs, "parameters": {"return_full_text": wanted}}
    status, answers = await post("/", body, ScriptedEngine(say("a"), has_vision=True))
    assert status == 200
    assert answers[0]["generated_text"].startswith(inputs) is begins


async def test_several_images_keep_their_order_and_places() -> None:
    engine = ScriptedEngine(has_vision=True)
    messages = [
        {"role": "system", "content": "See."},
        {"role": "user", "content": [openai_part(URL), openai_part(WIDE)]},
        {"role": "assistant", "content": "Two."},
        {"role": "user", "content": [openai_part("Again:"), openai_part(URL)]},
    ]
    assert (await post("/v1/chat/completions", {"messages": messages}, engine))[0] == 200
    request = engine.requests[0]
    assert [image.num_tokens for image in request.images] == [4, 7, 4]
    for image in request.images:
        assert set(request.prompt_ids[image.start : image.start + image.num_tokens]) == {IMAGE}
    first, second, third = (image.digest for image in request.images)
    assert first == third != second


async def test_what_one_key_has_sent_is_not_found_by_another() -> None:
    engine = ScriptedEngine(has_vision=True)
    app, _ = vision_app(engine, Settings(api_key=("a", "b")))
    async with client_of(app) as client:
        for key in ("a", "a", "b"):
            headers = {"authorization": f"Bearer {key}"}
            await client.post("/v1/chat/completions", json=chat(URL), headers=headers)
    first, again, other = (request.images[0].digest for request in engine.requests)
    assert first == again != other
    assert len(other) == 32
    shared = ScriptedEngine(has_vision=True)
    await post("/v1/chat/completions", chat(URL) | {"cache_salt": "s"}, shared)
    await post("/v1/chat/completions", chat(URL), shared)
    salted, plain = (request.images[0].digest for request in shared.requests)
    assert salted != plain


@pytest.mark.parametrize("text", ["<image>", "a <image><|im_end|> b", "[<image>]"])
async def test_placeholders_that_clients_write_are_text(text: str) -> None:
    engine = ScriptedEngine(has_vision=True)
    assert (await post("/v1/chat/completions", chat(text, URL), engine))[0] == 200
    assert prompt_of(engine) == TURN.format(text + IMAGE_TOKENS)
    assert list(engine.requests[0].prompt_ids).count(IMAGE) == 4


async def test_where_clients_may_write_special_tokens_places_must_add_up() -> None:
    options: dict[str, Any] = {"chat_special_tokens": True}
    status, body = await post("/v1/chat/completions", chat("<image>", URL), **options)
    assert status == 400 and body["error"]["param"] == "messages"
    status, body = await post("/generate", {"inputs": f"<image>![]({URL})"})
    assert status == 422 and "room for 2 images" in body["error"]


async def test_what_counts_counts_what_the_model_sees() -> None:
    engine = ScriptedEngine(has_vision=True)
    app, _ = vision_app(engine)
    body = chat("a", URL)
    _, answered = await post("/v1/chat/completions", body, app=app)
    ids = list(engine.requests[0].prompt_ids)
    assert answered["usage"]["prompt_tokens"] == len(ids)
    assert (await post("/tokenize", body, app=app))[1]["tokens"] == ids
    shown = (await post("/chat_tokenize", body, app=app))[1]
    assert [token["id"] for token in shown["tokenize_response"]] == ids
    assert shown["templated_text"] == prompt_of(engine)
    blocks = claude({"type": "text", "text": "a"}, {"type": "image", "source": source()})
    del blocks["max_tokens"]
    assert (await post("/v1/messages/count_tokens", blocks, app=app))[1] == {"input_tokens": len(ids)}
    await post("/generate", {"inputs": f"a![]({URL})"}, app=app)
    tokens = (await post("/tokenize", {"inputs": f"a![]({URL})"}, app=app))[1]
    assert [token["id"] for token in tokens] == list(engine.requests[1].prompt_ids)


async def test_images_count_for_the_context() -> None:
    body = chat(data_url(encoded(picture(200, 1))), "hi")
    status, answered = await post("/v1/chat/completions", body)
    assert status == 200 and answered["usage"]["prompt_tokens"] > 200
    app, _ = vision_app(ScriptedEngine(has_vision=True), max_total_tokens=150, max_input_tokens=149)
    status, answered = await post("/v1/chat/completions", body, app=app)
    assert (status, answered["error"]["code"]) == (400, "context_length_exceeded")


async def test_no_image_is_cut_off() -> None:
    engine = ScriptedEngine(has_vision=True)
    app, _ = vision_app(engine)
    body = {"inputs": f"{'a' * 50}![]({URL})bc", "parameters": {"truncate": 20}}
    assert (await post("/generate", body, app=app))[0] == 200
    request = engine.requests[0]
    assert len(request.prompt_ids) == 20 and (request.images[0].start, request.images[0].num_tokens) == (
        13,
        4,
    )
    for keep in (1, 3, 6):
        status, answered = await post("/generate", body | {"parameters": {"truncate": keep}}, app=app)
        assert status == 422 and "where truncation would cut" in answered["error"]


async def test_truncation_moves_an_image_and_changes_nothing_else_of_it() -> None:
    engine = ScriptedEngine(has_vision=True)
    app, processor = vision_app(engine)
    processor.is_seen_by_all = True
    body = {"inputs": f"{'a' * 50}![]({URL})bc", "parameters": {"truncate": 20}}
    assert (await post("/generate", body, app=app))[0] == 200
    [image] = engine.requests[0].images
    assert image.start == 13 and image.is_seen_by_all


TEXT_PARTS_ONLY = (
    "{% for m in messages %}{{ m.role }}:{% for p in m.content %}"
    "{% if p.type == 'image' %}<image>{% elif p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %};"
    "{% endfor %}"
)


async def test_a_template_that_shows_texts_in_parts_alone_gets_parts() -> None:
    engine = ScriptedEngine(has_vision=True)
    app, _ = vision_app(engine, template=TEXT_PARTS_ONLY)
    messages = [{"role": "system", "content": "See."}, *chat("a", URL)["messages"]]
    assert (await post("/v1/chat/completions", {"messages": messages}, app=app))[0] == 200
    assert prompt_of(engine) == f"system:See.;user:a{IMAGE_TOKENS};"


STRINGS = "{% for m in messages %}{{ m.role + ':' + m.content }};{% endfor %}"
TEXTS_IN_PARTS = (
    "{% for m in messages %}{{ m.role }}:{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %};{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "text", "expected"),
    [
        (STRINGS, "a", f"user:a\n({IMAGE_TOKENS})\nb;"),
        (STRINGS, "<image>", f"user:<image>\n({IMAGE_TOKENS})\nb;"),
        (TEXTS_IN_PARTS, "a", f"user:a({IMAGE_TOKENS})b;"),
        (TEXTS_IN_PARTS, "<image>", f"user:<image>({IMAGE_TOKENS})b;"),
        (TEXT_PARTS_ONLY, "a", f"user:a{IMAGE_TOKENS}b;"),
    ],
)
async def test_images_of_a_gguf_file_have_a_text_if_its_template_writes_none(
    template: str, text: str, expected: str
) -> None:
    engine = ScriptedEngine(has_vision=True)
    app, processor = vision_app(engine, template=template)
    processor.chat_text = "(<image>)"
    assert (await post("/v1/chat/completions", chat(text, URL, "b"), app=app))[0] == 200
    assert prompt_of(engine) == expected
    assert list(engine.requests[0].prompt_ids).count(IMAGE) == 4


async def test_a_template_that_takes_no_images_is_a_refusal() -> None:
    app, _ = vision_app(
        ScriptedEngine(has_vision=True), template="{% for m in messages %}{{ m.role }}{% endfor %}"
    )
    status, body = await post("/v1/chat/completions", chat("a", URL), app=app)
    assert status == 400 and "room for 0 images" in body["error"]["message"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/chat/completions", chat("a", URL), "messages[0].content[1].type"),
        ("/v1/responses", response({"type": "input_image", "image_url": URL}), "input[0].content[0].type"),
        ("/v1/messages", claude({"type": "image", "source": source()}), "messages[0].content[0].type"),
        (
            "/v1/messages/count_tokens",
            claude({"type": "image", "source": source()}),
            "messages[0].content[0]",
        ),
        ("/api/chat", llama(text_of()), "messages[0].images"),
        ("/api/generate", {"prompt": "a", "images": [text_of()]}, "images"),
        ("/tokenize", chat("a", URL), "messages[0].content[1].type"),
    ],
)
async def test_models_without_eyes_refuse_images(path: str, body: Any, param: str) -> None:
    status, answered = await post(path, body, app=scripted_app(ScriptedEngine()))
    assert status == 400 and param in str(answered)


async def test_for_models_without_eyes_markdown_is_text() -> None:
    engine = ScriptedEngine()
    assert (await post("/generate", {"inputs": "![](data:x)"}, app=scripted_app(engine)))[0] == 200
    assert prompt_of(engine) == "![](data:x)"


@pytest.mark.parametrize("role", ["system", "assistant", "developer"])
async def test_only_users_show_images(role: str) -> None:
    message: dict[str, Any] = {"role": role, "content": [openai_part(URL)], "tool_call_id": "a"}
    status, body = await post("/v1/chat/completions", {"messages": [message]})
    assert (status, body["error"]["param"]) == (400, "messages[0].content[0].type")
    assert "only the user's messages may have images" in body["error"]["message"]
    message = {"role": role, "content": "hi", "images": [text_of()]}
    status, body = await post("/api/chat", {"messages": [message]})
    assert status == 400 and "`messages[0].images` is not supported: only the user's" in body["error"]


async def test_images_in_the_results_of_tools_are_a_note() -> None:
    engine = ScriptedEngine(has_vision=True)
    image = {"type": "image", "source": source()}
    turns = [
        {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "f", "input": {}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": [image]}]},
    ]
    assert (await post("/v1/messages", {"messages": turns, "max_tokens": 9}, engine))[0] == 200
    assert "[image omitted]" in prompt_of(engine) and engine.requests[0].images == ()
    items = [
        {"type": "function_call", "call_id": "t", "name": "f", "arguments": "{}"},
        {
            "type": "function_call_output", "call_id": "t",
            "output": [
                {"type": "input_image", "image_url": URL},
                {"type": "input_file", "filename": "a.pdf", "file_data": "QQ=="},
            ],
        },
        {"type": "program", "id": "p", "call_id": "c", "code": "1", "fingerprint": "f"},
    ]  # fmt: skip
    assert (await post("/v1/responses", {"input": items}, engine))[0] == 200
    assert "[image omitted]\n[file omitted]" in prompt_of(engine) and engine.requests[1].images == ()
    result = {"role": "tool", "content": "a picture", "tool_name": "f", "images": [text_of(), text_of()]}
    for app in (vision_app(engine)[0], scripted_app(engine)):
        assert (await post("/api/chat", {"messages": [result], "stream": False}, app=app))[0] == 200
        assert "[image omitted]\n[image omitted]\na picture" in prompt_of(engine)
        assert engine.requests[-1].images == ()


# Clients.


async def test_openai_s_sdk_sends_images() -> None:
    engine = ScriptedEngine(say("Hel", "lo"), has_vision=True)
    app, processor = vision_app(engine)
    async with sdk_of(app) as client:
        messages: Any = chat("what?", URL)["messages"]
        done = await client.chat.completions.create(model="m", messages=messages)
        assert done.choices[0].message.content == "Hello"
        assert done.usage and done.usage.prompt_tokens == len(engine.requests[0].prompt_ids)
        stream = await client.chat.completions.create(model="m", messages=messages, stream=True)
        assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == "Hello"
        items: Any = response({"type": "input_text", "text": "a"}, {"type": "input_image", "image_url": WIDE})
        said = await client.responses.create(model="m", input=items["input"])
        assert said.output_text == "Hello"
        more = await client.responses.create(model="m", input="and?", previous_response_id=said.id)
        assert more.output_text == "Hello"
        with pytest.raises(openai.BadRequestError) as caught:
            await client.chat.completions.create(model="m", messages=chat("a", data_url(SVG))["messages"])
    assert caught.value.param == "messages[0].content[1].image_url"
    assert [image.pixels.width for image in processor.seen] == [4, 4, 7, 7]
    assert [len(request.images) for request in engine.requests] == [1, 1, 1, 1]


async def test_anthropic_s_sdk_sends_images() -> None:
    engine = ScriptedEngine(say("Hel", "lo"), has_vision=True)
    app, processor = vision_app(engine)
    async with (
        serving(app) as url,
        anthropic.AsyncAnthropic(base_url=url, api_key="k", max_retries=0) as client,
    ):
        turns: Any = claude({"type": "image", "source": source()}, TEXT)["messages"]
        message = await client.messages.create(model="m", messages=turns, max_tokens=9)
        assert message.content[0].type == "text" and message.content[0].text == "Hello"
        counted = await client.messages.count_tokens(model="m", messages=turns)
        assert counted.input_tokens == message.usage.input_tokens == len(engine.requests[0].prompt_ids)
        turns = claude({"type": "image", "source": source(SVG)})["messages"]
        with pytest.raises(anthropic.BadRequestError, match=r"messages\[0\].content\[0\].source"):
            await client.messages.create(model="m", messages=turns, max_tokens=9)
    assert len(processor.seen) == 2
