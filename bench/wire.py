"""The cost of HTTP without a model: reading a chat request, making a frame, sending it.

    python -m bench.wire                                   # the costs inside the process
    python -m bench.wire --streams 1000 --rate 20          # and over sockets, under hypercorn
    python -m bench.wire --streams 1000 --server uvicorn --stalled 1
    python -m bench.wire --streams 100 --server hypercorn-alone   # without the project's shortcut for chunks
    python -m bench.wire --streams 100 --server bare       # the lower bound: only the system calls
    python -m bench.wire --streams 100 --profile           # where the server's time goes

Costs are CPU time, which a busy machine affects little. Prints one JSON object.

`request_us` is reading, checking and rendering a chat of 20 messages; `token_us` is a streamed token's own
cost (bytes to text, stop matching, frame, hand-over to a `send` that does nothing). Over sockets an engine
without a model gives every stream one token per step: `sent_token_us` is the server's CPU time per token,
`cores` its share of one core, `late_ms` how long after its step a token reached a client (wall time; the
client uses CPU of the same machine). `--stalled` adds readers that never read, whose streams do not count.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import json
import pstats
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, MutableMapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, cast

import uvloop
from hypercorn.asyncio import serve

from bench.report import command_line, emit, machine, percentile
from tgi_asgi.api.errors import OPENAI
from tgi_asgi.api.exchange import Exchange
from tgi_asgi.api.openai.chat import parse_chat
from tgi_asgi.api.prompt import make_prompt
from tgi_asgi.api.served import Served
from tgi_asgi.app import App, create_app
from tgi_asgi.engine.output import ChoiceOutput
from tgi_asgi.model_info import ModelInfo
from tgi_asgi.runner.plan import Sampled
from tgi_asgi.serve.connections import ConnectionLimit
from tgi_asgi.serve.hypercorn import install, make_config
from tgi_asgi.settings import Settings
from tgi_asgi.text.chat.guard import PromptGuard
from tgi_asgi.text.chat.template import ChatTemplate
from tgi_asgi.types import EngineState, GenerationRequest, Permit, RequestStats, Sink

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
INFO = ModelInfo("bench", None, "M", "f", "cpu", 50_000, 1 << 20, 1 << 20, frozenset({0}))
STOP = ["\n\nUser:", "<END>"]
SERVERS = ("hypercorn", "hypercorn-alone", "uvicorn", "bare")
WARM_UP_STEPS = 20
START_TIMEOUT_S = 60.0


class Words:
    """A tokenizer of which only the byte table is real."""

    eos_ids = special_ids = frozenset({0})
    guard = PromptGuard(["<|im_start|>", "<|im_end|>"])
    text = b" word"
    special_tokens: ClassVar[dict[str, str]] = {}
    longest_token = 1 << 20
    vocab_size = INFO.vocab_size

    def encode(self, text: str, *, add_special_tokens: bool, is_marked: bool = False) -> list[int]:
        return [1] * 100

    def token_text(self, token_id: int) -> str:
        return "word"

    def token_bytes(self, token_id: int) -> bytes:
        return self.text


class Channel:
    """A request whose tokens the benchmark delivers."""

    def __init__(self, request: GenerationRequest, words: Words) -> None:
        self.request = request
        self.stats = RequestStats(time.monotonic())
        self.sink: Sink | None = None
        self.output = ChoiceOutput(0, request.stop, words, words.eos_ids)

    def attach(self, sink: Sink) -> None:
        self.sink = sink

    def cancel(self) -> None:
        self.sink = None

    def step(self) -> None:
        """Do the engine's work for one sampled token."""
        if self.sink is not None:
            self.sink.on_events([self.output.push(Sampled(1))])


class Engine:
    """Accepts every request; `step` gives each of them a token."""

    def __init__(self, words: Words) -> None:
        self.state = EngineState.READY
        self.channels: list[Channel] = []
        self._words = words

    def acquire(self, n: int, tenant: str | None = None) -> Engine:
        return self

    def split(self, n: int) -> Engine:
        return self

    def release(self) -> None: ...

    def submit(self, request: GenerationRequest, permit: Permit) -> Channel:
        self.channels.append(Channel(request, self._words))
        return self.channels[-1]

    def step(self) -> None:
        for channel in self.channels:
            channel.step()


class Bare(asyncio.Protocol):
    """The lower bound: a stream of equal frames without a server or an app."""

    def __init__(self, engine: Engine, words: Words) -> None:
        self._engine = engine
        self._words = words
        self._is_asked = False
        self.sink: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if not self._is_asked:
            self._is_asked = True
            self._transport.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
            self.sink = self._transport
            self._engine.channels.append(cast(Any, self))

    def step(self) -> None:
        frame = b'data: {"choices":[{"delta":{"content":"%b"}}]%b}\n\n' % (self._words.text, b" " * 180)
        self._transport.write(b"%x\r\n%b\r\n" % (len(frame), frame))


