"""A scripted model that calls the tools listed in the user's message, one per answer.

    play_of([call("Read", file_path="/tmp/a.txt"), call("Bash", command="ls")])      # the user's message

It reads each prompt as text, as a model does, and answers in the format of the generic tool prompt. After the
last call it shows the last result.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Sequence
from typing import Any

from tests.support.scripted_engine import ScriptedChannel, say
from tgi_asgi.errors import TgiError
from tgi_asgi.types import TokenEvent

# Like most models' templates, it accepts only one system message, the first, and supports reasoning.
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' and not loop.first %}"
    "{{ raise_exception('the system message must come first') }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    "{# <think> </think> #}"
)
_BEGIN = "Play this: "
_RESULT = re.compile(r"<tool_response>\n(.*?)\n</tool_response>", re.DOTALL)


def call(name: str, **arguments: Any) -> dict[str, Any]:
    """Return one tool call of a play."""
    return {"name": name, "arguments": arguments}


def play_of(steps: Sequence[dict[str, Any]]) -> str:
    """Return the user's message that makes the model call these tools."""
    return _BEGIN + json.dumps(steps)


def answer(prompt: str) -> str:
    """Return the model's answer to a prompt: reasoning, then the next call or the last result."""
    begin = prompt.find(_BEGIN)
    if begin < 0 or "<tools>" not in prompt:
        return "Nothing to play."
    steps, end = json.JSONDecoder().raw_decode(prompt, begin + len(_BEGIN))
    results = _RESULT.findall(prompt, end)
    if len(results) >= len(steps):
        return f"<think>\nThat was the last step.\n</think>\n\nThe last result is: {results[-1]}"
    step = json.dumps(steps[len(results)])
    return f"<think>\nStep {len(results) + 1}.\n</think>\n\nNext.\n<tool_call>\n{step}\n</tool_call>"


async def play(channel: ScriptedChannel) -> AsyncIterator[Sequence[TokenEvent] | TgiError]:
    """Answer a request, one token per byte (a script for `ScriptedEngine`)."""
    prompt = channel.engine.tokenizer.decode(list(channel.request.prompt_ids), skip_special_tokens=False)
    async for events in say(*(bytes([byte]) for byte in answer(prompt).encode()))(channel):
        yield events
