"""Decode an image's bytes to upright RGB pixels, as transformers' `load_image` does; by Pillow, in two steps:

    opened = open_picture(data, max_pixels, param)    # the header
    ...                                               # reserve `opened.decoding_bytes` of memory
    image = opened.decode()                           # the pixels

Both belong in a worker thread. Pillow is imported only here, when the first image arrives.
"""

from __future__ import annotations

import base64
import binascii
import struct
import zlib
from dataclasses import dataclass
from hashlib import blake2b
from io import BytesIO
from typing import TYPE_CHECKING
from urllib.parse import unquote_to_bytes

from tgi_asgi.errors import InvalidRequest
from tgi_asgi.images.headers import (
    BadHeader,
    PixelParts,
    exif_orientation,
    gif_parts,
    jpeg_parts,
    png_parts,
    webp_size,
    xmp_orientation,
)
from tgi_asgi.types import Image

if TYPE_CHECKING:
    import PIL.Image

FORMATS = {  # first bytes of a file; other formats are refused
    "PNG": b"\x89PNG\r\n\x1a\n",
    "JPEG": b"\xff\xd8\xff",
    "WEBP": b"RIFF",
    "GIF": b"GIF8",
    "BMP": b"BM",
}
PIXEL_BYTES = 4  # of an RGB image in Pillow
_WEBP_DECODING_BYTES = 16  # per pixel at the peak (measured): two canvases and a copy
_OTHER_DECODING_BYTES = 8  # the file's mode and RGB, or the image before and after a rotation
_PARTS = {"PNG": png_parts, "JPEG": jpeg_parts, "GIF": gif_parts}
_DIGEST_SIZE = 32
_DIGEST_ROWS = 64
# Exceptions that Pillow raises for broken bytes.
_BROKEN = (
    OSError, SyntaxError, ValueError, LookupError, TypeError, ArithmeticError, AttributeError, EOFError,
    RuntimeError, MemoryError, struct.error, zlib.error, Warning,
)  # fmt: skip


@dataclass(slots=True)
class Opened:
    """An image whose header has been read.

    Attributes:
        decoding_bytes: Peak memory of `decode`.
        decoded_bytes: Memory of its result.
    """

    _picture: PIL.Image.Image
    _orientation: int
    _param: str
    decoding_bytes: int

    @property
    def decoded_bytes(self) -> int:
        return self._picture.width * self._picture.height * PIXEL_BYTES

    def decode(self) -> Image:
        """Return the pixels; of an animation, those of its first frame. Call it once.

        Raises:
            InvalidRequest: if the file is broken.
        """
        import PIL.Image

        turn = PIL.Image.Transpose
        turns = {
            2: turn.FLIP_LEFT_RIGHT, 3: turn.ROTATE_180, 4: turn.FLIP_TOP_BOTTOM, 5: turn.TRANSPOSE,
            6: turn.ROTATE_270, 7: turn.TRANSVERSE, 8: turn.ROTATE_90,
        }  # fmt: skip
        try:
            self._picture.load()
            # Each result replaces its source, which would otherwise be a third image in memory.
            if self._picture.mode != "RGB":
                self._picture = self._picture.convert("RGB")
            if self._orientation in turns:
                self._picture = self._picture.transpose(turns[self._orientation])
        except _BROKEN as error:
            raise _refusal(self._param, "it is broken or cut off") from error
        return Image(self._picture, _digest_of(self._picture), self._param)


def open_picture(data: bytes, max_pixels: int, param: str) -> Opened:
    """Read an image's header.

    Args:
        max_pixels: Maximum number of pixels.
        param: Request field that it comes from, for errors.

    Raises:
        InvalidRequest: if its format is not supported, or it is too large or broken.
    """
    import PIL.Image

    if not data:
        raise _refusal(param, "it is empty")
    kind = next((name for name, magic in FORMATS.items() if data.startswith(magic)), None)
    if kind is None or (kind == "WEBP" and data[8:12] != b"WEBP"):
        raise _refusal(param, "it is none of PNG, JPEG, WebP, GIF and BMP")
    try:
        if kind == "WEBP":
            _check_size(webp_size(data), max_pixels, param)
        parts = _PARTS[kind](data) if kind in _PARTS else PixelParts(data)
        picture = _opened(parts.data, kind)
    except BadHeader as error:
        raise _refusal(param, str(error)) from None
    except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning):  # beyond any `max_pixels`
        raise _too_large(max_pixels, "more", param) from None
    except _BROKEN as error:
        raise _refusal(param, "its header is broken") from error
    _check_size(picture.size, max_pixels, param)
    if kind == "BMP" and picture.info.get("compression") in (1, 2):
        raise _refusal(param, "BMP is read without run-length encoding")  # Pillow decodes that in Python
    if kind == "WEBP":
        orientation, per_pixel = _orientation_of(picture), _WEBP_DECODING_BYTES
    else:
        orientation = parts.orientation
        per_pixel = max(_OTHER_DECODING_BYTES, PIXEL_BYTES + parts.coefficient_bytes)
    return Opened(picture, orientation, param, picture.width * picture.height * per_pixel)


