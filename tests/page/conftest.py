"""A browser with the pages of a server in this process; `make test-page` installs what drives it.

def test_a_question_is_answered(chat: ChatPage) -> None:
    chat.engine.script = say("Hi")
    chat.open()
    chat.send("Hello")
    chat.wait_for_answer("Hi")
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack, aclosing
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.live_server import LiveServer
from tests.support.scripted_engine import (
    CHATML,
    Script,
    ScriptedChannel,
    ScriptedEngine,
    say,
    scripted_app,
    toy_info,
)
from tgi_asgi.app import App
from tgi_asgi.errors import TgiError
from tgi_asgi.settings import Settings
from tgi_asgi.types import TokenEvent

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

THINKING = CHATML + "{# <think> </think> #}"  # the template shows that the model reasons


TIMEOUT_MS = 30_000  # for every wait: the machine may be busy


def words(text: str) -> list[str]:
    """Cut a text into tokens."""
    return re.findall(r"\S+\s*|\s+", text)


def say_in_halves(gate: threading.Event, first: str, rest: str = "") -> Script:
    """Return a script that says `first`, waits for the gate, and then says `rest`."""
    num_first = len(words(first))

    async def script(channel: ScriptedChannel) -> AsyncIterator[Sequence[TokenEvent] | TgiError]:
        step = 0
        async with aclosing(say(*words(first), *words(rest))(channel)) as batches:  # type: ignore[type-var]
            async for batch in batches:
                if step == num_first:
                    await asyncio.to_thread(gate.wait)
                step += 1
                yield batch

    return script


class ChatPage:
    """A page in a separate browser window, and the scripted engine that serves it."""

    def __init__(self, browser: Browser, stack: ExitStack) -> None:
        self.engine = ScriptedEngine()
        self.url = ""
        self.foreign_requests: list[str] = []  # requests of the page to any other server
        self.errors: list[str] = []  # script errors, and requests that the policy refused
        self.bodies: list[Any] = []  # of the page's chat requests
        self._stack = stack
        self.page: Page = browser.new_page(viewport={"width": 1200, "height": 800})
        self.page.set_default_timeout(TIMEOUT_MS)
        self.page.on("request", self._note_request)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", self._note_console)

    def serve(self, settings: Settings | None = None, **app: Any) -> None:
        """Serve the engine's model."""
        sizes = {"max_input_tokens": 65_535, "max_total_tokens": 65_536, "kv_tokens": 65_536}
        chosen: dict[str, Any] = {"info": toy_info(**sizes), "chat_template": THINKING} | app
        self.serve_app(scripted_app(self.engine, settings, **chosen))

    def serve_app(self, app: App) -> None:
        """Serve an app that the test provides."""
        self.url = self._stack.enter_context(LiveServer(lambda: app)).url + "/"

    def open(self, path: str = "") -> None:
        """Open the page; start a server with the defaults if none runs."""
        if not self.url:
            self.serve()
        self.page.goto(self.url + path)

    def send(self, text: str) -> None:
        """Type a message and send it by keyboard, once the server is ready."""
        self.page.wait_for_selector("#send:not([disabled])")
        self.page.get_by_label("Message", exact=True).fill(text)
        self.page.keyboard.press("Enter")

    @property
    def answers(self) -> Locator:
        return self.page.locator("article.assistant")

    def wait_for_answer(self, text: str, number: int = -1) -> Locator:
        """Wait until an answer has ended and has exactly this text."""
        from playwright.sync_api import expect

        answer = self.answers.nth(number)
        expect(answer).to_have_attribute("aria-busy", "false")
        expect(answer.locator(".body")).to_have_text(text)
        return answer

    def expect(self, selector: str, number: int = 0) -> Any:
        """Return Playwright's expectation of an element, which waits until it is met."""
        from playwright.sync_api import expect

        return expect(self.page.locator(selector).nth(number))

    def button(self, name: str) -> Locator:
        """Return the last button with that name."""
        return self.page.get_by_role("button", name=name, exact=True).last

    def set_option(self, label: str, value: str) -> None:
        """Set an option on the settings panel."""
        self.page.get_by_role("button", name="Settings").click()
        field = self.page.get_by_label(label, exact=True)
        if field.evaluate("(element) => element.tagName") == "SELECT":
            field.select_option(value)
        else:
            field.fill(value)
        self.button("Done").click()

    def wait_until(self, holds: Callable[[], bool]) -> None:
        """Wait until a condition holds in this process, while the browser continues."""
        give_up_s = time.monotonic() + TIMEOUT_MS / 1000
        while not holds():
            assert time.monotonic() < give_up_s
            self.page.wait_for_timeout(10)

    def stored_value(self, name: str) -> str | None:
        """Return the value that the browser stores under a name."""
        value: str | None = self.page.evaluate("(name) => localStorage.getItem(name)", f"tgi-asgi.{name}")
        return value

    def _note_request(self, request: Any) -> None:
        if not request.url.startswith((self.url, "data:", "blob:")):
            self.foreign_requests.append(request.url)
        if request.url.endswith("/v1/chat/completions"):
            self.bodies.append(request.post_data_json)

    def _note_console(self, message: Any) -> None:
        # Chromium logs an error for each 4xx and 5xx answer, and for a server that does not answer.
        if message.type == "error" and not re.match("Failed to load resource", message.text):
            self.errors.append(message.text)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Yield Debian's Chromium, or the one that the variable CHROMIUM names."""
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=TIMEOUT_MS)
    path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    assert path is not None, "no Chromium: run `apt-get install chromium`, or name one in CHROMIUM"
    with sync_playwright() as playwright:
        is_root = os.geteuid() == 0  # Chromium's sandbox refuses root
        made = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"] if is_root else [])
        yield made
        made.close()


@pytest.fixture
def chat(browser: Browser) -> Iterator[ChatPage]:
    """Yield a page; check at the end that it contacted only its server and had no errors."""
    with ExitStack() as stack:
        made = ChatPage(browser, stack)
        stack.callback(made.page.context.close)
        yield made
        assert made.foreign_requests == []
        assert made.errors == []


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """Yield the event that a script waits for; it is set when the test ends."""
    made = threading.Event()
    yield made
    made.set()
