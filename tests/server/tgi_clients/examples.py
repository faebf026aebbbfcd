"""Calls of TGI's clients: `text-generation` and the last `huggingface_hub` before 1.0.

    python examples.py http://127.0.0.1:3000

Runs in a separate environment (the two pin each other), and prints the calls' results as JSON.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from huggingface_hub import ChatCompletionInputStreamOptions, InferenceClient
from text_generation import AsyncClient, Client
from text_generation.errors import GenerationError, OverloadedError, ValidationError
from text_generation.types import Grammar, GrammarType, Message

URL = sys.argv[1]
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi!"}]


def error_of(call: Any, *arguments: Any, **options: Any) -> str:
    """Return the name and message of the exception that a call raises."""
    try:
        call(*arguments, **options)
    except (GenerationError, OverloadedError, ValidationError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def native() -> dict[str, Any]:
    """Generate with every parameter of the client."""
    client = Client(URL)
    options: dict[str, Any] = {"max_new_tokens": 8, "repetition_penalty": 1.1, "frequency_penalty": 0.1,
        "stop_sequences": ["@@"], "temperature": 0.9, "top_k": 10, "top_p": 0.9, "truncate": 100,
        "typical_p": 0.9, "watermark": True, "top_n_tokens": 2, "do_sample": True}  # fmt: skip
    whole = client.generate("Hi", decoder_input_details=True, best_of=2, **options)
    streamed = list(client.generate_stream("Hi", seed=7, **options))
    return {
        "text": whole.generated_text,
        "finish": whole.details.finish_reason,
        "tokens": [token.text for token in whole.details.tokens],
        "prefill": [token.text for token in whole.details.prefill],
        "others": len(whole.details.best_of_sequences or []),
        "top": len((whole.details.top_tokens or [[]])[0]),
        "streamed": "".join(event.token.text for event in streamed if not event.token.special),
        "streamed_text": streamed[-1].generated_text,
        "streamed_seed": streamed[-1].details.seed if streamed[-1].details else None,
        "full": client.generate("Hi", return_full_text=True).generated_text,
    }


async def native_async() -> dict[str, Any]:
    """Generate with the same client's asyncio version."""
    client = AsyncClient(URL)
    whole = await client.generate("Hi", max_new_tokens=8)
    texts = [event.token.text async for event in client.generate_stream("Hi", max_new_tokens=8)]
    return {"text": whole.generated_text, "streamed": "".join(texts)}


def chat() -> dict[str, Any]:
    """Chat with TGI's client, which cannot parse the stream's `[DONE]` and so stops reading before it."""
    client = Client(URL)
    messages = [Message(**message) for message in MESSAGES]
    answer = client.chat(messages, max_tokens=8, logprobs=True, top_logprobs=2)
    texts = []
    for chunk in client.chat(messages, max_tokens=8, stream=True):
        texts.append(chunk.choices[0].delta.content or "")
        if chunk.choices[0].finish_reason:
            break
    return {
        "text": answer.choices[0].message.content,
        "streamed": "".join(texts),
        "role": chunk.choices[0].delta.role,
    }


def hub() -> dict[str, Any]:
    """Call huggingface_hub's client from TGI's time."""
    client = InferenceClient(URL)
    of_endpoint = InferenceClient(URL, provider="hf-inference")
    details = client.text_generation(
        "Hi", max_new_tokens=8, details=True, top_n_tokens=1, seed=3, do_sample=True
    )
    events = list(client.text_generation("Hi", max_new_tokens=8, details=True, stream=True))
    answer = client.chat_completion(MESSAGES, max_tokens=8, logprobs=True, top_logprobs=1)
    usage = ChatCompletionInputStreamOptions(include_usage=True)
    chunks = list(client.chat_completion(MESSAGES, max_tokens=8, stream=True, stream_options=usage))
    return {
        "text": client.text_generation("Hi", max_new_tokens=8),
        "details_text": details.generated_text,
        "details_finish": details.details.finish_reason if details.details else None,
        "tokens": len(details.details.tokens) if details.details else 0,
        "streamed": "".join(event.token.text for event in events if not event.token.special),
        "last_text": events[-1].generated_text,
        "plain_stream": "".join(client.text_generation("Hi", max_new_tokens=8, stream=True)),
        "chat": answer.choices[0].message.content,
        "chat_finish": answer.choices[0].finish_reason,
        "chat_streamed": "".join(c.choices[0].delta.content or "" for c in chunks if c.choices),
        "chat_usage": chunks[-1].usage.completion_tokens if chunks[-1].usage else None,
        "endpoint": of_endpoint.get_endpoint_info()["model_id"],
        "healthy": of_endpoint.health_check(),
    }


def errors() -> dict[str, str]:
    """Return the client's exceptions for refused requests."""
    client = Client(URL)
    grammar = Grammar(type=GrammarType.Regex, value="a(?=b)")
    return {
        "grammar": error_of(client.generate, "Hi", grammar=grammar),
        "too long": error_of(client.generate, "Hi", max_new_tokens=100_000),
        "stream": error_of(lambda: list(client.generate_stream("Hi", truncate=100_000))),
    }


if __name__ == "__main__":
    found = {"native": native(), "async": asyncio.run(native_async()), "hub": hub(), "errors": errors()}
    if "--tgi-compat" in sys.argv:
        found["chat"] = chat()
    print(json.dumps(found))
