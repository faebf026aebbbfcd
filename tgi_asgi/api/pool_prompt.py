"""Turns the inputs of a `PoolCall` into token ids, cut to fit if it says so; runs in a worker thread."""

from __future__ import annotations

from typing import TypeVar

from tgi_asgi.api.job import Conversation
from tgi_asgi.api.parse import refuse_field
from tgi_asgi.api.pool_call import Input, Pair, PoolCall, Truncation
from tgi_asgi.api.prompt import SLACK_TOKENS, chat_prompt, check_vocabulary
from tgi_asgi.api.served import Served
from tgi_asgi.errors import ContextExceeded
from tgi_asgi.settings import Settings

_MAX_CUTS = 8  # attempts to cut a document to fit; each renders the template
_BATCH_CHARACTERS = 32 * 1024  # text that a thread tokenises in one turn, in about 10 ms
_Content = TypeVar("_Content", str, list[int])
PoolPrompt = tuple[list[int], int | None]  # ids; for a pair, the start of its second text, if marked


def tokenise(call: PoolCall, begin: int, served: Served, settings: Settings) -> list[PoolPrompt]:
    """Tokenise a call's inputs from index `begin` on, until one turn's batch is full.

    Raises:
        ContextExceeded: if an input has too many tokens and may not be cut, or not enough of it.
        InvalidRequest: if an input has none.
    """
    found: list[PoolPrompt] = []
    left = _BATCH_CHARACTERS
    for given in call.inputs[begin:]:
        found.append(_prompt_of(call, given, served, settings))
        left -= given.num_characters + len(found[-1][0])
        if left <= 0:
            break
    return found


def _prompt_of(call: PoolCall, given: Input, served: Served, settings: Settings) -> PoolPrompt:
    """Return an input's tokens, and for a pair where the second text begins.

    Raises:
        ContextExceeded: if there are too many.
        InvalidRequest: if there are none.
    """
    tokenizer, content, truncation = served.tokenizer, given.content, call.truncation
    limit = call.how.max_tokens
    keep = limit if truncation is None else min(truncation.keep or limit, limit)
    max_chars = (keep + SLACK_TOKENS) * tokenizer.longest_token
    # Only the document of a pair is cut.
    num_whole = len(content.query) if isinstance(content, Pair) and truncation else given.num_characters
    if (truncation is None or isinstance(content, Pair)) and num_whole > limit * tokenizer.longest_token:
        raise _too_long(given, truncation, -(-num_whole // tokenizer.longest_token), keep, is_minimum=True)
    second_start = None
    if isinstance(content, Pair):
        ids, second_start = _pair_prompt(content, served, settings, keep, max_chars, truncation)
    elif isinstance(content, list):
        ids = content if truncation is None or len(content) <= keep else _truncated(content, keep, truncation)
    elif truncation is None:
        ids = tokenizer.encode(content, add_special_tokens=call.adds_special_tokens)
    else:
        ids = tokenizer.encode_cut(
            _truncated(content, max_chars, truncation),
            keep,
            add_special_tokens=call.adds_special_tokens,
            from_left=truncation.from_left,
        )
    if len(ids) > keep:
        raise _too_long(given, truncation, len(ids), keep)
    if not ids:
        refuse_field(given.where, "must not be empty")
    check_vocabulary(ids, served)
    return _without_padding(ids, call.pooling.pad_id), second_start


def _without_padding(ids: list[int], pad_id: int | None) -> list[int]:
    """Return a prompt without the padding at its end; if there is nothing else, with one token of it."""
    end = len(ids)
    while end > 1 and ids[end - 1] == pad_id:
        end -= 1
    return ids[:end]


def _truncated(content: _Content, keep: int, truncation: Truncation) -> _Content:
    return content[-keep:] if truncation.from_left else content[:keep]


def _pair_prompt(
    pair: Pair,
    served: Served,
    settings: Settings,
    keep: int,
    max_chars: int,
    truncation: Truncation | None,
) -> PoolPrompt:
    """Return a pair's tokens; if it may be cut, with as much of its document as fits."""
    document = pair.document if truncation is None else _truncated(pair.document, max_chars, truncation)
    scoring, tokenizer = served.info.scoring, served.tokenizer
    if scoring is None or scoring.template is None:
        if truncation is None:
            return tokenizer.encode_pair(pair.query, document)
        return tokenizer.encode_pair(pair.query, document, keep=keep, from_left=truncation.from_left)
    for attempt in range(_MAX_CUTS):
        ids = _templated_pair(pair, document, served, settings)
        over = len(ids) - keep
        if truncation is None or over <= 0 or not document:
            break
        own = tokenizer.encode(document, add_special_tokens=False)
        num_kept = max(len(own) - over, 0) if attempt < _MAX_CUTS - 2 else 0
        if not num_kept:
            document = ""
            continue
        kept = _truncated(own, num_kept, truncation)
        # Drop characters that the cut has split.
        document = tokenizer.decode(kept, skip_special_tokens=False).strip("\ufffd")
    return ids, None


def _templated_pair(pair: Pair, document: str, served: Served, settings: Settings) -> list[int]:
    messages = [{"role": "query", "content": pair.query}, {"role": "document", "content": document}]
    if pair.instruction is not None:
        messages.insert(0, {"role": "system", "content": pair.instruction})
    return chat_prompt(Conversation(messages), served.for_scores, settings, is_bounded=False).ids


def _too_long(
    given: Input, truncation: Truncation | None, num_tokens: int, limit: int, *, is_minimum: bool = False
) -> ContextExceeded:
    """Return the refusal of an input; if it was to be cut, its query is too long."""
    number = f"at least {num_tokens}" if is_minimum else str(num_tokens)
    if truncation is None:
        with_query = " with its query" if isinstance(given.content, Pair) else ""
        message = (
            f"This model's maximum context length is {limit} tokens. However, `{given.where}` has {number}"
            f"{with_query}. Please shorten it, or have it cut. (context_length_exceeded)"
        )
    else:
        message = (
            f"At most {limit} tokens are kept of `{given.where}` with its query. However, without any of the "
            f"document there are {number}. Please shorten the query. (context_length_exceeded)"
        )
    error = ContextExceeded(message, num_tokens, limit)
    error.param, error.field = given.where, None
    return error
