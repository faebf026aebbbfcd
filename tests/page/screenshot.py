"""The README's picture: `python -m tests.page.screenshot docs/page.webp`, or `make picture`.

It shows the chat page of the demonstration model with a real answer, one half in the dark theme.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from tests.support.server_process import ServerProcess

if TYPE_CHECKING:
    from playwright.sync_api import Page

WIDTH, HEIGHT = 1080, 640
SCALE = 1.5
NAME = "SmolLM2-135M-Instruct"
OPTIONS = {"temperature": 0, "max_tokens": 200, "stop": ["\n\nHere's an example"]}
EARLIER = ("What is photosynthesis?", "Suggest a name for a grey cat", "What is the capital of Portugal?")
QUESTION = "Write a short Python function that reverses a string, and explain how it works."


def main() -> None:
    """Take the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path)
    path: Path = parser.parse_args().path
    with ServerProcess("tgi_asgi", "--served-model-name", NAME) as server:
        server.wait_until_healthy()
        pictures = _photograph(server.url)
    _save(*pictures, path)


def _photograph(url: str) -> tuple[bytes, bytes]:
    """Return screenshots of the page with an answer, light and dark."""
    from playwright.sync_api import sync_playwright

    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
    with sync_playwright() as playwright:
        flags = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=chromium, args=flags)
        page = browser.new_page(
            viewport={"width": WIDTH, "height": HEIGHT},
            device_scale_factor=SCALE,
            color_scheme="light",
            reduced_motion="reduce",
        )
        page.add_init_script(f"localStorage.setItem('tgi-asgi.options', {json.dumps(json.dumps(OPTIONS))})")
        page.goto(url)
        for question in (*EARLIER, QUESTION):
            page.get_by_role("button", name="New chat").click()
            _ask(page, question)
        page.locator("#scroll").evaluate("(element) => { element.scrollTop = 0; }")
        page.mouse.move(0, 0)
        light = page.screenshot()
        page.emulate_media(color_scheme="dark")
        dark = page.screenshot()
        browser.close()
    return light, dark


def _ask(page: Page, question: str) -> None:
    page.wait_for_selector("#send:not([disabled])")
    page.get_by_label("Message", exact=True).fill(question)
    page.keyboard.press("Enter")
    page.wait_for_selector("article.assistant[aria-busy=false] .speed", timeout=120_000)


def _save(light: bytes, dark: bytes, path: Path) -> None:
    """Save the left part of the light and the right part of the dark picture, cut along a slanted line."""
    from PIL import Image, ImageDraw

    one, other = (Image.open(io.BytesIO(each)).convert("RGB") for each in (light, dark))
    width, height = 4 * one.width, 4 * one.height  # scaling down makes the slanted edge smooth
    mask = Image.new("L", (width, height), 0)
    corners = [(width * 0.68, 0), (width, 0), (width, height), (width * 0.56, height)]
    ImageDraw.Draw(mask).polygon(corners, fill=255)
    one.paste(other, mask=mask.resize(one.size, Image.Resampling.LANCZOS))
    one.save(path, quality=82, method=6)


if __name__ == "__main__":
    main()
