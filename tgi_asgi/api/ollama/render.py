"""Ollama's answers from token events, as a line of JSON each or as one object; and its errors."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from secrets import token_hex
from typing import Any

import orjson

from tgi_asgi.api.answer import ChoiceReader, Choices
from tgi_asgi.api.call import Generation, Renderer
from tgi_asgi.api.errors import Dialect, message_of
from tgi_asgi.api.exchange import Exchange
from tgi_asgi.api.openai.logprobs import ChatLogprobs, TokenNames
from tgi_asgi.api.tools import whole_arguments
from tgi_asgi.errors import TgiError, UnknownModel
from tgi_asgi.observe.summary import RequestSummary
from tgi_asgi.text.tools import CallArguments, CallStart, Content, Reasoning
from tgi_asgi.types import FinishReason, TokenEvent

NDJSON = b"application/x-ndjson"
Line = dict[str, Any]


def _envelope(error: BaseException) -> Line:
    if isinstance(error, UnknownModel):
        return {"error": f"model '{error.name}' not found"}
    return {"error": message_of(error)}


GENERATE = Dialect(
    _envelope,
    names={"max_tokens": "options.num_predict", "logprobs": "top_logprobs"},
    nests_tools=True,
)
CHAT = Dialect(_envelope, names={**GENERATE.names, "prompt": "messages"}, nests_tools=True)


class LineRenderer(Renderer):
    """Renders one choice's token events as lines; without a job, says that the model is loaded.

    Args:
        says_unloaded: Whether to say the opposite, which clients check after they have asked for it.
    """

    def __init__(
        self,
        exchange: Exchange,
        generation: Generation,
        *,
        is_chat: bool,
        shows_logprobs: bool = False,
        says_unloaded: bool = False,
    ) -> None:
        self._exchange = exchange
        self._model = generation.model
        self._is_chat = is_chat
        self._reason_without_job = "unload" if says_unloaded else "load"
        reading = generation.jobs[0].reading if generation.jobs else None
        self._reader = ChoiceReader(reading)
        self._tracker: ChatLogprobs | None = None
        if shows_logprobs:
            self._tracker = ChatLogprobs(TokenNames(generation.served.tokenizer), lists_none=False)
        self._calls: list[tuple[str, list[str]]] = []  # function names, and the text of their arguments

    def render(self, job_index: int, events: Sequence[TokenEvent]) -> bytes:
        """Return a line with the content of new tokens, if any, followed at the end by the last line."""
        delta, finish = self._take(events), events[-1].finish
        logprobs = self._logprobs()
        lines = _dump({**self._line(delta), **logprobs, "done": False}) if delta or logprobs else b""
        return lines + _dump(self._line({}) | self._end(finish)) if finish is not None else lines

    def whole(self, job_choices: Sequence[Choices]) -> bytes:
        """Return the complete answer as one object."""
        if not job_choices:
            return _dump({**self._line({}), "done": True, "done_reason": self._reason_without_job})
        events = job_choices[0][0]
        delta = self._take(events)
        return _dump(self._line(delta) | self._logprobs() | self._end(events[-1].finish))

    def fail(self, error: TgiError) -> bytes:
        """Return the error as a line."""
        return _dump(_envelope(error))

    def _take(self, events: Sequence[TokenEvent]) -> Line:
        """Parse new tokens; return their content. Calls are not streamed, but added at the end."""
        delta: Line = {}
        for piece in self._reader.push(events, self._tracker):
            match piece:
                case CallStart():
                    self._calls.append((piece.name, []))
                case CallArguments():
                    self._calls[-1][1].append(piece.text)
                case Content() | Reasoning():
                    name = "thinking" if isinstance(piece, Reasoning) else "content"
                    delta[name] = delta.get(name, "") + piece.text
        if events[-1].finish is not None:
            called = [(name, whole_arguments("".join(texts))) for name, texts in self._calls]
            functions = [{"name": name, "arguments": each} for name, each in called if each is not None]
            if functions:
                delta["tool_calls"] = [
                    {"id": f"call_{token_hex(12)}", "function": each} for each in functions
                ]
        return delta

    def _logprobs(self) -> Line:
        """Return the log-probabilities that may be sent now, if there are any."""
        entries = self._tracker.take_entries() if self._tracker is not None else None
        return {"logprobs": entries.json()} if entries else {}

    def _line(self, delta: Line) -> Line:
        line: Line = {"model": self._model, "created_at": datetime.now(UTC)}
        if self._is_chat:
            return {**line, "message": {"role": "assistant", "content": "", **delta}}
        return {**line, "response": delta.pop("content", ""), **delta}

    def _end(self, finish: FinishReason | None) -> Line:
        summary = RequestSummary.of(self._exchange)
        spent = {name: end_s - begin_s for name, begin_s, end_s in summary.phases}
        durations = {
            "total": summary.total_s,
            "load": summary.validation_s + summary.queue_s,  # time until the model could run
            "prompt_eval": spent.get("prefill", 0.0),
            "eval": spent.get("decode", 0.0),
        }
        return {
            "done": True,
            "done_reason": "length" if finish is FinishReason.LENGTH else "stop",
            "prompt_eval_count": summary.prompt_tokens,
            "eval_count": summary.generated_tokens,
            **{f"{name}_duration": int(seconds * 1e9) for name, seconds in durations.items()},
        }


def _dump(line: Line) -> bytes:
    return orjson.dumps(line, option=orjson.OPT_UTC_Z | orjson.OPT_APPEND_NEWLINE)
