"""OpenAI's answers of chats and completions, as one body or as chunks.

`orjson.dumps` of a whole chunk takes 0.6 us, of its text 0.1 us, so plain text chunks encode only the text.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import orjson

from tgi_asgi.api.answer import Choices, likeliest
from tgi_asgi.api.call import Generation
from tgi_asgi.api.errors import OPENAI, TGI_CHUNKS, error_event
from tgi_asgi.api.openai.choice import ChatChoice, Fields, TextChoice, WholeCallsChoice
from tgi_asgi.api.openai.logprobs import CompletionLogprobs
from tgi_asgi.api.openai.schema import CommonRequest, StreamOptions
from tgi_asgi.errors import TgiError
from tgi_asgi.types import TokenEvent

DONE = b"data: [DONE]\n\n"
_NOTHING: Mapping[str, Any] = {}
_PLACE = "\0"


class CompletionRenderer:
    """Renders an answer as a chat or text completion, complete or in chunks (`call.Renderer`).

    Choice `index` is `job_index * n + event.index`. Tokens of a choice that arrive together are sent as one
    chunk.

    Args:
        choices: The choices of all prompts.
        hides_tokens: Whether max_tokens was 0, so the one sampled token is not shown.
    """

    def __init__(
        self,
        generation: Generation,
        request: CommonRequest,
        choices: Sequence[TextChoice],
        *,
        is_compat: bool,
        hides_tokens: bool = False,
    ) -> None:
        options = request.stream_options or StreamOptions()
        self._generation = generation
        self._choices = choices
        self._n = request.n or 1
        self._is_compat = is_compat
        self._hides_tokens = hides_tokens
        self._shows_ids = bool(request.return_token_ids)
        # TGI ignored the stream_options of completions: the last chunk of each choice has its usage.
        # Those of Mistral's streams have it, too, and its clients cannot ask for it.
        is_tgi_s = is_compat and not isinstance(choices[0], ChatChoice)
        is_mistral_s = isinstance(choices[0], WholeCallsChoice) and not options.include_usage
        self._closes_with_usage = is_tgi_s or is_mistral_s
        self._includes_usage = bool(options.include_usage) and not self._closes_with_usage
        self._repeats_usage = self._includes_usage and bool(options.continuous_usage_stats)
        self._has_begun = [False] * len(generation.jobs)
        self._unopened: dict[int, Mapping[str, Any]] = {}  # what the late first chunks have on top, by choice
        self._num_generated = [0] * len(choices)
        self._unsent_ids: list[list[int]] = [[] for _ in choices]
        prefix, kind, chunk_kind = choices[0].names
        self._head = {
            "id": f"{prefix}-{request.request_id or secrets.token_hex(12)}",
            "object": kind,
            "created": int(time.time()),
            "model": generation.model,
            "system_fingerprint": generation.info.fingerprint,
        }
        self._chunk_head = (
            b"data: " + orjson.dumps(self._head | {"object": chunk_kind})[:-1] + b',"choices":['
        )
        has_usage = self._includes_usage or (is_compat and not self._closes_with_usage)
        self._tail = b'],"usage":null}\n\n' if has_usage else b"]}\n\n"
        self._is_plain = choices[0].is_plain and not (self._shows_ids or self._repeats_usage)
        # Chunks of a text that nothing else contains, split where the text belongs.
        whole = [self._chunk(i, choice.text(_PLACE)) for i, choice in enumerate(choices)]
        parted = [chunk.rpartition(orjson.dumps(_PLACE)) for chunk in whole]
        self._plain_heads = [head for head, _, _ in parted]
        self._plain_tail = parted[0][2]

    def render(self, job_index: int, events: Sequence[TokenEvent]) -> bytes:
        """Return the chunks of new events."""
        if self._is_plain and self._has_begun[job_index] and len(events) == 1 and events[0].finish is None:
            index = job_index * self._n + events[0].index
            self._num_generated[index] += 1
            return self._text_chunk(index, events[0].text)
        frames: list[bytes] = []
        if not self._has_begun[job_index]:
            self._has_begun[job_index] = True
            frames += self._begin(job_index)
        by_choice: dict[int, list[TokenEvent]] = {}
        for event in events:
            by_choice.setdefault(job_index * self._n + event.index, []).append(event)
        for index, of_choice in by_choice.items():
            frames += self._chunks(index, of_choice)
        return b"".join(frames)

    def close(self) -> bytes:
        """Return the usage chunk, if requested, and the end marker."""
        if not self._includes_usage:
            return DONE
        return b'%b],"usage":%b}\n\n%b' % (self._chunk_head, orjson.dumps(self._usage()), DONE)

    def fail(self, error: TgiError) -> bytes:
        """Return the error as an event, and the end marker."""
        return error_event(error, TGI_CHUNKS if self._is_compat else OPENAI) + DONE

    def whole(self, job_choices: Sequence[Choices]) -> bytes:
        """Return the body of an answer that is not streamed; of more than n choices, the likeliest n."""
        choices: list[Fields] = []
        if self._hides_tokens:
            self._generation.num_shown = 0
        on_top: Fields = {}
        for job_index, all_choices in enumerate(job_choices):
            self._num_generated[job_index * self._n] += sum(map(len, all_choices))  # only their sum is shown
            prompt_ids = self._begin_job(job_index)
            if isinstance(self._choices[0], ChatChoice):
                on_top, prompt_ids = prompt_ids, {}
            for events in (all_choices[i] for i in likeliest(all_choices, self._n)):
                index, choice = len(choices), self._choices[len(choices)]
                fields = choice.whole(self._visible(index, events))
                fields |= {"logprobs": choice.logprobs(is_whole=True), **self._ending(index, events[-1])}
                choices.append({"index": index, **fields, **prompt_ids, **self._token_ids(index)})
        return orjson.dumps({**self._head, "choices": choices, "usage": self._usage(), **on_top})

    def _begin(self, job_index: int) -> Iterator[bytes]:
        """Open every choice of a job, in the order of indices, which clients' accumulators require."""
        prompt_ids = self._begin_job(job_index)
        for index in range(job_index * self._n, (job_index + 1) * self._n):
            choice = self._choices[index]
            if isinstance(choice, ChatChoice):
                on_top = prompt_ids if index == 0 else _NOTHING
                if choice.opens_late:
                    self._unopened[index] = on_top
                    continue
                yield self._chunk(index, choice.opening(), on_top=on_top, is_opening=True)
                if choice.echo:
                    yield self._chunk(index, choice.text(choice.echo))
            elif choice.echo or prompt_ids:
                yield self._chunk(index, choice.text(choice.echo), {**prompt_ids, **self._token_ids(index)})

    def _begin_job(self, job_index: int) -> Fields:
        """Pass the prompt's log-probabilities to its choices; return the prompt's token ids, if requested."""
        generation = self._generation
        prompt_ids = generation.jobs[job_index].request.prompt_ids
        logprobs = generation.channels[job_index].stats.prompt_logprobs
        for choice in self._choices[job_index * self._n : (job_index + 1) * self._n]:
            if logprobs is not None and isinstance(choice.tracker, CompletionLogprobs):
                choice.tracker.push_prompt(prompt_ids, logprobs, generation.served.tokenizer.special_ids)
        return {"prompt_token_ids": list(prompt_ids)} if self._shows_ids else {}

    def _chunks(self, index: int, events: Sequence[TokenEvent]) -> Iterator[bytes]:
        """Yield the chunks of one choice's new events."""
        self._num_generated[index] += len(events)
        choice, last = self._choices[index], events[-1]
        if self._is_plain:
            yield self._text_chunk(index, "".join([event.text for event in self._visible(index, events)]))
        else:
            content = choice.deltas(self._visible(index, events))
            if index in self._unopened and (content or last.finish is not None):
                assert isinstance(choice, ChatChoice), "only a chat has a first chunk of its own"
                on_top = self._unopened.pop(index)
                yield self._chunk(index, choice.opening(content), on_top=on_top, is_opening=True)
            for fields in content:
                yield self._chunk(index, fields, self._token_ids(index))
        if last.finish is not None:
            ending = {**self._ending(index, last), **self._token_ids(index)}
            on_top = {"usage": self._usage_of(index)} if self._closes_with_usage else _NOTHING
            yield self._chunk(index, choice.closing(), ending, on_top)

    def _text_chunk(self, index: int, text: str) -> bytes:
        return self._plain_heads[index] + orjson.dumps(text) + self._plain_tail if text else b""

    def _chunk(
        self,
        index: int,
        fields: Fields,
        more: Mapping[str, Any] = _NOTHING,
        on_top: Mapping[str, Any] = _NOTHING,
        *,
        is_opening: bool = False,
    ) -> bytes:
        logprobs = None if is_opening else self._choices[index].logprobs()
        unfinished = self._choices[index].unfinished
        choice = {"index": index, **fields, "logprobs": logprobs, "finish_reason": unfinished, **more}
        tail = self._tail
        if self._repeats_usage:
            tail = b'],"usage":%b}\n\n' % orjson.dumps(self._usage())
        if on_top:
            tail = b"],%b%b" % (orjson.dumps(on_top)[1:-1], tail[1:])
        return self._chunk_head + orjson.dumps(choice) + tail

    def _visible(self, index: int, events: Sequence[TokenEvent]) -> Sequence[TokenEvent]:
        """Return the events that the client sees, and record their token ids."""
        if self._hides_tokens:
            return ()
        if self._shows_ids:
            self._unsent_ids[index] += [event.token_id for event in events]
        return events

    def _token_ids(self, index: int) -> Mapping[str, Any]:
        """Return the token ids not sent yet, if requested."""
        if not self._shows_ids:
            return _NOTHING
        ids, self._unsent_ids[index] = self._unsent_ids[index], []
        return {"token_ids": ids}

    def _ending(self, index: int, last: TokenEvent) -> Fields:
        if self._hides_tokens:
            return {"finish_reason": "length", "stop_reason": None}
        return {"finish_reason": self._choices[index].finish_reason(last), "stop_reason": last.stop}

    def _usage(self) -> Fields:
        """Return the token counts so far, over all choices."""
        num_prompt = self._generation.num_prompt_tokens
        num_generated = 0 if self._hides_tokens else sum(self._num_generated)
        num_reasoning = sum(choice.num_reasoning_tokens for choice in self._choices)
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_generated,
            "total_tokens": num_prompt + num_generated,
            "prompt_tokens_details": {"cached_tokens": self._generation.num_cached_tokens},
            "completion_tokens_details": {"reasoning_tokens": num_reasoning},
        }

    def _usage_of(self, index: int) -> Fields:
        """Return the token counts of one choice and its prompt."""
        num_prompt = len(self._generation.jobs[index // self._n].request.prompt_ids)
        num_generated = 0 if self._hides_tokens else self._num_generated[index]
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_generated,
            "total_tokens": num_prompt + num_generated,
        }
