"""Refused images: odd shapes, broken files, too many, too large; and bad answers of image servers."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Sequence
from typing import Any

import PIL.Image
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.api.test_fuzz import ANYTHING, SCALARS
from tests.support.client import client_of
from tests.support.fuzzing import post_and_check
from tests.support.pictures import Answer, answer, data_url, encoded, endless, picture, text_of, web
from tests.support.scripted_engine import ScriptedEngine, say, scripted_app
from tests.support.vision_app import (
    PAYLOAD_BYTES,
    SVG,
    TEMPLATE,
    URL,
    WIDE,
    FakeProcessor,
    chat,
    claude,
    llama,
    post,
    prompt_of,
    response,
    source,
    vision_app,
)
from tgi_asgi.api import images as loading
from tgi_asgi.app import App
from tgi_asgi.images.fetch import Fetcher
from tgi_asgi.settings import Settings

IMAGE_TOKENS = f"[{'<image>' * 4}]"


BROKEN = [
    "data:image/png;base64,AAAA", "data:image/png;base64,", "data:image/png,abc",
    "data:text/plain;base64,aGk=", data_url(SVG, "image/svg+xml"), data_url(encoded()[:-40]),
    data_url(encoded(picture(30, 30), "JPEG")[:400]), data_url(encoded(picture(200, 200))),
    "ftp://a.example/a.png", "file:///etc/passwd", "http://localhost/", "http://127.0.0.1:9/",
    "http://169.254.169.254/latest/", "http://[::1]/", "http://2130706433/", "http://0x7f.1/", "hello", "",
]  # fmt: skip


@pytest.mark.parametrize("url", BROKEN)
async def test_what_is_no_image_is_refused_by_its_path(url: str) -> None:
    part = {"type": "image_url", "image_url": {"url": url}}
    status, body = await post("/v1/chat/completions", chat("a", part), max_image_pixels=10_000)
    assert (status, body["error"]["param"]) == (400, "messages[0].content[1].image_url")
    block = {"type": "image", "source": {"type": "url", "url": url}}
    status, body = await post("/v1/messages", claude(block), max_image_pixels=10_000)
    assert status == 400 and "messages[0].content[0].source" in body["error"]["message"]
    if url.startswith("data:"):
        status, body = await post("/generate", {"inputs": f"![]({url})"}, max_image_pixels=10_000)
        assert status == 422 and "`inputs`" in body["error"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/chat/completions", chat({"type": "image_url"}), "messages[0].content[0].image_url"),
        (
            "/v1/chat/completions",
            chat({"type": "image_url", "image_url": 5}),
            "messages[0].content[0].image_url",
        ),
        (
            "/v1/chat/completions",
            chat({"type": "image_url", "image_url": {}}),
            "messages[0].content[0].image_url.url",
        ),
        ("/v1/chat/completions", chat({"type": "input_audio"}), "messages[0].content[0].type"),
        ("/v1/responses", response({"type": "input_image"}), "input[0].content[0].image_url"),
        ("/v1/responses", response({"type": "input_image", "file_id": "f"}), "input[0].content[0].file_id"),
        ("/v1/responses", response({"type": "input_file"}), "input[0].content[0].type"),
        (
            "/v1/responses",
            response({"type": "input_text", "text": "a"}, {"type": "input_text"}),
            "input[0].content[1].text",
        ),
        ("/v1/messages", claude({"type": "image"}), "messages[0].content[0].source.type"),
        (
            "/v1/messages",
            claude({"type": "image", "source": {"type": "file"}}),
            "messages[0].content[0].source.type",
        ),
        (
            "/v1/messages",
            claude({"type": "image", "source": source() | {"media_type": "text/plain"}}),
            "messages[0].content[0].source.media_type",
        ),
        (
            "/v1/messages",
            claude({"type": "image", "source": source() | {"data": 5}}),
            "messages[0].content[0].source.data",
        ),
        ("/api/chat", llama("!!!"), "messages[0].images[0]"),
        ("/api/chat", llama(text_of(), 5), "messages[0].images[1]"),
        ("/api/generate", {"prompt": "a", "images": ["http://a.example/"]}, "images[0]"),
        (
            "/vertex",
            {"instances": [chat("a"), chat(URL, "data:image/png;base64,AAAA")]},
            "instances[1]: `messages[0].content[1].image_url`",
        ),
    ],
)
async def test_odd_shapes_are_refused_by_their_path(path: str, body: Any, param: str) -> None:
    status, answered = await post(path, body)
    assert status in (400, 422)
    message = answered["error"] if isinstance(answered["error"], str) else answered["error"]["message"]
    assert f"`{param}`" in message or param in message


async def test_a_hundred_images_are_too_many() -> None:
    app, processor = vision_app(ScriptedEngine(has_vision=True))
    status, body = await post("/v1/chat/completions", chat(*[URL] * 100), app=app)
    assert (status, body["error"]["param"]) == (400, "messages[0].content[16].image_url")
    assert (await post("/v1/chat/completions", chat(*[URL] * 17), app=app))[0] == 400
    assert (await post("/vertex", {"instances": [chat(*[URL] * 9)] * 2}, app=app))[0] == 422
    assert (await post("/tokenize", chat(*[URL] * 17), app=app))[0] == 400
    assert processor.seen == []
    assert (await post("/v1/chat/completions", chat(*[URL] * 16), app=app))[0] == 200
    assert (await post("/v1/chat/completions", chat(URL), max_images=0))[0] == 400


async def test_decoded_bytes_are_bounded_for_one_and_for_all() -> None:
    large = data_url(encoded(PIL.Image.new("RGB", (100, 100))))  # 40,000 bytes, and as many for decoding
    app, _ = vision_app(ScriptedEngine(has_vision=True), Settings(max_image_memory=100_000))
    assert (await post("/v1/chat/completions", chat(large), app=app))[0] == 200
    status, body = await post("/v1/chat/completions", chat(large, large), app=app)
    assert (status, body["error"]["param"]) == (400, "messages[0].content[1].image_url")
    app.context.image_budget.acquire(50_000)
    async with client_of(app) as client:
        refused = await client.post("/v1/chat/completions", json=chat(large))
    assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
    assert app.context.image_budget.held == 50_000
    app.context.image_budget.release(50_000)
    assert (await post("/v1/chat/completions", chat(large), app=app))[0] == 200


async def test_what_the_model_takes_is_held_until_the_request_ends() -> None:
    engine = ScriptedEngine(has_vision=True)
    app, _ = vision_app(engine)
    running, go_on = asyncio.Event(), asyncio.Event()
    spoken = say("a")

    async def script(channel: Any) -> Any:
        running.set()
        await go_on.wait()
        async for batch in spoken(channel):
            yield batch

    engine.script = script
    task = asyncio.create_task(post("/v1/chat/completions", chat(URL, URL), app=app))
    await running.wait()
    assert app.context.image_budget.held == 2 * PAYLOAD_BYTES
    go_on.set()
    assert (await task)[0] == 200


class Failing(FakeProcessor):
    def process(self, images: Sequence[Any]) -> Any:
        raise ZeroDivisionError


async def test_a_processor_that_fails_holds_nothing() -> None:
    engine = ScriptedEngine(has_vision=True)
    app = scripted_app(engine, chat_template=TEMPLATE, image_processor=Failing())
    assert (await post("/v1/chat/completions", chat(URL), app=app))[0] == 500
    assert engine.num_permits == 128


def reaching(app: App, names: dict[str, list[str]] | None = None, allowed: Sequence[str] = ()) -> None:
    """Let an app fetch from this machine as if it were the internet; `names` maps other names."""

    async def lookup(name: str, port: int) -> list[str]:
        return (names or {}).get(name, ["127.0.0.1"])

    async def tls() -> ssl.SSLContext:
        return ssl.create_default_context()

    app.context.fetcher = Fetcher(
        frozenset(allowed), lookup, tls, is_allowed=lambda each: each == "127.0.0.1"
    )


async def never(head: bytes, writer: asyncio.StreamWriter) -> None:
    await asyncio.Event().wait()


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize"])
async def test_images_are_fetched(path: str) -> None:
    engine = ScriptedEngine(has_vision=True)
    app, processor = vision_app(engine)
    reaching(app)
    answers: dict[str, Answer] = {"/a": answer(encoded()), "/b": answer(encoded(picture(7, 2)))}
    async with web(answers) as (port, heads):
        base = f"http://cdn.example:{port}"
        status, _ = await post(path, chat(f"{base}/a", URL, f"{base}/b"), app=app)
    assert status == 200 and len(heads) == 2
    assert [image.pixels.width for image in processor.seen] == [4, 4, 7]


@pytest.mark.parametrize(
    ("sent", "status", "word"),
    [
        (answer(SVG), 400, "none of PNG"),
        (answer(b"", "404 Not Found"), 400, "status 404"),
        (answer(b"", "302 Found", location="http://inside.example/"), 400, "not public"),
        (answer(b"x", content_length=10**9), 413, "may have"),
        (endless, 413, "may have"),
        (answer(bytes(2000)), 413, "may have"),
        (b"", 400, "no whole answer"),
        (never, 408, "within"),
    ],
)
async def test_what_cannot_be_fetched_is_refused_by_its_path(
    sent: Answer, status: int, word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if sent is never:
        monkeypatch.setattr(loading, "FETCH_TIMEOUT_S", 0.1)
    app, _ = vision_app(ScriptedEngine(has_vision=True), Settings(payload_limit=1000))
    reaching(app, {"inside.example": ["10.0.0.1"]})
    async with web({"/": sent}) as (port, _):
        got, body = await post("/v1/chat/completions", chat("a", f"http://a.example:{port}/"), app=app)
    assert (got, body["error"]["param"]) == (status, "messages[0].content[1].image_url")
    assert word in body["error"]["message"]


async def test_an_image_may_come_just_when_the_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "FETCH_TIMEOUT_S", 0.0)
    app, _ = vision_app(ScriptedEngine(has_vision=True))

    async def fetch(*_: Any) -> bytes:
        return encoded()

    monkeypatch.setattr(app.context.fetcher, "fetch", fetch)
    status, body = await post("/v1/chat/completions", chat("http://a.example/"), app=app)
    assert (status, body["error"]["param"]) == (408, "messages[0].content[0].image_url")


async def test_many_beginnings_of_images_are_read_once() -> None:
    """If each searched the whole rest of the text for its end, this would take minutes."""
    body = {"inputs": "![](" * 100_000, "parameters": {"truncate": 5, "max_new_tokens": 1}}
    status, _ = await post("/generate", body)
    assert status in (200, 422)


async def test_all_that_a_request_fetches_counts_together() -> None:
    app, _ = vision_app(ScriptedEngine(has_vision=True), Settings(payload_limit=1000))
    reaching(app)
    async with web({"/": answer(encoded() + bytes(400))}) as (port, _):
        url = f"http://a.example:{port}/"
        assert (await post("/v1/chat/completions", chat(url), app=app))[0] == 200
        assert (await post("/v1/chat/completions", chat(url, url, url), app=app))[0] == 413


async def test_in_native_prompts_only_listed_hosts_are_fetched_from() -> None:
    engine = ScriptedEngine(has_vision=True)
    app, _ = vision_app(engine)
    reaching(app, allowed=["good.example"])
    async with web({"/": answer(encoded())}) as (port, heads):
        inputs = f"![](http://good.example:{port}/)![](http://other.example:{port}/)"
        assert (await post("/generate", {"inputs": inputs}, app=app))[0] == 200
        assert prompt_of(engine) == f"{IMAGE_TOKENS}![](http://other.example:{port}/)" and len(heads) == 1
        status, body = await post("/v1/chat/completions", chat(f"http://other.example:{port}/"), app=app)
    assert status == 400 and "does not fetch images from the host" in body["error"]["message"]


async def test_the_administrator_s_hosts_may_be_listed_with_commas() -> None:
    app, _ = vision_app(
        ScriptedEngine(has_vision=True),
        Settings(allowed_media_domains=(" ,A.example, ,b.example,,", "c.example")),
    )
    takes = app.context.fetcher.allows_host_of
    assert all(map(takes, ("http://a.example/", "https://b.example", "http://C.EXAMPLE:80/x")))
    assert not any(map(takes, ("http://d.example/", "data:x", "ftp://a.example/", "http://x.a.example/")))
    app.context.close()
    assert not vision_app(ScriptedEngine(has_vision=True))[0].context.fetcher.allows_host_of(
        "http://a.example/"
    )


async def test_names_are_looked_up_and_local_ones_refused() -> None:
    """Use the server's own resolver."""
    status, body = await post("/v1/chat/completions", chat("http://localhost:1/"))
    assert status == 400 and "not public" in body["error"]["message"]


