"""What the model is asked in order to summarise a conversation that later requests continue from there."""

from __future__ import annotations

import dataclasses

from tgi_asgi.api.job import Conversation, Job
from tgi_asgi.text.chat.message import ChatMessage

_REQUEST = """\
Pause here and summarise this conversation. The summary will replace it: whoever continues will have nothing \
else. Write down

- what the user wants, with all conditions and preferences;
- what has been done and found out so far, and what was decided and why;
- what remains to be done, and the next step.

Quote exactly what cannot be looked up again: names of files and functions, commands, numbers, error \
messages. Do not continue the conversation, do not call tools, and write nothing but the summary."""


def asking(instructions: str | None = None) -> ChatMessage:
    """Return the user's message that asks for the summary, with the client's own words if it has any."""
    return {"role": "user", "content": instructions if instructions and instructions.strip() else _REQUEST}


def summarising(job: Job, instructions: str | None = None) -> Job:
    """Return the job of summarising a conversation instead of answering it; `instructions` as in `asking`.

    What shapes an answer (tools, formats, stop strings) has no effect on the summary.
    """
    chat = job.prompt
    assert isinstance(chat, Conversation), "only conversations are summarised"
    messages = [*chat.messages, asking(instructions)]
    chat = dataclasses.replace(chat, messages=messages, offers_tools=False, is_continued=False)
    return dataclasses.replace(job, prompt=chat, tools=None, constraint=None, stop=(), reads_reasoning=True)
