"""What the model is asked in order to summarise a conversation that later requests continue from there."""

from __future__ import annotations

from tgi_asgi.text.chat.message import ChatMessage

_REQUEST = """\
Stop here, and write a summary of this conversation for somebody who continues it without having read it. \
Say what was asked for and under which conditions, what has been done and found out so far, what was decided \
and why, and what remains to be done. Keep exact what cannot be found again: names of files and functions, \
commands, numbers, error messages. Call no tools, and write nothing but the summary."""


def asking(instructions: str | None = None) -> ChatMessage:
    """Return the user's message that asks for the summary, with the client's own words if it has any."""
    return {"role": "user", "content": instructions if instructions and instructions.strip() else _REQUEST}