URLS = st.sampled_from([URL, WIDE, *BROKEN]) | st.text(max_size=9) | SCALARS | ANYTHING
OPENAI = st.fixed_dictionaries(
    {"type": st.sampled_from(["image_url", "input_image", "text", "image"])},
    optional={
        "image_url": URLS | st.fixed_dictionaries({}, optional={"url": URLS, "detail": SCALARS}),
        "text": st.text(max_size=3), "file_id": SCALARS,
    },
)  # fmt: skip
SOURCES = st.fixed_dictionaries(
    {},
    optional={
        "type": st.sampled_from(["base64", "url", "file"]) | SCALARS, "url": URLS,
        "media_type": st.sampled_from(["image/png", "text/plain"]) | SCALARS,
        "data": st.just(text_of()) | st.text(max_size=9) | SCALARS,
    },
)  # fmt: skip
BLOCKS = st.fixed_dictionaries(
    {"type": st.sampled_from(["image", "text"])},
    optional={"source": SOURCES | ANYTHING, "text": st.text(max_size=3)},
)
BASE64 = st.lists(st.just(text_of()) | st.text(max_size=9) | SCALARS, max_size=3)
REQUESTS = st.one_of(
    st.tuples(st.just("/v1/chat/completions"), st.builds(chat, OPENAI, OPENAI)),
    st.tuples(st.just("/tokenize"), st.builds(chat, OPENAI, OPENAI)),
    st.tuples(st.just("/v1/responses"), st.builds(response, OPENAI, OPENAI)),
    st.tuples(st.just("/v1/messages"), st.builds(claude, BLOCKS, BLOCKS)),
    st.tuples(st.just("/v1/messages/count_tokens"), st.builds(claude, BLOCKS, BLOCKS)),
    st.tuples(st.just("/api/chat"), st.builds(lambda images: llama(*images), BASE64)),
    st.tuples(
        st.just("/api/generate"), st.fixed_dictionaries({"prompt": st.text(max_size=3), "images": BASE64})
    ),
    st.tuples(
        st.just("/generate"),
        st.builds(lambda url, text: {"inputs": f"{text}![]({url}){text}"}, URLS, st.text(max_size=3)),
    ),
)


@given(REQUESTS)
def test_parts_of_any_shape_are_answered(request: tuple[str, Any]) -> None:
    async def run() -> None:
        engine = ScriptedEngine(has_vision=True)
        app, _ = vision_app(engine, Settings(max_image_pixels=10_000))
        reaching(app, {name: ["10.0.0.1"] for name in ("localhost", "127.0.0.1")})
        await post_and_check(app, engine, *request)
        assert app.context.image_budget.held == app.context.body_budget.held == 0

    asyncio.run(run())
