"""A server that is loading, requires a key, dies during an answer, and comes back."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.page.conftest import ChatPage
from tests.support.scripted_engine import scripted_app
from tests.support.server_process import ServerProcess
from tgi_asgi.settings import Settings

pytestmark = pytest.mark.page

FAKE = ("tests.server.fake_server", "--model-id", "toy/model")


def test_the_page_is_there_while_the_model_loads_and_shows_how_far_it_is(
    chat: ChatPage, tmp_path: Path
) -> None:
    fifo = tmp_path / "go"
    os.mkfifo(fifo)
    with ServerProcess(*FAKE, environ={"FAKE_MODEL": f"waits:{fifo}"}) as server:
        server.wait_until(503)
        chat.url = server.url + "/"
        chat.open()
        chat.expect(".state").to_contain_text("The model is loading: reading weights")
        chat.expect(".state .share").to_have_text("25 %")
        chat.expect(".state progress").to_have_attribute("value", str(1 << 20))
        chat.expect("#send").to_be_disabled()
        chat.page.get_by_label("Message", exact=True).fill("May be written already")
        chat.page.keyboard.press("Enter")
        assert chat.bodies == []
        fifo.write_bytes(b"")
        chat.expect("#send").to_be_enabled()
        chat.page.wait_for_selector(".state", state="detached")
        chat.expect("#model").to_have_text("toy/model")
        assert chat.page.get_by_label("Message", exact=True).input_value() == "May be written already"


def test_an_answer_whose_server_dies_says_so_and_can_be_tried_again(chat: ChatPage) -> None:
    slow = {"FAKE_STEP_S": "0.05"}
    with ServerProcess(*FAKE, environ=slow) as server:
        server.wait_until_healthy()
        chat.url = server.url + "/"
        chat.open()
        chat.send("Talk on and on")
        chat.expect("article.assistant .body").not_to_be_empty()
        server.process.kill()
        chat.expect(".failure").to_contain_text("The connection was lost")
        chat.expect("article.assistant .body").not_to_be_empty()
        chat.expect(".state").to_contain_text("The server cannot be reached")
        chat.expect("#send").to_be_disabled()
        port = server.port
    with ServerProcess(*FAKE, environ=slow, port=port) as server:
        server.wait_until_healthy()
        chat.page.wait_for_selector("#send:not([disabled])")
        chat.button("Try again").click()
        chat.expect("article.assistant").to_have_attribute("aria-busy", "true")
        chat.expect("article.assistant .body").not_to_be_empty()
        chat.page.keyboard.press("Escape")
        chat.expect("article.assistant").to_contain_text("2 / 2")


def test_a_key_is_asked_for_once(chat: ChatPage) -> None:
    chat.serve(Settings(api_key=("right",)))
    chat.open()
    field = chat.page.get_by_label("API key")
    chat.expect("#key").to_be_focused()
    field.fill("wrong")
    chat.page.keyboard.press("Enter")
    chat.expect("#key-text").to_contain_text("does not know the key")
    field.fill("right")
    chat.page.keyboard.press("Enter")
    chat.expect("#key-dialog").to_be_hidden()
    chat.expect("#model").to_have_text("toy/model")
    chat.send("Hi")
    chat.wait_for_answer("Hello world")
    assert chat.stored_value("key") == "right"
    chat.page.reload()
    chat.expect("#model").to_have_text("toy/model")
    chat.expect("#key-dialog").to_be_hidden()


def test_without_a_key_a_message_asks_again(chat: ChatPage) -> None:
    chat.serve(Settings(api_key=("right",)))
    chat.open()
    chat.expect("#key").to_be_focused()
    chat.page.keyboard.press("Escape")
    chat.send("Hi")
    chat.page.get_by_label("API key").fill("right")
    chat.page.keyboard.press("Enter")
    chat.wait_for_answer("Hello world")
    chat.expect("#model").to_have_text("toy/model")
    chat.page.get_by_role("button", name="Settings").click()
    chat.button("Forget the key").click()
    assert chat.stored_value("key") is None


def test_behind_a_prefix_the_page_asks_its_own_server(chat: ChatPage) -> None:
    inner = scripted_app(chat.engine)

    async def prefixed(scope: object, receive: object, send: object) -> None:
        """Act as a proxy that removes its prefix and serves nothing else."""
        if isinstance(scope, dict) and scope["type"] == "http":
            assert scope["path"].startswith("/llm/"), scope["path"]
            scope = {**scope, "path": scope["path"].removeprefix("/llm")}
        await inner(scope, receive, send)  # type: ignore[arg-type]

    chat.serve_app(prefixed)  # type: ignore[arg-type]
    chat.open("llm/")
    chat.send("Hi")
    chat.wait_for_answer("Hello world")
    chat.open("llm/docs")
    chat.expect(".route").to_be_visible()
