"""Requests with bytes changed on the wire: refused or answered, but never a 5xx or a hang."""

from __future__ import annotations

import asyncio
import json
import random
import re

from tests.soak.client import TIMEOUT_S, until_idle
from tests.soak.conftest import Serve
from tests.support.scale import Scale

NUM_CLIENTS = 16
# RFC 9110 requires these for an unknown transfer coding and for another version of HTTP.
REFUSALS = {501, 505}
LONGEST_S = 1.0  # longer streams are abandoned
SILENCE_S = 0.15  # then an unfinished request is abandoned, as the server rightly waits for the rest
CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "temperature": 0, "stop": ["x"]}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
BODIES = {
    "/generate": {"inputs": "hi", "parameters": {"max_new_tokens": 3, "top_p": 0.5, "details": True}},
    "/generate_stream": {"inputs": "hi", "parameters": {"max_new_tokens": 3}},
    "/": {"inputs": "hi", "stream": True, "parameters": {"max_new_tokens": 2}},
    "/v1/chat/completions": {**CHAT, "logprobs": True, "top_logprobs": 2, "logit_bias": {"5": 1}, "n": 2},
    "/v1/completions": {"prompt": ["a", "b"], "max_tokens": 2, "stream": True, "echo": True, "logprobs": 1},
    "/tokenize": {"inputs": "some text"},
    "/chat_tokenize": {**CHAT, "tools": [TOOL], "tool_choice": "none"},
    "/invocations": CHAT,
    "/vertex": {"instances": [{"inputs": "hi", "parameters": {"max_new_tokens": 2}}]},
}
PATHS = ["/health", "/info", "/metrics", "/v1/models", "/v1/models/toy%2Fmodel", "/openapi.json", "/nowhere"]
PIECES = [
    b"\r\n", b"\r\n\r\n", b"\x00", b"\xff\xfe", b"\xed\xa0\x80", b"%00", b"/../..", b"?" * 99, b"HTTP/2.0",
    b"Transfer-Encoding: chunked\r\n", b"0\r\n\r\n", b"fffffffff\r\n", b"Content-Length: 5\r\n",
    b"Content-Length: 99999999999999999999\r\n", b"Expect: 100-continue\r\n", b"Upgrade: h2c\r\n",
    b"Connection: close, upgrade\r\n", b"X: " + b"a" * 9000 + b"\r\n", b"Origin: \r\n",
    b"Authorization: Bearer \xff\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"{", b"[" * 2000, b'"', b":", b"-1e999", b"18446744073709551616", b"null", b'"\\ud800"', b"NaN",
]  # fmt: skip


def seeds() -> list[bytes]:
    """Return valid requests."""
    made = [f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode() for path in PATHS]
    made.append(b"HEAD /health HTTP/1.1\r\nHost: x\r\n\r\n")
    made.append(b"OPTIONS /generate HTTP/1.1\r\nHost: x\r\nOrigin: http://a\r\n\r\n")
    for path, body in BODIES.items():
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n".encode()
        made.append(head + b"Content-Length: %d\r\n\r\n" % len(data) + data)
        made.append(head + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(data), data))
    return made


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Return a request with bytes changed, cut, doubled, moved or inserted, often with the right length."""
    head, gap, body = data.partition(b"\r\n\r\n")
    mutates_body = body and rng.random() < 0.5
    text = bytearray(body if mutates_body else data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at, size = rng.randrange(len(text) + 1), rng.choice((1, 1, 3, 20))
        match rng.randrange(5):
            case 0:
                text[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                del text[at : at + size]
            case 2:
                text[at:at] = text[at : at + size] * rng.choice((1, 5))
            case 3:
                text[at:at] = rng.choice(PIECES)
            case _:
                other = rng.randrange(len(text) + 1)
                text[at:at] = text[other : other + size]
    if not mutates_body:
        return bytes(text)
    length = b"Content-Length: %d" % len(text)
    return re.sub(rb"Content-Length: \d+", length, head) + gap + bytes(text)


async def status_of(port: int, data: bytes) -> int:
    """Send a valid request; return its answer's status, however long a busy machine takes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(data)
        return int((await reader.readline()).split()[1])
    finally:
        writer.transport.abort()


async def statuses_of(port: int, data: bytes) -> list[int]:
    """Send bytes; return the statuses of all answers before the server closed or fell silent."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    answer = b""
    try:
        writer.write(data)
        async with asyncio.timeout(LONGEST_S):
            while part := await asyncio.wait_for(reader.read(1 << 16), SILENCE_S):
                answer += part
    except (TimeoutError, ConnectionError):
        pass
    finally:
        writer.transport.abort()
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3})", answer)]


async def test_no_request_makes_the_server_fail(serve: Serve, scale: Scale) -> None:
    num_requests = scale(100, 10_000)
    server = serve("--max-total-tokens", "200", FAKE_STEP_S="0.001", FAKE_NUM_BLOCKS="512")
    rng = random.Random(9)
    originals = seeds()
    requests = [mutate(rng.choice(originals), rng) for _ in range(num_requests)]
    counts: dict[int, int] = {}
    failed: list[tuple[int, bytes]] = []

    async def work() -> None:
        while requests:
            request = requests.pop()
            for status in await statuses_of(server.port, request):
                counts[status] = counts.get(status, 0) + 1
                if status >= 500 and status not in REFUSALS:
                    failed.append((status, request))

    async with asyncio.timeout(TIMEOUT_S + num_requests * 0.1):
        first = await asyncio.gather(*(status_of(server.port, original) for original in originals))
        await asyncio.gather(*(work() for _ in range(NUM_CLIENTS)))
    assert set(first) == {200, 404, 405}  # an unknown path, and a method that no origin may use
    assert failed == []
    assert counts[200] > 0
    assert sum(count for status, count in counts.items() if 400 <= status < 500) > num_requests // 10
    assert "Traceback" not in server.output()
    await until_idle(server)
    server.wait_until_healthy()