def make_app() -> tuple[App, Engine, Words]:
    words = Words()
    engine = Engine(words)
    app = create_app(Settings(log_level="error"))
    app.observers.clear()
    app.context.served = Served(cast(Any, engine), cast(Any, words), ChatTemplate(TEMPLATE, {}), INFO)
    return app, engine, words


def chat_body(num_messages: int = 20, **fields: object) -> bytes:
    roles = ("user", "assistant")
    messages = [
        {"role": roles[i % 2], "content": "What is deep learning, in a few words? " * 5}
        for i in range(num_messages - 1)
    ]
    messages.append({"role": "user", "content": "And now in one word."})
    return json.dumps(
        {"model": "tgi", "messages": messages, "max_tokens": 1 << 18, "stop": STOP, **fields}
    ).encode()


def scope_of(path: str) -> dict[str, Any]:
    return {
        "type": "http",
        "method": "POST",
        "path": path,
        "headers": [],
        "query_string": b"",
        "root_path": "",
    }


def request_us() -> dict[str, float]:
    """Return the costs of reading, checking and rendering a chat request."""
    app, _, _ = make_app()
    body = chat_body()
    exchange = Exchange(app.context, scope_of("/"), cast(Any, None), cast(Any, None), OPENAI)
    [job] = parse_chat(body, exchange).jobs
    served = app.context.ready()
    parts: dict[str, Callable[[], object]] = {
        "parse_us": lambda: parse_chat(body, exchange),
        "render_us": lambda: make_prompt(job, served, app.context.settings),
    }
    costs = {name: round(best_us(part), 1) for name, part in parts.items()}
    return {"request_us": round(sum(costs.values()), 1), **costs}


def best_us(function: Callable[[], object], rounds: int = 30, repeats: int = 20) -> float:
    """Return the least mean CPU time of a few calls: the cost of the code when nothing else runs."""
    best = float("inf")
    for _ in range(rounds):
        begun = time.thread_time()
        for _ in range(repeats):
            function()
        best = min(best, (time.thread_time() - begun) / repeats)
    return best * 1e6


async def token_us(num_streams: int = 100) -> float:
    """Return a streamed token's own cost, `send` excluded."""
    app, engine, _ = make_app()
    body = chat_body(stream=True)

    async def send(message: MutableMapping[str, Any]) -> None: ...

    def receiver() -> Callable[[], Any]:
        messages = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive() -> Any:
            for message in messages:
                return message
            await asyncio.Event().wait()

        return receive

    tasks = [
        asyncio.create_task(app(scope_of("/v1/chat/completions"), receiver(), send))
        for _ in range(num_streams)
    ]
    while len(engine.channels) < num_streams or any(channel.sink is None for channel in engine.channels):
        await asyncio.sleep(0.001)
    engine.step()
    cost = best_us(engine.step, rounds=100, repeats=5) / num_streams
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return round(cost, 2)


async def serve_steps(args: argparse.Namespace) -> None:
    """Run the server: once all streams are open, step at the given rate, then print the cost and exit."""
    app, engine, words = make_app()
    listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    print(listener.getsockname()[1], flush=True)
    stop = asyncio.Event()
    if args.server == "bare":
        make = partial(Bare, engine, words)
        running = await asyncio.get_running_loop().create_server(make, sock=listener)
        server = asyncio.create_task(running.serve_forever())
    else:
        server = asyncio.create_task(run_server(args.server, app, listener, stop))
    async with asyncio.timeout(START_TIMEOUT_S):
        while sum(channel.sink is not None for channel in engine.channels) < args.streams + args.stalled:
            await asyncio.sleep(0.01)
    profile = cProfile.Profile() if args.profile else None
    num_steps = int(args.seconds * args.rate)
    begun = cpu = 0.0
    next_s = time.monotonic()
    for step in range(WARM_UP_STEPS + num_steps):
        if step == WARM_UP_STEPS:
            begun, cpu = time.monotonic(), time.process_time()
            if profile is not None:
                profile.enable()
        words.text = b" %.6f" % time.monotonic()
        engine.step()
        next_s += 1 / args.rate
        await asyncio.sleep(max(next_s - time.monotonic(), 0))
    cpu, took = time.process_time() - cpu, time.monotonic() - begun
    report: dict[str, Any] = {
        "sent_token_us": round(cpu / (num_steps * args.streams) * 1e6, 1),
        "cores": round(cpu / took, 2),
        "steps_per_s": round(num_steps / took, 1),
    }
    if profile is not None:
        profile.disable()
        report["profile"] = shares(profile)
    print(json.dumps(report), flush=True)
    server.cancel()


