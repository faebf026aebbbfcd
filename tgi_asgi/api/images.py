"""The images of a request: fetched, decoded and processed for the model, all within limits.

`load_images` is called after the permit is taken and before the prompt is made (`life.py`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from hashlib import blake2b

from tgi_asgi.api.exchange import Exchange
from tgi_asgi.api.parse import refuse
from tgi_asgi.api.prompt_images import Images, ImageSource
from tgi_asgi.api.served import Served
from tgi_asgi.errors import ImageTimeout, ImageTooLarge
from tgi_asgi.images.decode import Opened, bytes_of_base64, bytes_of_url, is_data_url, open_picture
from tgi_asgi.types import Image, ImageInput

FETCH_TIMEOUT_S = 10.0  # for all images of a prompt together
MAX_FETCHES = 4  # concurrent, per prompt


def check_images(prompts: Sequence[Images | None], max_images: int) -> None:
    """Check the number of images in a request's prompts, before any work is done on them.

    Raises:
        InvalidRequest: if there are more than `max_images`.
    """
    sources = [source for images in prompts if images is not None for source in images.sources]
    if len(sources) > max_images:
        param = sources[max_images].param
        message = f"`{param}`: a request may have {max_images} images, got {len(sources)}"
        refuse(param, message, "too_many_images")


async def load_images(exchange: Exchange, served: Served, images: Images) -> None:
    """Fetch and decode the images of a prompt, and run the model's image processor on them.

    Raises:
        InvalidRequest: if one cannot be fetched, read or used; `param` names it.
        ImageTooLarge, ImageTimeout: if fetched images are too large or too slow.
        Overloaded: if all requests together hold too many bytes.
    """
    if not images:
        return
    assert served.image_processor is not None, "a model without image processor gets no images"
    files = await _fetch(exchange, images.sources)
    num_bytes, decoded = 0, []
    for i, source in enumerate(images.sources):
        image, size = await _decode(exchange, source, files[i])
        files[i] = None
        num_bytes += size
        decoded.append(image)
    threads = exchange.context.image_threads
    processed = await threads.run_for(exchange.tenant, served.image_processor.process, decoded)
    images.loaded = [(image.digest, made) for image, made in zip(decoded, processed, strict=True)]
    exchange.hold_image(sum(made.num_bytes for made in processed) - num_bytes, images.sources[0].param)


def salted_images(images: Sequence[ImageInput], salt: str | None) -> tuple[ImageInput, ...]:
    """Return images whose digests are specific to this salt.

    Encoded images are cached by digest. Response times must not reveal to one client what another has sent.
    """
    if salt is None:
        return tuple(images)
    key = blake2b(salt.encode(errors="surrogatepass")).digest()
    return tuple(
        replace(each, digest=blake2b(each.digest, key=key, digest_size=len(each.digest)).digest())
        for each in images
    )


async def _decode(exchange: Exchange, source: ImageSource, file: bytes | None) -> tuple[Image, int]:
    """Return an image, and the number of bytes held for it."""
    threads, max_pixels = exchange.context.image_threads, exchange.context.settings.max_image_pixels
    opened = await threads.run_for(exchange.tenant, _open, source, file, max_pixels)
    exchange.hold_image(opened.decoding_bytes, source.param)
    # On failure, the request's end releases everything.
    image = await threads.run_for(exchange.tenant, opened.decode)
    exchange.hold_image(opened.decoded_bytes - opened.decoding_bytes, source.param)
    return image, opened.decoded_bytes


def _open(source: ImageSource, file: bytes | None, max_pixels: int) -> Opened:
    if file is None:
        read = bytes_of_base64 if source.is_base64 else bytes_of_url
        file = read(source.content, source.param)
    return open_picture(file, max_pixels, source.param)


async def _fetch(exchange: Exchange, sources: Sequence[ImageSource]) -> list[bytes | None]:
    """Return the files of the images that must be fetched."""
    files: list[bytes | None] = [None] * len(sources)
    remote = [i for i, each in enumerate(sources) if not (each.is_base64 or is_data_url(each.content))]
    if not remote:
        return files
    slots = asyncio.Semaphore(MAX_FETCHES)
    budget = _FetchBudget(exchange)

    async def fetch(i: int) -> None:
        async with slots:
            source = sources[i]
            try:
                files[i] = await exchange.context.fetcher.fetch(source.content, source.param, budget)
            except _TooLong:
                limit = f"the images that a request has fetched may have {budget.max_bytes} bytes"
                message = f"`{source.param}`: {limit}"
                raise ImageTooLarge(message, param=source.param) from None

    try:
        async with asyncio.timeout(FETCH_TIMEOUT_S), asyncio.TaskGroup() as group:
            for i in remote:
                group.create_task(fetch(i))
    except TimeoutError:
        late = sources[next((i for i in remote if files[i] is None), remote[-1])].param
        message = f"`{late}` could not be fetched within {FETCH_TIMEOUT_S:.0f} seconds"
        raise ImageTimeout(message, param=late) from None
    except ExceptionGroup as failed:  # the first failure has cancelled the others
        raise failed.exceptions[0] from None
    return files


class _TooLong(Exception):
    """Raised when what a prompt fetches exceeds its budget."""


class _FetchBudget:
    """Counts bytes fetched for a prompt against the body limit and the bytes held by all requests."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._num_read = 0
        self.max_bytes = exchange.context.settings.payload_limit

    def expect(self, size: int) -> None:
        if self._num_read + size > self.max_bytes:
            raise _TooLong

    def consume(self, size: int) -> None:
        self.expect(size)
        self._exchange.hold(size)
        self._num_read += size
