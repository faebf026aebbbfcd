"""The tables of docs/coming-from-tgi.md, made from the server's settings, TGI's options and the metrics.

    python -m tests.support.tgi_page            # writes them into the page

TGI's side is written here, from `text-generation-launcher --help` and docs/source/reference of its version
3.3.7. The server's side is read from the code, so the page cannot promise what does not exist.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from tgi_asgi.cli import PATHS
from tgi_asgi.observe.metrics import Metrics
from tgi_asgi.serve.launcher_compat import OPTIONS, RENAMED
from tgi_asgi.settings import Settings, flag_of

PAGE = Path(__file__).parents[2] / "docs" / "coming-from-tgi.md"

# Each flag of the launcher with its default, or none if TGI derives it from the model or the machine.
LAUNCHER: Mapping[str, str] = {
    "model_id": "bigscience/bloom-560m", "revision": "", "validation_workers": "2", "sharded": "",
    "num_shard": "", "quantize": "", "speculate": "", "dtype": "", "kv_cache_dtype": "",
    "trust_remote_code": "", "max_concurrent_requests": "128", "max_best_of": "2", "max_stop_sequences": "4",
    "max_top_n_tokens": "5", "max_input_tokens": "", "max_input_length": "", "max_total_tokens": "",
    "waiting_served_ratio": "0.3", "max_batch_prefill_tokens": "", "max_batch_total_tokens": "",
    "max_waiting_tokens": "20", "max_batch_size": "", "cuda_graphs": "1,2,4,8,16,32", "hostname": "0.0.0.0",
    "port": "3000", "prometheus_port": "9000", "shard_uds_path": "/tmp/text-generation-server",
    "master_addr": "localhost", "master_port": "29500", "huggingface_hub_cache": "",
    "weights_cache_override": "", "disable_custom_kernels": "", "cuda_memory_fraction": "1.0",
    "rope_scaling": "", "rope_factor": "", "json_output": "", "otlp_endpoint": "",
    "otlp_service_name": "text-generation-inference.router", "cors_allow_origin": "", "api_key": "",
    "watermark_gamma": "", "watermark_delta": "", "ngrok": "", "ngrok_authtoken": "", "ngrok_edge": "",
    "tokenizer_config_path": "", "disable_grammar_support": "", "max_client_batch_size": "4",
    "lora_adapters": "", "usage_stats": "on", "payload_limit": "2000000", "enable_prefill_logprobs": "",
    "graceful_termination_timeout": "90",
}  # fmt: skip
# TGI's variables without a flag: of the router, the shards, the images and the clouds' entry points.
VARIABLES = (
    "LOG_LEVEL", "LOG_COLORIZE", "MAX_IMAGE_FETCH_SIZE", "PREFIX_CACHING", "USE_PREFIX_CACHING", "ATTENTION",
    "PREFILL_CHUNKING", "USE_FLASH_ATTENTION", "TGI_WIGGLE_ROOM", "MESSAGES_API_ENABLED", "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN", "HF_API_TOKEN", "HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE",
    "HF_HUB_OFFLINE", "HF_HUB_ENABLE_HF_TRANSFER", "HF_HUB_USER_AGENT_ORIGIN", "CUDA_VISIBLE_DEVICES",
    "COMPUTE_TYPE", "HF_MODEL_ID", "HF_MODEL_REVISION", "SM_NUM_GPUS", "HF_MODEL_QUANTIZE",
    "HF_MODEL_TRUST_REMOTE_CODE", "AIP_HTTP_PORT", "AIP_PREDICT_ROUTE", "AIP_HEALTH_ROUTE",
    "AIP_STORAGE_URI",
)  # fmt: skip
METRICS = (
    "tgi_request_count", "tgi_request_success", "tgi_request_failure", "tgi_request_duration",
    "tgi_request_validation_duration", "tgi_request_queue_duration", "tgi_request_inference_duration",
    "tgi_request_mean_time_per_token_duration", "tgi_request_input_length", "tgi_request_generated_tokens",
    "tgi_request_max_new_tokens", "tgi_request_skipped_tokens", "tgi_queue_size", "tgi_batch_current_size",
    "tgi_batch_current_max_tokens", "tgi_batch_next_size", "tgi_batch_inference_count",
    "tgi_batch_inference_success", "tgi_batch_inference_failure", "tgi_batch_inference_duration",
    "tgi_batch_forward_duration", "tgi_batch_decode_duration", "tgi_batch_filter_duration",
    "tgi_batch_concat", "tgi_batch_concat_duration",
)  # fmt: skip

# Descriptions that cannot be read from the code.
_WHERE_READ = {
    "HF_TOKEN": "read by the Hub's library, as there",
    "HF_API_TOKEN": "takes precedence over HF_TOKEN, as there",
    "HF_HOME": "read by the Hub's library; in the image `/data`, as there",
    "HF_HUB_CACHE": "read by the Hub's library",
    "HF_HUB_OFFLINE": "read by the Hub's library",
    "HF_HUB_ENABLE_HF_TRANSFER": "read by the Hub's library, of which newer versions need no `hf_transfer`",
    "HF_HUB_USER_AGENT_ORIGIN": "read by the Hub's library",
    "CUDA_VISIBLE_DEVICES": "read by CUDA; a process serves on the first device, N with `--num-shard N`",
    "LOG_COLORIZE": "logs have no colours",
    "AIP_HTTP_PORT": "the port to listen on",
}
_NO_METRIC = {
    "tgi_batch_decode_duration": "nothing is decoded apart from a step: `tgi_batch_inference_duration`",
    "tgi_batch_filter_duration": "batches are not filtered: rows end by themselves",
    "tgi_batch_concat": "batches are not concatenated: each step is planned from scratch",
    "tgi_batch_concat_duration": "the same as for `tgi_batch_concat`",
}
_NO_DEFAULT = frozenset({"None", "()", "False"})
_COMPARED = {  # defaults that differ because they mean something else
    "model_id": "the demonstration model, and a line that says so",
    "api_key": "",
}

_NOTES = {  # what the help does not say to somebody who has used TGI
    "waiting_served_ratio": " TGI 3 ignores it, as it computes prompts in chunks: leave it out.",
    "max_waiting_tokens": " TGI 3 ignores it, too.",
    "cors_allow_origin": " Without it none may; TGI's default is `*`.",
    "max_client_batch_size": " Native: 1; `/v1`: 128, with `--tgi-compat` 4.",
    "json_output": " [The fields](#logs) have other names.",
    "otlp_endpoint": " Spans and their attributes have other names.",
}


def flags() -> list[str]:
    """Return the table of the launcher's flags."""
    lines = ["| TGI's flag | default there | here | what it does here |", "|---|---|---|---|"]
    for name, default in LAUNCHER.items():
        verdict, text = _verdict(name, default)
        shown = f"`{default}`" if default else ""
        lines.append(f"| `{flag_of(name)}` | {shown} | {verdict} | {text} |")
    return lines


