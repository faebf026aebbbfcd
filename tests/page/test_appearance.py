"""Appearance and handling of the pages: themes, contrast, narrow windows, names, keyboard-only use."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from tests.page.conftest import ChatPage, say_in_halves, words
from tests.support.scripted_engine import say

pytestmark = pytest.mark.page

RICH = (
    "<think>Well.</think># Head\n\nText with `code`, *stress* and [a link](https://example.org).\n\n"
    "- one\n- [x] two\n\n> quoted\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n"
    '```python\ndef f(x: int) -> str:  # comment\n    return g("text", 12)\n```\n'
)

# JavaScript: every visible text with its contrast to the background (WCAG 2, 1.4.3).
CONTRASTS = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (color) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = color;
    canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  };
  const over = ([r, g, b, a], back) => [r, g, b].map((each, i) => each * a + back[i] * (1 - a));
  const backOf = (element) => {
    if (!element) return rgba(getComputedStyle(document.body).backgroundColor).slice(0, 3);
    const own = rgba(getComputedStyle(element).backgroundColor);
    return own[3] === 1 ? own.slice(0, 3) : over(own, backOf(element.parentElement));
  };
  const light = (color) => {
    const linear = (each) => (each <= 0.04045 ? each / 12.92 : ((each + 0.055) / 1.055) ** 2.4);
    const [r, g, b] = color.map((each) => linear(each / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const found = [];
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const element = texts.currentNode.parentElement;
    if (!texts.currentNode.data.trim() || !element.checkVisibility({ visibilityProperty: true })) continue;
    if (element.closest(".unseen, :disabled, noscript, script")) continue;
    const back = backOf(element);
    const front = over(rgba(getComputedStyle(element).color), back);
    const [one, other] = [light(front), light(back)].sort((a, b) => b - a);
    found.push([(one + 0.05) / (other + 0.05), `${element.localName}: ${texts.currentNode.data.trim()}`]);
  }
  return found;
}"""
NAMELESS = """() => [...document.querySelectorAll("button, a, input, textarea, select, summary, img, pre")]
  .filter((each) => each.checkVisibility() && !each.closest("noscript"))
  .filter((each) => !each.getAttribute("aria-label") && !each.hasAttribute("alt"))
  .filter((each) => !each.textContent.trim() && !each.labels?.length)
  .map((each) => each.outerHTML)"""

FOCUSED = "document.activeElement.ariaLabel ?? document.activeElement.textContent.trim()"


def rich(chat: ChatPage) -> None:
    chat.engine.script = say(*words(RICH))
    chat.open()
    chat.send("Show me everything")
    chat.expect("article.assistant").to_have_attribute("aria-busy", "false")
    chat.page.locator(".reasoning summary").click()


def check_contrast(chat: ChatPage) -> None:
    chat.page.emulate_media(reduced_motion="reduce")
    found: list[tuple[float, str]] = chat.page.evaluate(CONTRASTS)
    assert len(found) > 20
    assert [(round(ratio, 2), text) for ratio, text in found if ratio < 4.5] == []


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_text_of_the_chat_can_be_read(chat: ChatPage, theme: Any) -> None:
    chat.page.emulate_media(color_scheme=theme)
    rich(chat)
    check_contrast(chat)
    chat.page.get_by_role("button", name="Settings").click()
    chat.page.wait_for_timeout(300)  # until the drawer has slid in
    check_contrast(chat)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_text_of_the_docs_can_be_read(chat: ChatPage, theme: Any) -> None:
    chat.page.emulate_media(color_scheme=theme)
    chat.open("docs")
    chat.page.locator("details.route", has_text="/v1/chat/completions").locator("summary").first.click()
    chat.page.locator("details.route[open]").get_by_role("button", name="Send").click()
    chat.expect("details.route[open] .answer pre").to_contain_text("[DONE]")
    check_contrast(chat)
    assert chat.page.evaluate(NAMELESS) == []


def test_the_theme_goes_from_the_systems_to_light_to_dark_and_is_kept(chat: ChatPage) -> None:
    chat.page.emulate_media(color_scheme="dark")
    chat.open()
    background = "getComputedStyle(document.body).backgroundColor"
    dark = chat.page.evaluate(background)
    chat.page.get_by_role("button", name="Theme: as the system's").click()
    light = chat.page.evaluate(background)
    assert light != dark
    chat.page.get_by_role("button", name="Theme: light").click()
    chat.page.emulate_media(color_scheme="light")
    chat.page.reload()
    assert chat.page.evaluate(background) == dark
    chat.expect("#theme").to_have_attribute("aria-label", "Theme: dark")


def test_all_that_can_be_used_has_a_name(chat: ChatPage) -> None:
    rich(chat)
    assert chat.page.evaluate(NAMELESS) == []
    chat.page.get_by_role("button", name="Settings").click()
    assert chat.page.evaluate(NAMELESS) == []
    ids: list[str] = chat.page.evaluate("[...document.querySelectorAll('[id]')].map((each) => each.id)")
    assert len(ids) == len(set(ids))
    referred: list[str] = chat.page.evaluate(
        """['aria-labelledby', 'aria-describedby', 'aria-controls', 'for'].flatMap((name) =>
          [...document.querySelectorAll(`[${name}]`)].map((each) => each.getAttribute(name)))"""
    )
    assert set(referred) <= set(ids)


