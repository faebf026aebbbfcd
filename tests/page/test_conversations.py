"""Conversations in the browser: kept, opened again, deleted, exported and imported."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.page.conftest import ChatPage, say_in_halves
from tests.support.scripted_engine import say

pytestmark = pytest.mark.page


def export(chat: ChatPage, tmp_path: Path, kind: str) -> str:
    chat.button("Export this conversation").click()
    with chat.page.expect_download() as started:
        chat.button(kind).click()
    path: Path = tmp_path / started.value.suggested_filename
    started.value.save_as(path)
    return path.read_text("utf-8")


def choose(chat: ChatPage, text: str) -> None:
    chat.page.locator("#import-file").set_input_files(
        {"name": "it.json", "mimeType": "application/json", "buffer": text.encode()}
    )


def test_conversations_outlive_the_page(chat: ChatPage) -> None:
    chat.open()
    chat.send("The first one")
    chat.wait_for_answer("Hello world")
    chat.button("New chat").click()
    chat.send("The second one")
    chat.wait_for_answer("Hello world")
    chat.page.reload()
    chat.expect("#conversations li").to_have_text("The second one")
    chat.expect("#conversations li", 1).to_have_text("The first one")
    chat.button("The first one").click()
    chat.expect("article.user .body").to_have_text("The first one")
    chat.wait_for_answer("Hello world")
    chat.expect(".speed").to_be_visible()


def test_an_answer_that_was_coming_when_the_page_closed_is_kept(
    chat: ChatPage, gate: threading.Event
) -> None:
    chat.engine.script = say_in_halves(gate, "Half ", "whole")
    chat.open()
    chat.send("Hi")
    chat.expect("article.assistant .body").to_have_text("Half")
    chat.button("New chat").click()  # which stops the answer
    chat.button("Hi").click()
    answer = chat.wait_for_answer("Half")
    assert "Stopped." in answer.inner_text()


def test_a_deleted_conversation_stays_away(chat: ChatPage, gate: threading.Event) -> None:
    chat.engine.script = say_in_halves(gate, "Still ", "coming")
    chat.open()
    chat.send("Forget me")
    chat.expect("article.assistant .body").to_have_text("Still")
    chat.page.once("dialog", lambda dialog: dialog.accept())
    chat.page.locator("#conversations li").hover()
    chat.button("Delete “Forget me”").click()
    chat.expect("#welcome").to_be_visible()
    chat.expect("#conversations").to_be_empty()
    chat.page.reload()
    chat.expect("#export-all").to_be_disabled()
    chat.expect("#conversations").to_be_empty()


def test_json_brings_all_branches_back(chat: ChatPage, tmp_path: Path) -> None:
    chat.open()
    chat.send("Hi")
    chat.wait_for_answer("Hello world")
    chat.engine.script = say("Another")
    chat.button("Answer again").click()
    chat.wait_for_answer("Another")
    text = export(chat, tmp_path, "JSON")
    chat.page.evaluate("() => indexedDB.deleteDatabase('tgi-asgi')")
    chat.page.reload()
    chat.expect("#conversations").to_be_empty()
    choose(chat, text)
    chat.button("Hi").click()
    chat.wait_for_answer("Another")
    chat.button("Earlier branch").click()
    chat.wait_for_answer("Hello world")


def test_markdown_is_what_is_seen(chat: ChatPage, tmp_path: Path) -> None:
    chat.engine.script = say("Hello *you*")
    chat.open()
    chat.send("Hi")
    chat.wait_for_answer("Hello you")
    assert export(chat, tmp_path, "Markdown") == "# Hi\n\n## You\n\nHi\n\n## Model\n\nHello *you*\n\n"


A, B = "a" * 24, "b" * 24
GOOD: dict[str, Any] = {"id": A, "parent": None, "role": "user", "content": "x"}


def whole(*nodes: dict[str, Any], **changes: Any) -> str:
    """Return an exported file with one conversation."""
    conversation = {
        "id": B,
        "title": "t",
        "updated": 1,
        "leaf": A,
        "nodes": {node["id"]: node for node in nodes},
    }
    return json.dumps({"format": "tgi-asgi conversations 1", "conversations": [conversation | changes]})


def test_what_a_file_holds_beside_messages_is_left_out(chat: ChatPage, tmp_path: Path) -> None:
    chat.open()
    choose(chat, whole(GOOD | {"state": "done", "other": {"x": 1}}, more=1))
    chat.page.get_by_text("t", exact=True).click()
    chat.expect("article.user .body").to_have_text("x")
    [kept] = json.loads(export(chat, tmp_path, "JSON"))["conversations"]
    assert kept["nodes"] == {A: GOOD | {"state": "done"}}
    assert kept.keys() == {"id", "title", "updated", "leaf", "nodes"}


@pytest.mark.parametrize(
    "text",
    [
        "no JSON",
        "[]",
        '{"format": "another", "conversations": []}',
        whole(GOOD | {"parent": A}),
        whole(GOOD | {"parent": B}, GOOD | {"id": B, "parent": A}),
        whole(GOOD | {"role": "system"}),
        whole(GOOD | {"content": {"x": 1}}),
        whole(GOOD | {"images": ["https://example.org/spy.png"]}),
        whole(GOOD | {"calls": [{"name": "f"}]}),
        whole(GOOD | {"speed": {"firstMs": "x", "numTokens": 1, "perSecond": None}}),
        whole(GOOD, GOOD | {"id": "__proto__"}),
        whole(GOOD, leaf=B),
        whole(GOOD, id="<b>"),
        whole(GOOD, updated="now"),
    ],
)
def test_a_file_that_is_none_of_ours_is_refused(chat: ChatPage, text: str) -> None:
    chat.open()
    choose(chat, text)
    chat.expect("#status .notice").to_contain_text("cannot be imported")
    chat.expect("#conversations").to_be_empty()


def test_a_browser_that_keeps_nothing_still_talks(chat: ChatPage) -> None:
    chat.page.add_init_script(
        "delete window.indexedDB; Object.defineProperty(window, 'indexedDB', {value: undefined})"
    )
    chat.open()
    chat.send("Hi")
    chat.wait_for_answer("Hello world")
    chat.expect("#conversations li").to_have_text("Hi")
