"""Chats with images to a served checkpoint, and what transformers would answer.

async with chatting(folder) as (ask, app):
    answer = await ask(["what is ", picture(50, 30), " this?"])
greedy("llava", folder, ["what is ", picture(50, 30), " this?"], num_tokens=6)
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import openai
import PIL.Image

from tests.support import vision_models as vision
from tests.support.pictures import data_url, encoded
from tests.support.vision_models import Prompt
from tests.support.vision_runs import served
from tgi_asgi.app import App

Part = str | PIL.Image.Image


def url_of(made: PIL.Image.Image) -> str:
    """Return a picture as a data URL."""
    return data_url(encoded(made))


def content_of(parts: Sequence[Part]) -> list[Any]:
    """Return the content of a message in OpenAI's form."""
    return [
        {"type": "text", "text": part} if isinstance(part, str)
        else {"type": "image_url", "image_url": {"url": url_of(part)}}
        for part in parts
    ]  # fmt: skip


@asynccontextmanager
async def chatting(folder: Path, **options: Any) -> AsyncIterator[tuple[Any, App]]:
    """Yield a function that queries a served model, and the app."""
    async with (
        served(folder, **options) as (url, app),
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):

        async def ask(*turns: Sequence[Part], **given: Any) -> Any:
            roles = ("user", "assistant")
            messages: Any = [
                {"role": roles[i % 2], "content": content_of(turn) if i % 2 == 0 else "".join(map(str, turn))}
                for i, turn in enumerate(turns)
            ]
            values = {"max_tokens": 6, "temperature": 0, **given}
            return await client.chat.completions.create(model="m", messages=messages, **values)

        yield ask, app


def greedy(name: str, folder: Path, parts: Sequence[Part], num_tokens: int) -> str:
    """Return the greedy answer of transformers' own model to one turn, in the checkpoint's template."""
    prompt: Prompt = vision.prompt_of(name, folder, ["user: ", *parts, "\nassistant: "])
    model, answer = vision.open_reference(folder), list[int]()
    for _ in range(num_tokens):
        answer.append(int(vision.reference(folder, prompt, answer, model)[-1].argmax()))
    return vision.text_of(folder, answer)
