"""The app with a vision model, whose image processor makes one token for each column of an image.

engine = ScriptedEngine(has_vision=True)
app, processor = vision_app(engine)
processor.seen[0].pixels
engine.requests[0].images[0].payload
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from tests.support.client import client_of
from tests.support.pictures import data_url, encoded, picture, text_of
from tests.support.scripted_engine import ScriptedEngine, scripted_app, toy_info
from tests.support.toy_tokenizer import IMAGE
from tgi_asgi.app import App
from tgi_asgi.settings import Settings
from tgi_asgi.types import Image, ProcessedImage

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{% if p.type == 'image' %}<image>{% else %}{{ p.text }}{% endif %}{% endfor %}"
    "{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PAYLOAD_BYTES = 1000


class FakeProcessor:
    """A `types.ImageProcessor` that records the images it was given and the threads it ran on."""

    placeholder = "<image>"
    chat_text = ""
    adds_special_tokens = True
    is_seen_by_all = False  # as with layers of cross-attention

    def __init__(self) -> None:
        self.seen: list[Image] = []
        self.threads: set[str] = set()

    def process(self, images: Sequence[Image]) -> list[ProcessedImage]:
        self.seen += images
        self.threads.add(threading.current_thread().name)
        return [self._processed(image) for image in images]

    def _processed(self, image: Image) -> ProcessedImage:
        width = image.pixels.width
        return ProcessedImage(
            f"[{'<image>' * width}]", IMAGE, width, payload=image.param, num_bytes=PAYLOAD_BYTES,
            is_seen_by_all=self.is_seen_by_all,
        )  # fmt: skip


def vision_app(
    engine: ScriptedEngine, settings: Settings | None = None, *, template: str | None = TEMPLATE, **info: Any
) -> tuple[App, FakeProcessor]:
    """Return an app whose model accepts images, and its image processor."""
    processor = FakeProcessor()
    sizes = {"max_input_tokens": 4095, "max_total_tokens": 4096, **info}
    return (
        scripted_app(
            engine, settings, info=toy_info(**sizes), chat_template=template, image_processor=processor
        ),
        processor,
    )


URL = data_url()  # a picture four pixels wide
WIDE = data_url(encoded(picture(7, 2)))
SVG = b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>"


def chat(*parts: Any) -> dict[str, Any]:
    """Return a chat of one message; a string that is a URL becomes an image."""
    return {"messages": [{"role": "user", "content": list(map(openai_part, parts))}], "max_tokens": 9}


def openai_part(part: Any) -> Any:
    if not isinstance(part, str):
        return part
    if part.startswith(("data:", "http")):
        return {"type": "image_url", "image_url": {"url": part, "detail": "auto"}}
    return {"type": "text", "text": part}


def source(data: bytes | None = None) -> dict[str, Any]:
    return {"type": "base64", "media_type": "image/png", "data": text_of(data)}


def claude(*blocks: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(blocks)}], "max_tokens": 9}


def response(*parts: Any) -> dict[str, Any]:
    return {"input": [{"role": "user", "content": list(parts)}], "max_output_tokens": 9}


def llama(*images: Any, text: str = "hi") -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text, "images": list(images)}], "stream": False}


TEXT: Any = {"type": "text", "text": "hi"}


async def post(
    path: str, body: Any, engine: ScriptedEngine | None = None, app: App | None = None, **options: Any
) -> tuple[int, Any]:
    app = app or vision_app(engine or ScriptedEngine(has_vision=True), Settings(**options))[0]
    async with client_of(app) as client:
        got = await client.post(path, json=body)
    assert app.context.image_budget.held == app.context.body_budget.held == 0
    return got.status_code, got.json()


def prompt_of(engine: ScriptedEngine) -> str:
    return engine.tokenizer.decode(list(engine.requests[-1].prompt_ids), skip_special_tokens=False)
