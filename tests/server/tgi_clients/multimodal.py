"""Images in chats, and embeddings, through langchain-openai and litellm.

    python multimodal.py http://127.0.0.1:3000/v1 data:image/png;base64,...

Runs in the clients' environment, and prints the calls' results as JSON.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # otherwise it fetches prices from the network

import litellm
from langchain_openai import ChatOpenAI, OpenAIEmbeddings

URL, PICTURE = sys.argv[1:]
TEXTS = ["one text", "another"]
CONTENT = [{"type": "text", "text": "What is in"}, {"type": "image_url", "image_url": {"url": PICTURE}}]
MESSAGES = [{"role": "user", "content": CONTENT}]


def langchain() -> dict[str, Any]:
    """Call its chat model and its embeddings; these send texts, as to servers other than OpenAI's."""
    chat = ChatOpenAI(base_url=URL, api_key="-", model="tgi", max_retries=0, max_tokens=8, temperature=0)
    embeddings = OpenAIEmbeddings(
        base_url=URL, api_key="-", model="tgi", max_retries=0, check_embedding_ctx_length=False
    )
    return {
        "chat": chat.invoke(MESSAGES).content,
        "vectors": embeddings.embed_documents(TEXTS),
        "query": embeddings.embed_query(TEXTS[0]),
    }


def lite() -> dict[str, Any]:
    """Call both through litellm."""
    options: dict[str, Any] = {"model": "openai/tgi", "api_base": URL, "api_key": "-", "num_retries": 0}
    answer = litellm.completion(messages=MESSAGES, max_tokens=8, temperature=0, **options)
    vectors = litellm.embedding(input=TEXTS, **options)
    return {
        "chat": answer.choices[0].message.content,
        "vectors": [each["embedding"] for each in vectors.data],
    }


if __name__ == "__main__":
    print(json.dumps({"langchain": langchain(), "litellm": lite()}))