def is_data_url(url: str) -> bool:
    """Return whether a URL has the scheme `data:`, in any case and after any blanks."""
    return url[:16].lstrip()[:5].lower() == "data:"


def bytes_of_url(url: str, param: str) -> bytes:
    """Return the bytes in a `data:` URL.

    Raises:
        InvalidRequest: if its media type is not an image's, or it is not in base64.
    """
    head, comma, text = url.partition(",")
    media_type, *parameters = head.partition(":")[2].split(";")
    if not comma or not parameters or parameters[-1].strip().lower() != "base64":
        raise _refusal(param, "a `data:` URL must be in base64: data:image/png;base64,...")
    if not media_type.strip().lower().startswith("image/"):
        raise _refusal(param, f"its media type must be one of images, got {media_type[:40]!r}")
    return bytes_of_base64(text, param)


def bytes_of_base64(text: str, param: str) -> bytes:
    """Return the bytes of a base64 text, with or without padding and line breaks.

    Raises:
        InvalidRequest: if it is not base64.
    """
    try:
        data = unquote_to_bytes(text) if "%" in text else text.encode("ascii")
        data = data.translate(None, b" \t\r\n").rstrip(b"=")
        return base64.b64decode(data + b"=" * (-len(data) % 4), validate=True)
    except (ValueError, binascii.Error):
        raise _refusal(param, "its base64 is invalid") from None


def _opened(data: bytes, kind: str) -> PIL.Image.Image:
    import PIL.Image

    # Import only this format's plugin; otherwise Pillow imports about fifty to find it.
    match kind:
        case "PNG":
            import PIL.PngImagePlugin
        case "JPEG":
            import PIL.JpegImagePlugin
        case "WEBP":
            import PIL.WebPImagePlugin
        case "GIF":
            import PIL.GifImagePlugin
        case "BMP":
            import PIL.BmpImagePlugin
    return PIL.Image.open(BytesIO(data), formats=(kind,))


def _orientation_of(picture: PIL.Image.Image) -> int:
    """Return an image's orientation from the metadata that Pillow found when it opened the file."""
    exif, xmp = picture.info.get("exif"), picture.info.get("xmp", b"")
    found = exif_orientation(exif) if isinstance(exif, bytes) else None
    return found or (xmp_orientation(xmp) if isinstance(xmp, bytes) else None) or 1


def _check_size(size: tuple[int, int], max_pixels: int, param: str) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise _refusal(param, "it has no pixels")
    if width * height > max_pixels:
        raise _too_large(max_pixels, f"{width} x {height}", param)


def _too_large(max_pixels: int, given: str, param: str) -> InvalidRequest:
    message = f"`{param}`: an image may have {max_pixels} pixels, got {given}"
    return InvalidRequest(message, param=param, code="image_too_large")


def _digest_of(picture: PIL.Image.Image) -> bytes:
    """Return the digest of an image's size and pixels, in strips, to avoid a copy of the whole image."""
    width, height = picture.size
    digest = blake2b(struct.pack("<QQ", width, height), digest_size=_DIGEST_SIZE)
    for top in range(0, height, _DIGEST_ROWS):
        strip = picture.crop((0, top, width, min(top + _DIGEST_ROWS, height)))
        digest.update(strip.tobytes())
    return digest.digest()


def _refusal(param: str, why: str) -> InvalidRequest:
    message = f"`{param}` is not an image that can be read: {why}"
    return InvalidRequest(message, param=param, code="invalid_image")