def test_nothing_moves_where_that_is_not_wanted(chat: ChatPage, gate: threading.Event) -> None:
    chat.page.emulate_media(reduced_motion="reduce")
    chat.engine.script = say_in_halves(gate, "One ", "two")
    chat.open()
    chat.send("Hi")
    chat.expect("article.assistant .body").to_have_text("One")
    assert chat.page.evaluate("document.getAnimations().filter((a) => a instanceof CSSAnimation).length") == 0
    chat.page.emulate_media(reduced_motion="no-preference")
    assert chat.page.evaluate("document.getAnimations().filter((a) => a instanceof CSSAnimation).length") > 0


def test_the_whole_way_by_the_keyboard(chat: ChatPage) -> None:
    chat.open()
    chat.expect("#model").to_have_text("toy/model")
    page = chat.page

    def focus_by(key: str, name: str) -> None:
        for _ in range(60):
            page.keyboard.press(key)
            if (
                page.evaluate("document.activeElement.ariaLabel ?? document.activeElement.textContent.trim()")
                == name
            ):
                assert page.evaluate("document.activeElement.matches(':focus-visible')")
                return
        raise AssertionError(f"{name} cannot be reached")

    focus_by("Shift+Tab", "Skip to the message box")
    page.keyboard.press("Enter")
    page.keyboard.type("By keys")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("alone")
    page.keyboard.press("Enter")
    chat.wait_for_answer("Hello world")
    assert chat.bodies[0]["messages"][0]["content"] == "By keys\nalone"

    focus_by("Shift+Tab", "Answer again")
    page.keyboard.press("Enter")
    chat.expect(".branches").to_contain_text("2 / 2")
    page.keyboard.press("Tab")
    focus_by("Tab", "Earlier branch")
    page.keyboard.press("Space")
    chat.expect(".branches").to_contain_text("1 / 2")
    chat.expect("article.assistant").to_be_focused()
    focus_by("Shift+Tab", "Edit the message")
    page.keyboard.press("Enter")
    page.keyboard.type(" now")
    page.keyboard.press("Enter")
    chat.expect("article.user .branches").to_contain_text("2 / 2")
    focus_by("Shift+Tab", "Settings")
    page.keyboard.press("Enter")
    chat.expect("#settings-dialog").to_be_visible()
    page.keyboard.press("Escape")
    chat.expect("#settings").to_be_focused()
    focus_by("Shift+Tab", "New chat")
    page.keyboard.press("Enter")
    chat.expect("#prompt").to_be_focused()
    chat.expect("#welcome").to_be_visible()


@pytest.mark.parametrize("width", [320, 390, 768, 1200])
def test_no_width_cuts_the_page_off(chat: ChatPage, width: int) -> None:
    chat.page.set_viewport_size({"width": width, "height": 700})
    rich(chat)
    assert chat.page.evaluate("document.documentElement.scrollWidth") <= width
    assert chat.page.evaluate(
        "document.getElementById('scroll').scrollWidth <= document.getElementById('scroll').clientWidth"
    )
    chat.page.goto(chat.url + "docs")
    chat.expect(".route").to_be_visible()
    assert chat.page.evaluate("document.documentElement.scrollWidth") <= width


def test_in_a_narrow_window_the_list_lies_over_the_messages(chat: ChatPage) -> None:
    chat.page.set_viewport_size({"width": 390, "height": 700})
    chat.open()
    chat.send("Hi")
    chat.wait_for_answer("Hello world")
    chat.expect("#sidebar").not_to_be_in_viewport()
    chat.button("Show conversations").click()
    chat.expect("#sidebar").to_be_in_viewport()
    chat.page.keyboard.press("Escape")
    chat.expect("#sidebar").not_to_be_in_viewport()
    chat.expect("#show-sidebar").to_be_focused()
    chat.button("Show conversations").click()
    chat.page.locator("#conversations .title").click()
    chat.expect("#sidebar").not_to_be_in_viewport()


def test_a_reader_who_scrolls_up_is_left_there(chat: ChatPage, gate: threading.Event) -> None:
    chat.engine.script = say_in_halves(gate, "line\n\n" * 60, "last\n\n" * 10)
    chat.open()
    chat.send("Hi")
    chat.page.wait_for_function("() => document.getElementById('spoken').childElementCount > 55")
    chat.page.locator("#messages").hover()
    chat.page.mouse.wheel(0, -600)
    chat.expect("#to-end").to_be_visible()
    before = chat.page.evaluate("document.getElementById('scroll').scrollTop")
    gate.set()
    chat.expect("article.assistant").to_have_attribute("aria-busy", "false")
    assert chat.page.evaluate("document.getElementById('scroll').scrollTop") == before
    chat.button("To the latest message").click()
    chat.expect("#to-end").to_be_hidden()
