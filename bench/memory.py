"""Resident memory of the project's server: healthy but unused, and after a number of KV tokens were written.

    python -m bench.memory --kv-tokens 8192 [--model-id model.gguf]

The prompts are fresh, so each token occupies its own place in the KV cache, whose pages exist once written.
Prints one JSON object. Unknown flags go to the server.
"""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path

from bench.loads import ClosedLoop, Prompts, run
from bench.report import command_line, emit, machine
from bench.servers import Server

PROMPT_TOKENS = 1024
MAX_TOKENS = 4


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kv-tokens", type=int, default=8192)
    parser.add_argument("--out", type=Path, help="also write the JSON object to this file")
    options, arguments = parser.parse_known_args()
    load = ClosedLoop(clients=4, requests=-(-options.kv_tokens // PROMPT_TOKENS))
    record = {"bench": "memory", "command": command_line(), "machine": machine()}
    with Server.ours(arguments) as server:
        idle = {"rss_mib": round(server.memory_mib("Rss")), "pss_mib": round(server.memory_mib())}
        measured = asyncio.run(run(load, Prompts(PROMPT_TOKENS), server.url, max_tokens=MAX_TOKENS))
        used = {"rss_mib": round(server.memory_mib("Rss")), "pss_mib": round(server.memory_mib())}
    if measured.errors:
        raise SystemExit(measured.errors[0])
    kv_tokens = sum(answer.num_prompt_tokens + answer.num_tokens for answer in measured.answers)
    emit({**record, "healthy": idle, "kv_tokens_written": kv_tokens, "used": used}, options.out)


if __name__ == "__main__":
    main()