def shares(profile: cProfile.Profile, most: int = 14) -> dict[str, str]:
    """Return the functions in which the time is spent, excluding waiting, with their own shares."""
    stats = cast(Any, pstats.Stats(profile)).stats
    own = {name: times[2] for name, times in stats.items() if "run_forever" not in name[2]}
    total = sum(own.values())
    found = sorted(own.items(), key=lambda item: -item[1])[:most]
    return {f"{Path(name[0]).name}:{name[2]}": f"{seconds / total:.0%}" for name, seconds in found}


async def run_server(name: str, app: App, listener: socket.socket, stop: asyncio.Event) -> None:
    async def without_lifespan(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await app(scope, receive, send)

    if name != "uvicorn":
        if name == "hypercorn":
            install(ConnectionLimit(0))
        own = make_config(listener, Settings())
        await serve(cast(Any, without_lifespan), own, shutdown_trigger=stop.wait)
        return
    import uvicorn

    config = uvicorn.Config(app, lifespan="off", log_level="critical")
    await uvicorn.Server(config).serve([listener])


async def read_streams(args: argparse.Namespace) -> dict[str, Any]:
    """Start the server, read its streams, and time the tokens of every twentieth."""
    command = [sys.executable, "-m", "bench.wire", "--serve", "--server", args.server]
    command += ["--streams", str(args.streams), "--stalled", str(args.stalled)]
    command += ["--rate", str(args.rate), "--seconds", str(args.seconds)]
    command += ["--profile"] if args.profile else []
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    port = int(server.stdout.readline())
    late_s: list[float] = []
    loop = asyncio.get_running_loop()
    refusal: asyncio.Future[bytes] = loop.create_future()
    connections = []
    for i in range(args.streams + args.stalled):
        is_stalled = i >= args.streams
        make = partial(Reader, refusal, late_s if i % 20 == 0 and not is_stalled else None, is_stalled)
        connection, _ = await loop.create_connection(make, "127.0.0.1", port)
        connections.append(connection)
    try:
        async with asyncio.timeout(START_TIMEOUT_S + 4 * args.seconds):
            reading = asyncio.ensure_future(asyncio.to_thread(server.stdout.readline))
            either: list[asyncio.Future[Any]] = [reading, refusal]
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if refusal.done():
                raise SystemExit(refusal.result().decode())
            line = reading.result()
    finally:
        for connection in connections:
            connection.abort()
        server.terminate()
        server.wait()
    if not line:
        raise SystemExit("the server failed")
    late = {f"p{p}": round(percentile(late_s, p / 100) * 1e3, 1) for p in (50, 99)}
    return {**json.loads(line), "late_ms": late}


class Reader(asyncio.Protocol):
    """A client that reads one stream; `late_s` collects the age of its tokens."""

    def __init__(self, refusal: asyncio.Future[bytes], late_s: list[float] | None, is_stalled: bool) -> None:
        self._refusal = refusal
        self._late_s = late_s
        self._is_stalled = is_stalled
        self._num_chunks = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport = cast(asyncio.Transport, transport)
        body = chat_body(stream=True)
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
        transport.write(head.encode() + body)
        if self._is_stalled:
            transport.pause_reading()

    def data_received(self, data: bytes) -> None:
        if data.startswith(b"HTTP/1.1") and b" 200" not in data[:13] and not self._refusal.done():
            self._refusal.set_result(data)
        if self._late_s is None:
            return
        now = time.monotonic()
        self._num_chunks += 1
        if self._num_chunks > WARM_UP_STEPS:
            self._late_s.extend(now - sent for sent in stamps(data))


def stamps(data: bytes) -> Iterator[float]:
    """Return the timestamps contained as text in a piece of a stream."""
    for part in data.split(b'"content":" ')[1:]:
        yield float(part[: part.index(b'"')].split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--streams", type=int, default=0, help="over sockets; 0: only inside the process")
    parser.add_argument("--stalled", type=int, default=0, help="additional streams whose reader never reads")
    parser.add_argument("--rate", type=float, default=20.0, help="tokens a second of each stream")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--server", choices=SERVERS, default="hypercorn")
    parser.add_argument(
        "--profile", action="store_true", help="print the functions in which the time is spent"
    )
    parser.add_argument("--out", type=Path, help="file to keep the JSON object in")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        uvloop.run(serve_steps(args))
        return
    report: dict[str, Any] = {**request_us(), "token_us": asyncio.run(token_us())}
    if args.streams:
        report |= {"server": args.server, "streams": args.streams, "rate": args.rate, "stalled": args.stalled}
        report |= asyncio.run(read_streams(args))
    emit({"command": command_line(), "machine": machine(), **report}, args.out)


if __name__ == "__main__":
    main()
