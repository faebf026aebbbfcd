"""The benefit of native routing on Ray Serve: times to first tokens, cache hits, and a lost replica's cost.

    python -m bench.cluster [--out bench/results/cluster.json]          # needs pip install '.[ray]'

Three measurements, each on a local Ray that is started and stopped:

- `ttft`: two replicas of the default model, one thread each. Conversations with a common system prompt run
  with native routing and with Ray's own (power of two choices by queue length), in turn, with equal texts.
- `hits`: prompt tokens that replicas without a model find in their caches, relative to a single replica.
- `loss`: streams on three replicas, of which one is killed. Its streams must end with an error
  event, the others must be complete.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.client import Answer, Client
from bench.loads import WORDS
from bench.report import command_line, commit, emit, machine, spread, table
from bench.servers import free_port

NAME = "tgi"
RAYS_OWN = "ray"


class RayCluster:
    """A single-machine Ray with Serve.

    with RayCluster() as cluster:
        url = cluster.serve({"num_replicas": 2})
    """

    def __init__(self, num_cpus: int = 8) -> None:
        import ray
        from ray import serve

        self._ray, self._serve = ray, serve
        self._port = free_port()
        ray.init(
            num_cpus=num_cpus, include_dashboard=False, log_to_driver=False, object_store_memory=256 << 20
        )
        serve.start(http_options={"port": self._port})

    def serve(self, arguments: dict[str, Any], *, name: str = NAME, **options: Any) -> str:
        """Start one of this project's applications; return its address once it answers."""
        from tgi_asgi.cluster.serving import make_app

        self._serve.run(make_app(arguments, **options), name=name, route_prefix=f"/{name}")
        url = f"http://127.0.0.1:{self._port}/{name}"
        asyncio.run(_wait_until_healthy(url))
        return url

    def replicas(self, name: str = NAME) -> list[str]:
        """Return the names of an application's actors that hold models."""
        from ray.util import list_named_actors

        actors = [each["name"] for each in list_named_actors(all_namespaces=True)]
        return sorted(each for each in actors if each.startswith(f"SERVE_REPLICA::{name}#model"))

    def kill(self, replica: str) -> None:
        """End an actor at once, as if its machine were lost."""
        self._ray.kill(self._ray.get_actor(replica, namespace="serve"))

    def delete(self, name: str = NAME) -> None:
        """Stop an application."""
        self._serve.delete(name)

    def __enter__(self) -> RayCluster:
        return self

    def __exit__(self, *exception: object) -> None:
        self._serve.shutdown()
        self._ray.shutdown()


async def _wait_until_healthy(url: str) -> None:
    import httpx

    async with httpx.AsyncClient() as client:
        for _ in range(600):
            if (await client.get(url + "/health")).status_code == 200:
                return
            await asyncio.sleep(0.1)
    raise SystemExit(f"{url} did not become healthy")


async def converse(url: str, seed: str, options: argparse.Namespace) -> list[Answer]:
    """Hold all conversations, turn after turn, each with pauses; return every answer."""
    rng = random.Random(seed)

    def text(num_words: int) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(num_words))

    client = Client(url)
    system = text(options.system_words)
    plans = [
        [(rng.expovariate(1 / options.pause_s), text(options.turn_words)) for _ in range(options.turns)]
        for _ in range(options.conversations)
    ]

    async def hold(plan: list[tuple[float, str]]) -> list[Answer]:
        messages = [{"role": "system", "content": system}]
        answers = []
        for pause_s, question in plan:
            await asyncio.sleep(pause_s)
            messages.append({"role": "user", "content": question})
            body = {
                "messages": messages,
                "max_tokens": options.max_tokens,
                "temperature": 0,
                "ignore_eos": True,
            }
            answers.append(Answer.read(await client.chat(body)))
            messages.append({"role": "assistant", "content": answers[-1].text})
        return answers

    try:
        held = await asyncio.gather(*map(hold, plans))
    finally:
        client.close()
    return [answer for answers in held for answer in answers]


def summary(answers: Sequence[Answer]) -> dict[str, Any]:
    """Return the summary figures of some answers."""
    prompt = sum(answer.num_prompt_tokens for answer in answers)
    cached = sum(answer.num_cached_tokens for answer in answers)
    times = spread([answer.ttft_s for answer in answers], 1e3, 1)
    return {"requests": len(answers), "ttft_ms": times, "prompt_tokens": prompt, "cached_tokens": cached}


def measure_ttft(options: argparse.Namespace) -> dict[str, Any]:
    """Hold conversations with native routing and with Ray's, in turn."""
    arguments = {
        "num_replicas": 2, "num_threads": options.threads, "max_batch_total_tokens": 65536,
        "thread_nice": 0, "log_level": "warn",
    }  # fmt: skip
    if options.model_id:
        arguments["model_id"] = options.model_id
    with RayCluster() as cluster:
        urls = {
            NAME: cluster.serve(arguments),
            RAYS_OWN: cluster.serve(arguments, name=RAYS_OWN, router="bench.cluster_router:RaysOwnRouter"),
        }
        warm = argparse.Namespace(**{**vars(options), "turns": 1, "conversations": 4, "pause_s": 0.1})
        for url in urls.values():
            asyncio.run(converse(url, "warm", warm))
        rounds: list[dict[str, Any]] = []
        answers: dict[str, list[Answer]] = {name: [] for name in urls}
        for number in range(options.rounds):
            order = list(urls) if number % 2 == 0 else list(urls)[::-1]
            for name in order:
                found = asyncio.run(converse(urls[name], f"{options.seed} {number}", options))
                answers[name] += found
                rounds.append({"round": number, "routing": name, **summary(found)})
                print(rounds[-1], file=sys.stderr, flush=True)
    ours, theirs = (summary(answers[name])["ttft_ms"] for name in (NAME, RAYS_OWN))
    ratios = {name: round(theirs[name] / ours[name], 2) for name in ours}
    return {
        "rounds": rounds,
        "ours": summary(answers[NAME]),
        "ray": summary(answers[RAYS_OWN]),
        "ratio": ratios,
    }


