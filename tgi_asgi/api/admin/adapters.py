"""Loading and unloading adapters at run time, with `--admin-api-key`: vLLM's two routes."""

from __future__ import annotations

import msgspec
from msgspec import Struct

from tgi_asgi.api.exchange import Exchange
from tgi_asgi.api.parse import refuse_field
from tgi_asgi.errors import ModelNotSupported
from tgi_asgi.types import MAX_ADAPTER_NAME, Adapters, is_adapter_name

MAX_PATH_CHARS = 4096  # Linux's limit
_TEXT = b"text/plain; charset=utf-8"


class LoadAdapter(Struct):
    """Body of `/v1/load_lora_adapter`."""

    lora_name: str
    lora_path: str  # a directory on the server, or a Hub id
    load_inplace: bool | None = None  # replace an adapter of this name, if there is one


class UnloadAdapter(Struct):
    """Body of `/v1/unload_lora_adapter`."""

    lora_name: str


_LOAD = msgspec.json.Decoder(LoadAdapter)
_UNLOAD = msgspec.json.Decoder(UnloadAdapter)


async def load(exchange: Exchange) -> None:
    """Read an adapter in a thread; answer once requests may name it."""
    body = await exchange.read_json(_LOAD)
    adapters = _adapters_of(exchange)
    name = body.lora_name
    if not is_adapter_name(name):
        refuse_field("lora_name", f"must be 1 to {MAX_ADAPTER_NAME} printable characters")
    if not 0 < len(body.lora_path) <= MAX_PATH_CHARS:
        refuse_field("lora_path", f"must be 1 to {MAX_PATH_CHARS} characters")
    if body.load_inplace:
        await adapters.replace(name, body.lora_path)
    else:
        await adapters.add(name, body.lora_path)
    await _respond(exchange, f"Success: LoRA adapter '{name}' added successfully.")


async def unload(exchange: Exchange) -> None:
    """Unload an adapter; answer once no request uses it any more."""
    body = await exchange.read_json(_UNLOAD)
    await _adapters_of(exchange).remove(body.lora_name)
    await _respond(exchange, f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


async def _respond(exchange: Exchange, message: str) -> None:
    await exchange.respond(200, message.encode(), _TEXT)


def _adapters_of(exchange: Exchange) -> Adapters:
    adapters = exchange.context.ready().adapters
    if adapters is None:
        raise ModelNotSupported("No adapters are served: start the server with --enable-lora")
    return adapters
