"""Checks of an image's bytes before a library sees them, which would check too late or take too long.

Pure functions, called by `decode.py`.
"""

from __future__ import annotations

import re
import struct

MAX_SCANS = 100  # of a JPEG; ten are usual, but a body can hold 300,000 empty ones: minutes of decoding
MAX_SEGMENTS = 1000  # of a JPEG; 16 MiB are 256 long ones
MAX_CHUNKS = 20_000  # of a PNG; 16 MiB are 2,000 of 8 KiB, as libpng writes them

_EOI, _SOS, _APP1 = 0xD9, 0xDA, 0xE1
_MARKER = re.compile(rb"\xff[^\x00\xff]")
_SCAN_END = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # not a stuffed byte, restart or fill
_BARE = frozenset({0x01, *range(0xD0, 0xD9)})  # markers without a segment
_UNUSED = frozenset({*range(0xE1, 0xEE), 0xEF, 0xFE})  # comments, and APPn except 0 and 14
_ORIENTATION = 0x0112
_PNG_PIXELS = frozenset({b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"})
_PNG_XMP = b"XML:com.adobe.xmp\0"
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([1-8])')


class BadHeader(ValueError):
    """Raised if bytes are not an image that should be decoded; the message says why."""


def jpeg_parts(data: bytes) -> tuple[bytes, int]:
    """Return a JPEG reduced to what its pixels need, and its orientation, 1 to 8.

    The rest (EXIF, XMP, further images, a video after the end) can be as long as the body, and libraries read
    it when they open the file.

    Raises:
        BadHeader: if it is cut off, or has more than `MAX_SCANS` scans or `MAX_SEGMENTS` segments.
    """
    kept, orientation, at, num_scans = [data[:2]], 1, 2, 0
    for _ in range(MAX_SEGMENTS):
        found = _MARKER.search(data, at)
        if found is None:
            raise BadHeader("it is cut off")
        at, marker = found.start(), data[found.end() - 1]
        if marker == _EOI:
            return b"".join([*kept, b"\xff\xd9"]), orientation
        if marker in _BARE:
            at += 2
            continue
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == _SOS:
            num_scans += 1
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


def png_parts(data: bytes) -> tuple[bytes, int]:
    """Return a PNG reduced to what its pixels need, and its orientation, 1 to 8.

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
            return b"".join(kept), exif or xmp or 1
        at = end
    raise BadHeader(f"it has more than {MAX_CHUNKS} chunks")


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
