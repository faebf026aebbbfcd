"""Answers: streamed, stopped, branched, with reasoning, with tools; and their requests."""

from __future__ import annotations

import json
import re
import threading

import pytest

from tests.page.conftest import ChatPage, say_in_halves, words
from tests.support.scripted_engine import fail_with, say
from tgi_asgi.errors import GenerationFailed

pytestmark = pytest.mark.page

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": CITY}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'


def test_an_answer_is_streamed_with_its_speed(chat: ChatPage, gate: threading.Event) -> None:
    chat.engine.script = say_in_halves(gate, "Deep learning ", "is learning.")
    chat.open()
    chat.send("What is deep learning?")
    chat.expect("article.assistant .body").to_have_text("Deep learning")
    chat.expect("article.assistant").to_have_attribute("aria-busy", "true")
    gate.set()
    answer = chat.wait_for_answer("Deep learning is learning.")
    shown = re.fullmatch(
        r"5 tokens · [\d.]+ tokens/s · first after [\d.]+ s", answer.locator(".speed").inner_text()
    )
    assert shown is not None
    assert chat.bodies[0]["messages"] == [{"role": "user", "content": "What is deep learning?"}]
    assert chat.bodies[0]["model"] == "toy/model"


def test_the_next_question_has_what_was_said_before(chat: ChatPage) -> None:
    chat.open()
    chat.send("One")
    chat.wait_for_answer("Hello world")
    chat.send("Two")
    chat.wait_for_answer("Hello world", number=1)
    assert [each["content"] for each in chat.bodies[-1]["messages"]] == ["One", "Hello world", "Two"]


@pytest.mark.parametrize("way", ["button", "escape"])
def test_stop_ends_the_request_and_keeps_what_came(chat: ChatPage, gate: threading.Event, way: str) -> None:
    chat.engine.script = say_in_halves(gate, "So far ", "so good")
    chat.open()
    chat.send("Go")
    chat.expect("article.assistant .body").to_have_text("So far")
    if way == "button":
        chat.page.get_by_label("Stop the answer").click()
    else:
        chat.page.keyboard.press("Escape")
    answer = chat.wait_for_answer("So far")
    assert "Stopped." in answer.inner_text()
    assert "about 2 tokens" in answer.locator(".speed").inner_text()  # no usage was received
    chat.page.wait_for_function("() => document.activeElement.id === 'prompt'")
    [channel] = chat.engine.channels
    chat.wait_until(lambda: channel.is_cancelled)


def test_a_stopped_answer_is_continued(chat: ChatPage, gate: threading.Event) -> None:
    chat.engine.script = say_in_halves(gate, "One ", "never")
    chat.open()
    chat.send("Count")
    chat.expect("article.assistant .body").to_have_text("One")
    chat.page.keyboard.press("Escape")
    chat.wait_for_answer("One")
    chat.engine.script = say("two ", "three")
    chat.button("Continue").click()
    chat.wait_for_answer("One two three")
    assert chat.bodies[-1]["continue_final_message"] is True
    assert chat.bodies[-1]["messages"][-1] == {"role": "assistant", "content": "One "}


def test_an_edited_question_begins_a_branch(chat: ChatPage) -> None:
    chat.open()
    chat.send("First")
    chat.wait_for_answer("Hello world")
    chat.engine.script = say("Another answer")
    chat.page.locator("article.user").hover()
    chat.button("Edit the message").click()
    field = chat.page.get_by_label("Edit the message")
    assert field.first.input_value() == "First"
    chat.page.keyboard.press("Control+a")
    chat.page.keyboard.type("Second")
    chat.page.keyboard.press("Enter")
    chat.wait_for_answer("Another answer")
    assert chat.bodies[-1]["messages"] == [{"role": "user", "content": "Second"}]
    chat.expect(".branches").to_contain_text("2 / 2")
    chat.button("Earlier branch").click()
    chat.wait_for_answer("Hello world")
    chat.expect("article.user .body").to_have_text("First")
    chat.button("Later branch").click()
    chat.wait_for_answer("Another answer")


def test_an_edit_is_given_up_with_escape(chat: ChatPage) -> None:
    chat.open()
    chat.send("First")
    chat.wait_for_answer("Hello world")
    chat.page.get_by_label("Message", exact=True).press("ArrowUp")  # edits the last message
    chat.page.keyboard.type(" and more")
    chat.page.keyboard.press("Escape")
    chat.expect("article.user .body").to_have_text("First")
    assert len(chat.bodies) == 1


def test_an_answer_is_asked_for_again(chat: ChatPage) -> None:
    chat.open()
    chat.send("Hi")
    chat.wait_for_answer("Hello world")
    chat.engine.script = say("Hello again")
    chat.button("Answer again").click()
    answer = chat.wait_for_answer("Hello again")
    assert "2 / 2" in answer.inner_text()
    assert chat.bodies[1]["messages"] == chat.bodies[0]["messages"]


