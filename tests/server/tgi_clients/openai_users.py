"""Calls of libraries that wrap OpenAI's API: langchain-openai and litellm.

    python openai_users.py http://127.0.0.1:3000/v1

Runs in the clients' environment, and prints the calls' results as JSON.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # otherwise it fetches prices from the network

import litellm
import openai
from langchain_openai import ChatOpenAI, OpenAI

URL = sys.argv[1]
LONG = "long " * 1000


def raised(call: Any, *arguments: Any, **options: Any) -> list[str]:
    """Return the class names of the exception that a call raises, most specific first, and its message."""
    try:
        call(*arguments, **options)
    except Exception as error:
        return [kind.__name__ for kind in type(error).__mro__] + [str(error)]
    return ["nothing"]


def langchain() -> dict[str, Any]:
    """Call langchain-openai's chat and completion models, whole and streamed."""
    chat = ChatOpenAI(base_url=URL, api_key="-", model="tgi", max_retries=0, max_tokens=16, stream_usage=True)
    answer = chat.invoke([("system", "Be brief."), ("human", "Hi!")])
    chunks = list(chat.stream("Hi!"))
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    text = OpenAI(base_url=URL, api_key="-", model="tgi", max_retries=0, max_tokens=16)
    return {
        "text": answer.content,
        "usage": dict(answer.usage_metadata or {}),
        "finish": answer.response_metadata["finish_reason"],
        "fingerprint": answer.response_metadata["system_fingerprint"],
        "streamed": whole.content,
        "streamed_usage": dict(whole.usage_metadata or {}),
        "streamed_finish": whole.response_metadata["finish_reason"],
        "async": asyncio.run(chat.ainvoke("Hi!")).content,
        "logprobs": len(chat.bind(logprobs=True).invoke("Hi!").response_metadata["logprobs"]["content"]),
        "completion": text.invoke("Hi"),
        "completion_streamed": "".join(text.stream("Hi")),
        "too long": raised(chat.invoke, LONG),
    }


def lite() -> dict[str, Any]:
    """Call OpenAI's API through litellm."""
    options: dict[str, Any] = {"model": "openai/tgi", "api_base": URL, "api_key": "-", "num_retries": 0}
    messages = [{"role": "user", "content": "Hi!"}]
    answer = litellm.completion(messages=messages, **options)
    chunks = list(
        litellm.completion(
            messages=messages, stream=True, stream_options={"include_usage": True}, top_k=5, **options
        )
    )
    text = litellm.text_completion(prompt="Hi", **{**options, "model": "text-completion-openai/tgi"})
    return {
        "text": answer.choices[0].message.content,
        "finish": answer.choices[0].finish_reason,
        "usage": answer.usage.completion_tokens,
        "streamed": "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices),
        "streamed_finish": [
            c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason
        ],
        "streamed_usage": next(c.usage.completion_tokens for c in chunks if getattr(c, "usage", None)),
        "completion": text.choices[0].text,
        "too long": raised(litellm.completion, messages=[{"role": "user", "content": LONG}], **options),
        "bad": raised(litellm.completion, messages=messages, temperature=9, **options),
    }


if __name__ == "__main__":
    print(json.dumps({"langchain": langchain(), "litellm": lite(), "openai": openai.VERSION}))
