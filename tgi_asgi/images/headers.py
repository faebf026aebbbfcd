"""Checks of an image's bytes before a library sees them, which would check too late or take too long.

Pure functions, called by `decode.py`.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass

MAX_SCANS = 100  # of a JPEG; ten are usual, but a body can hold 300,000 empty ones: minutes of decoding
MAX_SEGMENTS = 1000  # of a JPEG; 16 MiB are 256 long ones
MAX_CHUNKS = 20_000  # of a PNG; 16 MiB are 2,000 of 8 KiB, as libpng writes them
MAX_BLOCKS = 20_000  # of a GIF before its first image; 12 MiB are six million, which Pillow reads in Python

_EOI, _SOS, _APP1 = 0xD9, 0xDA, 0xE1
_MARKER = re.compile(rb"\xff[^\x00\xff]")
_SCAN_END = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # not a stuffed byte, restart or fill
_BARE = frozenset({0x01, *range(0xD0, 0xD9)})  # markers without a segment
_FRAMES = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})  # SOFn
_PROGRESSIVE = frozenset({0xC2, 0xC6, 0xCA, 0xCE})
_UNUSED = frozenset({*range(0xE1, 0xEE), 0xEF, 0xFE})  # comments, and APPn except 0 and 14
_ORIENTATION = 0x0112
_PNG_PIXELS = frozenset({b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"})
_PNG_XMP = b"XML:com.adobe.xmp\0"
_GIF_BLOCK = re.compile(rb"[!,;]")  # an extension, an image or the end; decoders skip anything else
_GRAPHIC_CONTROL = 0xF9
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([1-8])')


class BadHeader(ValueError):
    """Raised if bytes are not an image that should be decoded; the message says why."""


@dataclass(frozen=True, slots=True)
class PixelParts:
    """A file reduced to what its pixels need.

    Attributes:
        orientation: EXIF's number, 1 to 8; 1 is upright.
        coefficient_bytes: Bytes per pixel that the decoder holds besides the image.
    """

    data: bytes
    orientation: int = 1
    coefficient_bytes: int = 0


def jpeg_parts(data: bytes) -> PixelParts:
    """Reduce a JPEG to what its pixels need.

    The rest (EXIF, XMP, further images, a video after the end) can be as long as the body, and libraries read
    it when they open the file.

    Raises:
        BadHeader: if it is cut off, or has more than `MAX_SCANS` scans or `MAX_SEGMENTS` segments.
    """
    kept, orientation, at, num_scans = [data[:2]], 1, 2, 0
    num_components, holds_coefficients = 0, False
    for _ in range(MAX_SEGMENTS):
        found = _MARKER.search(data, at)
        if found is None:
            raise BadHeader("it is cut off")
        at, marker = found.start(), data[found.end() - 1]
        if marker == _EOI:
            # libjpeg holds all coefficients, of 2 bytes each, unless one scan has all components.
            coefficient_bytes = 2 * min(num_components, 4) if holds_coefficients else 0
            return PixelParts(b"".join([*kept, b"\xff\xd9"]), orientation, coefficient_bytes)
        if marker in _BARE:
            at += 2
            continue
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if marker in _FRAMES:
            num_components = max([num_components, *data[at + 9 : at + 10]])
            holds_coefficients |= marker in _PROGRESSIVE
        if marker == _SOS:
            num_scans += 1
            holds_coefficients |= data[at + 4 : at + 5] != bytes([num_components])
            if num_scans > MAX_SCANS:
                raise BadHeader(f"it has more than {MAX_SCANS} scans")
            found = _SCAN_END.search(data, end)
            end = len(data) + 1 if found is None else found.start()
        if end > len(data):
            raise BadHeader("it is cut off")
        if marker == _APP1:
            orientation = _orientation_of(data[at + 4 : end]) or orientation
        if marker not in _UNUSED:
            kept.append(data[at:end])
        at = end
    raise BadHeader(f"it has more than {MAX_SEGMENTS} segments")


def png_parts(data: bytes) -> PixelParts:
    """Reduce a PNG to what its pixels need.

    Libraries decompress the rest when they open the file: a body can hold 13,000 colour profiles of a
    megabyte each, which take them 40 s. An animation is reduced to its default image.

    Raises:
        BadHeader: if it is cut off, or has more than `MAX_CHUNKS` chunks.
    """
    kept, exif, xmp, at = [data[:8]], None, None, 8
    for _ in range(MAX_CHUNKS):
        kind, end = data[at + 4 : at + 8], at + 12 + int.from_bytes(data[at : at + 4], "big")
        if end > len(data):
            raise BadHeader("it is cut off")
        if kind in _PNG_PIXELS:
            kept.append(data[at:end])
        elif kind == b"eXIf":
            exif = exif_orientation(data[at + 8 : end - 4])
        elif kind == b"iTXt" and data.startswith(_PNG_XMP, at + 8):
            xmp = xmp_orientation(data[at + 8 : end - 4])
        if kind == b"IEND":
            return PixelParts(b"".join(kept), exif or xmp or 1)
        at = end
    raise BadHeader(f"it has more than {MAX_CHUNKS} chunks")


def gif_parts(data: bytes) -> PixelParts:
    """Reduce what comes before a GIF's first image to its colours and transparency.

    Pillow reads the rest (comments, XMP) block by block when it opens the file, and Pillow 11 joins
    comments in quadratic time: 3 MiB of empty ones take 17 s.

    Raises:
        BadHeader: if it is cut off, or has more than `MAX_BLOCKS` blocks.
    """
    flags = data[10] if len(data) > 10 else 0
    at = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)  # after the colours, if the file has common ones
    kept, num_blocks = [data[:at]], 0
    while found := _GIF_BLOCK.search(data, at):
        start = found.start()
        if found[0] != b"!":
            return PixelParts(b"".join([*kept, data[start:]]))
        at, size = start + 2, -1
        while size != 0:
            size = data[at] if at < len(data) else 0
            at += 1 + size
            num_blocks += 1
            if num_blocks > MAX_BLOCKS:
                raise BadHeader(f"it has more than {MAX_BLOCKS} blocks before its first image")
        if data[start + 1 : start + 2] == bytes([_GRAPHIC_CONTROL]):
            kept.append(data[start:at])
    raise BadHeader("it is cut off")


def _orientation_of(segment: bytes) -> int | None:
    if segment.startswith(b"Exif\0\0"):
        return exif_orientation(segment)
    return xmp_orientation(segment) if segment.startswith(b"http://ns.adobe.com/xap/1.0/\0") else None


def exif_orientation(exif: bytes) -> int | None:
    """Return the orientation in EXIF data; None if there is none, or the data is broken."""
    tiff = exif.removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return None
    try:
        (start,) = struct.unpack_from(order + "4xI", tiff)
        (num_entries,) = struct.unpack_from(order + "H", tiff, start)
        for at in range(start + 2, start + 2 + 12 * num_entries, 12):
            tag, _, _, value = struct.unpack_from(order + "HHIH", tiff, at)
            if tag == _ORIENTATION:
                return value if 1 <= value <= 8 else None
    except struct.error:
        pass
    return None


def xmp_orientation(xmp: bytes) -> int | None:
    """Return the orientation in XMP data, or None."""
    found = _XMP_ORIENTATION.search(xmp)
    return int(found[1]) if found else None


def webp_size(data: bytes) -> tuple[int, int]:
    """Return a WebP's width and height, because Pillow's decoder allocates memory for them when created.

    Raises:
        BadHeader: if its first chunk is not one of WebP's.
    """
    try:
        match data[12:16]:
            case b"VP8 ":
                width, height = struct.unpack_from("<HH", data, 26)
                return width & 0x3FFF, height & 0x3FFF
            case b"VP8L":
                (bits,) = struct.unpack_from("<I", data, 21)
                return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
            case b"VP8X":
                sizes = data[24:30]
                if len(sizes) == 6:
                    return int.from_bytes(sizes[:3], "little") + 1, int.from_bytes(sizes[3:], "little") + 1
    except struct.error:
        pass
    raise BadHeader("its header is broken")