def test_thoughts_are_folded(chat: ChatPage, gate: threading.Event) -> None:
    chat.engine.script = say_in_halves(gate, "<think> Let me see. ", "Yes. </think> It is so.")
    chat.open()
    chat.send("Is it so?")
    summary = chat.page.locator(".reasoning summary")
    chat.expect(".reasoning summary").to_have_text("Thinking")
    chat.expect(".reasoning p").to_be_hidden()
    gate.set()
    chat.wait_for_answer("It is so.")
    assert re.fullmatch(r"Thought for [\d.]+ s", summary.inner_text())
    summary.click()
    chat.expect(".reasoning p").to_have_text("Let me see. Yes.")


def test_a_tool_call_is_shown_and_its_result_is_sent(chat: ChatPage) -> None:
    chat.engine.script = say("Let me look.\n", *words(CALL))
    chat.open()
    chat.set_option("Tools", json.dumps([TOOL]))
    chat.send("How is the weather in Paris?")
    chat.expect(".call").to_contain_text("Calls weather")
    chat.expect(".call pre").to_have_text('{\n  "city": "Paris"\n}')
    chat.engine.script = say("It is sunny.")
    chat.page.get_by_label("Result of weather").fill("sunny, 21 °C")
    chat.button("Send the results").click()
    chat.wait_for_answer("It is sunny.")
    asked, called, result = chat.bodies[-1]["messages"]
    assert asked["role"] == "user"
    assert called["tool_calls"][0]["function"] == {"name": "weather", "arguments": '{"city": "Paris"}'}
    assert result == {
        "role": "tool",
        "content": "sunny, 21 °C",
        "tool_call_id": called["tool_calls"][0]["id"],
    }


def test_the_settings_are_sent_and_kept(chat: ChatPage) -> None:
    chat.open()
    chat.set_option("System prompt", "Be brief.")
    chat.set_option("Temperature", "0.25")
    chat.set_option("Top k", "40")
    chat.set_option("Stop at", "END\nStop.")
    chat.set_option("Reasoning", "low")
    chat.page.reload()
    chat.send("Hi")
    chat.wait_for_answer("Hello world")
    body = chat.bodies[-1]
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (body["temperature"], body["top_k"], body["reasoning_effort"]) == (0.25, 40, "low")
    assert body["stop"] == ["END", "Stop."]
    assert {"top_p", "min_p", "max_tokens", "seed", "tools"} & body.keys() == set()
    chat.page.get_by_role("button", name="Settings").click()
    chat.button("Back to the defaults").click()
    chat.button("Done").click()
    chat.send("Hi again")
    chat.wait_for_answer("Hello world", number=1)
    assert chat.bodies[-1].keys() == {"model", "messages", "stream", "stream_options"}


def test_a_value_that_cannot_be_is_refused_in_the_settings(chat: ChatPage) -> None:
    chat.open()
    chat.page.get_by_role("button", name="Settings").click()
    chat.page.get_by_label("Temperature").fill("3")
    chat.button("Done").click()
    chat.expect("#settings-dialog").to_be_visible()
    chat.page.get_by_label("Temperature").fill("1")
    chat.page.get_by_label("Tools").fill('{"not": "a list"}')
    chat.button("Done").click()
    chat.expect("#settings-dialog").to_be_visible()


def test_an_answer_that_fails_says_why_and_can_be_tried_again(chat: ChatPage) -> None:
    chat.engine.script = fail_with(GenerationFailed("the step failed"), after=say("Half an answer"))
    chat.open()
    chat.send("Hi")
    chat.expect(".failure").to_contain_text("the step failed")
    chat.expect("article.assistant .body").to_have_text("Half an answer")
    chat.engine.script = say("Whole")
    chat.button("Try again").click()
    chat.wait_for_answer("Whole")


def test_a_refused_request_says_why(chat: ChatPage) -> None:
    chat.open()
    chat.set_option("Maximum tokens", "9999999")
    chat.send("Hi")
    chat.expect(".failure").to_contain_text("9999999")


def test_the_answer_is_read_aloud_paragraph_by_paragraph(chat: ChatPage, gate: threading.Event) -> None:
    chat.engine.script = say_in_halves(gate, "One paragraph.\n\nAnother that ", "goes on.")
    chat.open()
    chat.send("Hi")
    chat.expect("#spoken").to_have_text("One paragraph.")
    gate.set()
    chat.wait_for_answer("One paragraph.Another that goes on.")
    chat.expect("#spoken").to_have_text("One paragraph.Another that goes on.End of the answer")
