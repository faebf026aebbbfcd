"""Time from exec to the first token of an answer, by phase. The model must be cached.

    python -m bench.startup --runs 3 [--model-id model.gguf]

Prints one JSON object: seconds from exec to each event, the median of the runs.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import http.client
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.report import command_line, emit, machine
from bench.servers import free_port

BODY = {
    "model": "tgi",
    "messages": [{"role": "user", "content": "What is deep learning?"}],
    "max_tokens": 1,
    "stream": True,
}


def first_chunk(port: int) -> bool:
    """Ask for one token; return whether it arrived.

    Raises:
        SystemExit: if the server refuses for a reason other than not being ready (503).
    """
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    headers = {"Content-Type": "application/json"}
    try:
        connection.request("POST", "/v1/chat/completions", json.dumps(BODY), headers)
        answer = connection.getresponse()
        if answer.status not in (200, 503):
            raise SystemExit(f"the server answered {answer.status}: {answer.read(1000)!r}")
        return answer.status == 200 and bool(answer.readline())
    finally:
        connection.close()


def run_once(arguments: list[str]) -> dict[str, float]:
    """Start a server, wait for its first token, stop it; return seconds from exec by event."""
    port = free_port()
    events: dict[str, float] = {}
    with tempfile.TemporaryFile("w+") as log:
        start_s = time.time()
        server = subprocess.Popen(
            [sys.executable, "-m", "tgi_asgi", "--json-output", "--port", str(port), *arguments],
            stderr=log,
            stdout=subprocess.DEVNULL,
            env={**os.environ, "HOSTNAME": "127.0.0.1"},
        )
        try:
            while "first token" not in events:
                if server.poll() is not None:
                    raise SystemExit("the server ended; start it by hand to see why")
                with contextlib.suppress(OSError):
                    is_there = first_chunk(port)
                    events.setdefault("port answers", time.time() - start_s)
                    if is_there:
                        events["first token"] = time.time() - start_s
                time.sleep(0.01)
        finally:
            server.terminate()
            server.wait()
        log.seek(0)
        for line in log:
            with contextlib.suppress(ValueError):
                record = json.loads(line)
                if record["target"] == "tgi_asgi.serve.console":
                    seconds = datetime.datetime.fromisoformat(record["timestamp"]).timestamp() - start_s
                    events.setdefault(record["message"].split(":")[0], seconds)
    return events


def main() -> None:
    """Run it several times and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path, help="also write the JSON object to this file")
    options, arguments = parser.parse_known_args()
    runs = [run_once(arguments) for _ in range(options.runs)]
    names = sorted(runs[0], key=runs[0].__getitem__)
    medians = {name: round(statistics.median(run[name] for run in runs), 2) for name in names}
    record = {"bench": "startup", "command": command_line(), "machine": machine(), "runs": options.runs}
    emit({**record, "seconds_from_exec": medians}, options.out)


if __name__ == "__main__":
    main()