def measure_hits(options: argparse.Namespace) -> dict[str, Any]:
    """Count the cached tokens of one replica and of three, without a model."""
    from tests.support.local_cluster import toy_loader

    small = argparse.Namespace(
        **{**vars(options), "system_words": 80, "turn_words": 20, "max_tokens": 8, "pause_s": 0.3}
    )
    found = {}
    with RayCluster() as cluster:
        for count in (1, 3):
            settings = {"model_id": "toy/model", "num_replicas": count, "log_level": "warn"}
            url = cluster.serve(settings, loader=toy_loader(num_blocks=8192))
            found[count] = summary(asyncio.run(converse(url, options.seed, small)))
            cluster.delete()
    share = found[3]["cached_tokens"] / found[1]["cached_tokens"]
    return {"one": found[1], "three": found[3], "share": round(share, 3)}


def measure_loss(options: argparse.Namespace) -> dict[str, Any]:
    """Kill one of three replicas while all have streams."""
    from tests.support.local_cluster import toy_loader

    with RayCluster() as cluster:
        settings = {
            "model_id": "toy/model", "num_replicas": 3, "debug_endpoints": True, "log_level": "warn",
            "max_concurrent_requests": 512,
        }  # fmt: skip
        url = cluster.serve(settings, loader=toy_loader(num_blocks=8192, step_s=0.02))
        return asyncio.run(lose_one(cluster, url, options.streams))


async def lose_one(cluster: RayCluster, url: str, num_streams: int, *, name: str = NAME) -> dict[str, Any]:
    """Stream, kill a replica, and report the outcome of every stream and of those that came later."""
    import httpx

    async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=None)) as client:

        async def stream(number: int, begun: asyncio.Event) -> str:
            body = {"messages": [{"role": "user", "content": f"{number} " * 40}], "max_tokens": 300}
            body |= {"stream": True, "ignore_eos": True, "temperature": 0}
            events = []
            async with client.stream("POST", url + "/v1/chat/completions", json=body) as answer:
                async for line in answer.aiter_lines():
                    if line.startswith("data: "):
                        events.append(line.removeprefix("data: "))
                        begun.set()
            if not events or events[-1] != "[DONE]":
                return "broken"
            last = json.loads(events[-2])
            if "error" in last:
                is_ours = {"message", "type", "param", "code"} == last["error"].keys()
                return "error event" if is_ours else "strange error"
            return "whole" if last["choices"][0]["finish_reason"] == "length" else "strange end"

        begun = [asyncio.Event() for _ in range(num_streams)]
        streams = [asyncio.create_task(stream(number, event)) for number, event in enumerate(begun)]
        await asyncio.gather(*(event.wait() for event in begun))
        replicas = (await client.get(url + "/debug/engine")).json()["replicas"]
        victim = replicas[0]
        [actor] = [each for each in cluster.replicas(name) if each.endswith(victim["id"])]
        killed_s = time.monotonic()
        cluster.kill(actor)
        after = [await stream(num_streams + number, asyncio.Event()) for number in range(5)]
        ends = await asyncio.gather(*streams)
        back_s = None
        for _ in range(300):
            now = (await client.get(url + "/debug/engine")).json()["replicas"]
            if len(now) == len(replicas) and victim["id"] not in {each["id"] for each in now}:
                back_s = round(time.monotonic() - killed_s, 1)
                break
            await asyncio.sleep(0.2)
    return {
        "streams": num_streams,
        "on_the_killed": victim["open"],
        "ends": {kind: ends.count(kind) for kind in sorted(set(ends))},
        "sent_after": {kind: after.count(kind) for kind in sorted(set(after))},
        "replaced_after_s": back_s,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", choices=("ttft", "hits", "loss"), help="one of the questions")
    parser.add_argument("--model-id", help="default: the demonstration model")
    parser.add_argument("--threads", type=int, default=1, help="of a replica")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--conversations", type=int, default=20)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--system-words", type=int, default=200)
    parser.add_argument("--turn-words", type=int, default=60)
    parser.add_argument("--max-tokens", type=int, default=8)
    parser.add_argument("--pause-s", type=float, default=1.6, help="before a turn, on average")
    parser.add_argument("--streams", type=int, default=60, help="of `loss`")
    parser.add_argument("--seed", default="1")
    parser.add_argument("--out", type=Path, help="also write the JSON object to this file")
    options = parser.parse_args()
    questions = {"ttft": measure_ttft, "hits": measure_hits, "loss": measure_loss}
    record: dict[str, Any] = {}
    if options.only and options.out and options.out.exists():
        record = json.loads(options.out.read_text(encoding="utf-8"))
    record |= {"bench": "cluster", "commit": commit(), "machine": machine()}
    for name, measure in questions.items():
        if options.only in (None, name):
            record[name] = {"command": command_line(), **measure(options)}
    emit(record, options.out)
    if "ttft" in record:
        rows = [[name, *record["ttft"][name]["ttft_ms"].values()] for name in ("ours", "ray")]
        print(table(["TTFT, ms", "p50", "p90", "p99"], [*rows, ["ratio", *record["ttft"]["ratio"].values()]]))
    for name in ("hits", "loss"):
        if name in record:
            print(name, {key: value for key, value in record[name].items() if key != "command"})


if __name__ == "__main__":
    main()