def _verdict(name: str, default: str) -> tuple[str, str]:
    """Return a flag's fate in a word and its meaning in a sentence.

    Raises:
        KeyError: if the flag is unknown.
    """
    for spec in dataclasses.fields(Settings):
        if spec.name == name or name.upper() in spec.metadata["env"]:
            ours = _COMPARED.get(name, "" if str(spec.default) in _NO_DEFAULT else f"`{spec.default}`")
            text = spec.metadata["help"] + _NOTES.get(name, "")
            return "same" if ours in ("", f"`{default}`") else f"same; default {ours}", text
    if name in PATHS:
        return "same", PATHS[name]
    option = next((each for each in OPTIONS if each.name == name), None)
    if option is None:
        raise KeyError(name)
    passes = ", ".join(f"`{value}`" for value in sorted(option.neutral - {""}))
    if option.is_refused:
        return "refused", f"{_sentence(option.reason)}{f' ({passes} may stand)' if passes else ''}"
    return "ignored", _sentence(option.reason)


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def variables() -> list[str]:
    """Return the table of variables that are not flags of the launcher."""
    lines = ["| variable | here |", "|---|---|"]
    return lines + [f"| `{name}` | {_meaning(name)} |" for name in VARIABLES]


def _meaning(name: str) -> str:
    """Return the fate of a variable.

    Raises:
        KeyError: if the variable is unknown.
    """
    renamed = dict(RENAMED)
    if name in renamed:
        return f"read as `{renamed[name]}`, where that is not set"
    option = next((each for each in OPTIONS if each.variable == name), None)
    if option is not None:
        return f"{'refused' if option.is_refused else 'ignored'}: {option.reason}"
    for spec in dataclasses.fields(Settings):
        if spec.name.upper() == name:
            return f"the same as `{flag_of(spec.name)}`: {spec.metadata['help']}"
    return _WHERE_READ[name]


def metrics() -> list[str]:
    """Return the table of TGI's metrics."""
    shown = dict(re.findall(r"^# HELP (\w+) (.*)$", Metrics().render().decode(), re.MULTILINE))
    lines = ["| TGI's metric | here |", "|---|---|"]
    for name in METRICS:
        text = f"same: {shown[name]}" if name in shown else f"not there: {_NO_METRIC[name]}"
        lines.append(f"| `{name}` | {text} |")
    return lines


def written(page: str, tables: Mapping[str, Iterable[str]]) -> str:
    """Return a page with each table between its marks, `<!-- name -->` and `<!-- end -->`.

    Raises:
        ValueError: if a mark does not occur exactly once.
    """
    for name, lines in tables.items():
        text = "\n".join(lines).replace("<", "&lt;")  # Markdown would treat <package> as HTML
        page, count = re.subn(
            rf"(<!-- {name} -->\n).*?(\n<!-- end -->)",
            lambda found, text=text: f"{found[1]}\n{text}\n{found[2]}",  # type: ignore[misc]
            page,
            flags=re.DOTALL,
        )
        if count != 1:
            raise ValueError(f"the page has {count} places for {name}")
    return page


def tables() -> dict[str, list[str]]:
    """Return all tables of the page, keyed by the names of their marks."""
    return {"flags": flags(), "variables": variables(), "metrics": metrics()}


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), tables()), encoding="utf-8")
