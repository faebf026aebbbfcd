"""The token ids of text inside an answer: exactly its bytes, whatever the tokenizer does to whole texts.

Llama 2, Mistral 7B, Phi 3 and others put a space before a text, and some normalise its characters. A grammar
that requires `{"a":` next means these characters and no others.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from functools import cached_property
from typing import Any

import tokenizers


class InnerText:
    """Turns such text into ids.

    Args:
        backend: The tokenizer of whole texts; copied if it adds spaces (0.25 s for 49,000 tokens).
        token_bytes: The bytes of each token within running text.
        special_ids: Tokens that no text stands for.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, token_bytes: Sequence[bytes], special_ids: Collection[int]
    ) -> None:
        self._backend = _without_prefix(backend)
        self._token_bytes = token_bytes
        self._special_ids = frozenset(special_ids)

    def encode(self, text: str) -> list[int]:
        """Return the ids that the tokenizer gives the text, or, if their bytes differ, the longest tokens.

        If no token begins with some byte of the text, the ids end before it.
        """
        data = text.encode("utf-8", "replace")
        ids: list[int] = self._backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
        if self._special_ids.isdisjoint(ids) and b"".join(map(self._token_bytes.__getitem__, ids)) == data:
            return ids
        return self._longest_tokens(data)

    def _longest_tokens(self, data: bytes) -> list[int]:
        ids: list[int] = []
        at = 0
        while at < len(data):
            parts = (data[at : at + size] for size in range(self._longest, 0, -1))
            token_id = next((self._ids[part] for part in parts if part in self._ids), None)
            if token_id is None:
                break
            ids.append(token_id)
            at += len(self._token_bytes[token_id])
        return ids

    @cached_property
    def _ids(self) -> dict[bytes, int]:
        """Token bytes -> id; of several ids the last, because sentencepiece's tokens of a byte come first."""
        found = {data: token_id for token_id, data in enumerate(self._token_bytes) if data}
        for token_id in self._special_ids:
            if found.get(self._token_bytes[token_id]) == token_id:
                del found[self._token_bytes[token_id]]
        return found

    @cached_property
    def _longest(self) -> int:
        return max(map(len, self._ids), default=0)


def _without_prefix(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """Return a tokenizer that puts no space before a text: this one, if it does not."""
    parts = (backend.normalizer, backend.pre_tokenizer)
    steps = [json.loads(part.__getstate__()) for part in parts if part is not None]
    if list(map(_prefixless, steps)) == steps:
        return backend
    state = json.loads(backend.to_str())
    for name in ("normalizer", "pre_tokenizer"):
        state[name] = _prefixless(state[name])
    return tokenizers.Tokenizer.from_str(json.dumps(state))


def _prefixless(step: Any) -> Any:
    """Return the JSON of a step, or of several, without the space before a text; None if nothing is left."""
    if step is None or step["type"] == "Prepend":
        return None
    if step["type"] == "Metaspace":
        return {**step, "prepend_scheme": "never"}
    if step["type"] == "ByteLevel":
        return {**step, "add_prefix_space": False}
    for name in ("normalizers", "pretokenizers"):
        if name in step:
            parts = [part for each in step[name] if (part := _prefixless(each)) is not None]
            return {**step, name: parts}
    return step
