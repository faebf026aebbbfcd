"""Terminal output while the model loads and once it serves.

Progress is a bar on a terminal, otherwise one log line per stage. A summary with an example curl command
follows.
"""

from __future__ import annotations

import logging
import shlex
import sys
import time
from typing import Any

from tqdm import tqdm

from tgi_asgi.model_info import ModelInfo
from tgi_asgi.serve.process import say
from tgi_asgi.settings import MIB, Settings

logger = logging.getLogger(__name__)
GIB = 1 << 30
_LINE_EVERY_S = 10.0  # interval of log lines during a long download without a terminal


class Console:
    """Progress and summary of one start-up. `report` is called in the loading thread, one call at a time."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._show = self._draw if sys.stderr.isatty() and not settings.json_output else self._log
        self._started_s = time.monotonic()
        self._stage = ""
        self._bar: tqdm[Any] | None = None
        self._next_line_s = 0.0

    def report(self, stage: str, done: int, total: int | None) -> None:
        """Show a loading stage's progress; `total` is None if unknown."""
        self._show(stage, done, total)
        self._stage = stage

    def close(self) -> None:
        """Finish the progress bar's line."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def summarise(self, info: ModelInfo, url: str, *, has_chat: bool) -> None:
        """Print what is served, where, and how to try it."""
        self.close()
        seconds = time.monotonic() - self._started_s
        if self._settings.json_output:
            fields = {"model": info.model_id, "dtype": info.dtype, "kv_tokens": info.kv_tokens, "url": url}
            logger.info("serving", extra=fields)
            return
        has_key = bool(self._settings.api_key or self._settings.api_key_file)
        is_tls = self._settings.ssl_certfile is not None
        command = example(info, url, has_chat=has_chat, has_key=has_key, is_tls=is_tls)
        say(f"{describe(info, url, seconds)}\n\nTry it:\n{command}")

    def _draw(self, stage: str, done: int, total: int | None) -> None:
        if self._bar is None or stage != self._stage:
            self.close()
            # Stages of unknown length show only their name and the time.
            form = None if total else "{desc} [{elapsed}]"
            self._bar = tqdm(
                total=total, desc=stage, unit="B", unit_scale=True, bar_format=form, dynamic_ncols=True
            )
        self._bar.total = total
        self._bar.update(done - self._bar.n)

    def _log(self, stage: str, done: int, total: int | None) -> None:
        now = time.monotonic()
        if stage == self._stage and now < self._next_line_s:
            return
        self._next_line_s = now + _LINE_EVERY_S
        if total:
            logger.info("%s: %d of %d MiB", stage, done // MIB, -(-total // MIB))
        else:
            logger.info("%s", stage)


def describe(info: ModelInfo, url: str, seconds: float) -> str:
    """Return the summary table of what is served."""
    revision = f" ({info.revision[:12]})" if info.revision else ""
    kernels = f" ({info.kernel_set})" if info.kernel_set else ""
    prompts = f", prompts in {info.prompt_precision}" if info.prompt_precision else ""
    threads = f"{info.num_threads} threads"
    if info.num_shards > 1:
        threads = f"{info.num_shards} shards with {threads} each"
    rows = {
        "Model": f"{info.model_id}{revision}",
        "Architecture": info.architecture,
        "Arithmetic": f"{info.dtype} on {info.device}{kernels}{prompts}, {threads}",
        "Context": f"{info.max_total_tokens:,} tokens",
        **({"KV cache": f"{info.kv_tokens:,} tokens, {_size(info.kv_bytes)}"} if info.kv_bytes else {}),
        **(
            {"Kept states": f"{info.num_kept_states:,}, {_size(info.kept_state_bytes)}"}
            if info.num_kept_states
            else {}
        ),
        "Ready": f"{url} after {seconds:.1f} s",
    }
    return "\n".join(f"{name:<14}{value}" for name, value in rows.items())


def _size(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.1f} GiB" if num_bytes >= GIB else f"{num_bytes / MIB:.0f} MiB"


def example(info: ModelInfo, url: str, *, has_chat: bool, has_key: bool, is_tls: bool = False) -> str:
    """Return a curl command that works as is."""
    path, body = "/generate", '{"inputs": "The sky is", "parameters": {"max_new_tokens": 20}}'
    if info.classification is not None and len(info.classification.labels) > 1:
        path, body = "/predict", '{"inputs": "What a great film"}'
    elif not info.generates and info.scoring is not None:
        path, body = "/rerank", '{"query": "deep learning", "documents": ["cooking", "neural networks"]}'
    elif not info.generates:
        path, body = "/v1/embeddings", '{"input": "What is deep learning?"}'
    elif has_chat:
        path = "/v1/chat/completions"
        body = (
            '{"model": "tgi", "messages": [{"role": "user", "content": "What is deep learning?"}], '
            '"max_tokens": 60, "stream": true}'
        )
    if url.startswith("unix:"):
        socket = shlex.quote(url.removeprefix("unix:"))
        url = f"--unix-socket {socket} {'https' if is_tls else 'http'}://localhost"
    key = ' -H "Authorization: Bearer $API_KEY"' if has_key else ""
    return f"curl {url}{path} -H 'Content-Type: application/json'{key} -d '{body}'"
