"""Options and variables of TGI's launcher and of the clouds that start it: translated, ignored or refused.

`cli.py` calls `environment_changes` before it reads the settings, makes an option of each of `OPTIONS`, and
passes the values that were set to `check_options`. Every option of TGI's launcher is a setting or listed
here.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

from tgi_asgi.errors import InvalidRequest
from tgi_asgi.settings import flag_of
from tgi_asgi.settings.kinds import is_address

_SHARDED = "sharded"  # says only that there are shards; the setting `num_shard` has their number
_ON = frozenset({"1", "true", "yes", "on"})
_OFF = frozenset({"", "0", "false", "no", "off"})
# Levels of Rust's and Python's loggers that have another name here.
_LEVELS = {"trace": "debug", "warning": "warn", "critical": "error", "fatal": "error", "off": "error"}
SAGEMAKER_PORT = "8080"


@dataclass(frozen=True, slots=True)
class CompatOption:
    """An option of TGI's launcher that is not a setting of this server.

    If answers are the same without it, it is ignored with one warning. If answers or capacity would differ,
    the server does not start.
    """

    name: str  # in snake case
    reason: str  # what applies instead, for the warning or the refusal
    is_refused: bool = False
    is_switch: bool = False  # the flag takes no value
    is_flag: bool = True  # False: TGI reads it only from the environment
    neutral: frozenset[str] = frozenset()  # values accepted silently besides an empty one

    @property
    def variable(self) -> str:
        return self.name.upper()


def _ignored(reason: str, *names: str, is_flag: bool = True) -> list[CompatOption]:
    return [CompatOption(name, reason, is_flag=is_flag) for name in names]


def _switch(name: str, reason: str) -> CompatOption:
    return CompatOption(name, reason, is_switch=True, neutral=_OFF)


def _refused(name: str, reason: str, *neutral: str, is_flag: bool = True) -> CompatOption:
    return CompatOption(name, reason, is_refused=True, is_flag=is_flag, neutral=frozenset(neutral))


_UNCOUNTED = "GPUs are not counted for it: use --num-shard N, at least 2"
_INTERNAL = "shards are processes of one machine, and need no addresses"

OPTIONS: tuple[CompatOption, ...] = (
    _refused(_SHARDED, _UNCOUNTED, "false"),
    *_ignored("the engine chooses", "cuda_graphs"),
    *_ignored("metrics are at /metrics of the main port", "prometheus_port"),
    CompatOption("usage_stats", "nothing is ever sent", neutral=frozenset({"on", "off", "no-stack"})),
    _switch("disable_usage_stats", "nothing is ever sent"),
    _switch("disable_crash_reports", "nothing is ever sent"),
    _switch("ngrok", "there is no tunnel"),
    *_ignored("there is no tunnel", "ngrok_authtoken", "ngrok_edge"),
    *_ignored("texts are not watermarked", "watermark_gamma", "watermark_delta"),
    *_ignored(_INTERNAL, "shard_uds_path", "master_addr", "master_port"),
    _switch("disable_custom_kernels", "all kernels are custom"),
    *_ignored("limited by pixels instead: --max-image-pixels", "max_image_fetch_size", is_flag=False),
    *_ignored("the engine chooses", "attention", "prefill_chunking", "use_flash_attention", is_flag=False),
    *_ignored("memory is measured, not guessed", "tgi_wiggle_room", is_flag=False),
    _refused(
        "aip_storage_uri",
        "models are not fetched from Cloud Storage: leave out artifact_uri and set MODEL_ID",
        is_flag=False,
    ),
    *_ignored("/invocations recognises chats by their `messages`", "messages_api_enabled", is_flag=False),
)


def check_options(
    options: Mapping[str, str | None], environ: Mapping[str, str], num_shard: int = 1
) -> list[str]:
    """Return one warning for each option that is set and ignored.

    Args:
        options: Options given as flags, by name (a switch that was given has the value "true").
        environ: The environment; flags override it.
        num_shard: The setting; `--sharded true` requires more than 1.

    Raises:
        InvalidRequest: if an option asks for something that would silently be missing.
    """
    warnings = []
    for option in OPTIONS:
        given = options.get(option.name)
        source = flag_of(option.name) if given is not None else option.variable
        value = (environ.get(option.variable, "") if given is None else given).strip()
        if not value or value.lower() in option.neutral:
            continue
        if option.name == _SHARDED and num_shard > 1 and value.lower() in _ON:
            continue
        if option.is_refused:
            raise InvalidRequest(f"{source}={value} is not supported: {option.reason}")
        # A value may be a secret (ngrok's token), so only the name is logged.
        warnings.append(f"{source} is ignored: {option.reason}")
    host = environ.get("HOSTNAME", "")
    if host not in ("", socket.gethostname()) and not is_address(host) and options.get("hostname") is None:
        warnings.append("HOSTNAME is ignored: it is not an address; --hostname takes names, too")
    return warnings


# (from, to): copied if `to` is unset. SageMaker's names first, then older variable names.
RENAMED = (
    ("HF_MODEL_ID", "MODEL_ID"),
    ("HF_MODEL_REVISION", "REVISION"),
    ("SM_NUM_GPUS", "NUM_SHARD"),
    ("HF_MODEL_QUANTIZE", "QUANTIZE"),
    ("HF_MODEL_TRUST_REMOTE_CODE", "TRUST_REMOTE_CODE"),
    ("HUGGING_FACE_HUB_TOKEN", "HF_TOKEN"),
    ("HUGGINGFACE_HUB_CACHE", "HF_HUB_CACHE"),
    ("PREFIX_CACHING", "PREFIX_CACHE"),
    ("USE_PREFIX_CACHING", "PREFIX_CACHE"),
)


def is_sagemaker(arguments: Sequence[str]) -> bool:
    """Return whether SageMaker started the image, which it does with the single argument `serve`."""
    return list(arguments) == ["serve"]


def spelled_flag(argument: str) -> str:
    """Return the flag of an argument: without its value, and with dashes for underscores."""
    return argument.partition("=")[0].replace("_", "-")


def environment_changes(environ: Mapping[str, str], arguments: Sequence[str] = ()) -> dict[str, str]:
    """Return the variables to set, so that those of TGI, SageMaker and Vertex keep their meaning.

    Raises:
        InvalidRequest: if SageMaker gave no model, or a setting is given under two names.
    """
    changes: dict[str, str] = {}
    for old, new in RENAMED:
        if environ.get(old) and not environ.get(new):
            changes.setdefault(new, environ[old])
    if changes.get("NUM_SHARD") == "0":  # SM_NUM_GPUS of a machine without GPUs
        del changes["NUM_SHARD"]
    if environ.get("HF_API_TOKEN"):
        changes["HF_TOKEN"] = environ["HF_API_TOKEN"]
    if is_sagemaker(arguments):
        if not environ.get("HF_MODEL_ID"):
            raise InvalidRequest("HF_MODEL_ID must be set: it names the model to serve")
        changes["PORT"] = SAGEMAKER_PORT
    if environ.get("AIP_HTTP_PORT"):
        changes["PORT"] = environ["AIP_HTTP_PORT"]
    # To click, these flags are one option, of which the last wins. TGI's launcher refuses both, too.
    flags = {spelled_flag(argument) for argument in arguments}
    given = flags | {name for name, value in environ.items() if value}
    for both in (("MAX_INPUT_TOKENS", "MAX_INPUT_LENGTH"), ("--max-input-tokens", "--max-input-length")):
        if given.issuperset(both):
            raise InvalidRequest(f"{' and '.join(both)} are the same setting: give one")
    if environ.get("LOG_LEVEL"):
        changes["LOG_LEVEL"] = simple_level(environ["LOG_LEVEL"])
    return changes


def apply_paths(options: dict[str, Any], environ: MutableMapping[str, str]) -> None:
    """Apply the launcher's two path options, which are not settings.

    `--huggingface-hub-cache` goes to the environment, which the Hub library reads. The folder of
    `--weights-cache-override`, or of its variable, becomes the model and is served under the name given by
    `--model-id`.
    """
    if cache := options.pop("huggingface_hub_cache", None):
        environ["HF_HUB_CACHE"] = cache
    weights = options.pop("weights_cache_override", None) or environ.get("WEIGHTS_CACHE_OVERRIDE")
    if weights:
        name = options.get("model_id") or environ.get("MODEL_ID")
        options["model_id"] = weights
        if name and not environ.get("SERVED_MODEL_NAME"):
            options.setdefault("served_model_name", name)


def simple_level(text: str) -> str:
    """Return the level of TGI's router in a Rust tracing filter: info for `info,hyper=debug`.

    A word that is not a level is returned as it is, for the settings to refuse.
    """
    levels = {"": "info"}
    for part in text.lower().split(","):
        target, _, level = part.rpartition("=")
        if level.strip():
            levels[target.strip()] = level.strip()
    level = levels.get("text_generation_router", levels[""])
    return _LEVELS.get(level, level)
