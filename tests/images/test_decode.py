"""From bytes to pixels: read as transformers does, or refused before decoding costs anything."""

from __future__ import annotations

import struct
import tracemalloc
import weakref
import zlib
from io import BytesIO
from typing import Any

import PIL.Image
import PIL.ImageOps
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.pictures import data_url, encoded, picture, text_of
from tgi_asgi.errors import InvalidRequest
from tgi_asgi.images.decode import bytes_of_base64, bytes_of_url, open_picture
from tgi_asgi.images.headers import MAX_BLOCKS, MAX_CHUNKS, MAX_SCANS, MAX_SEGMENTS, exif_orientation
from tgi_asgi.types import Image

MAX_PIXELS = 10_000
LOSSLESS = [
    ("PNG", "RGB", {}), ("PNG", "RGBA", {}), ("PNG", "L", {}), ("PNG", "P", {}), ("PNG", "I;16", {}),
    ("PNG", "1", {}), ("PNG", "LA", {}), ("WEBP", "RGB", {"lossless": True}),
    ("WEBP", "RGBA", {"lossless": True}), ("GIF", "P", {}), ("BMP", "RGB", {}), ("BMP", "L", {}),
    ("JPEG", "RGB", {}), ("JPEG", "L", {}), ("JPEG", "CMYK", {}), ("JPEG", "RGB", {"progressive": True}),
    ("WEBP", "RGB", {}), ("WEBP", "RGBA", {}),
]  # fmt: skip


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> Image:
    return open_picture(data, max_pixels, "here").decode()


def refusal(data: bytes, max_pixels: int = MAX_PIXELS) -> str:
    with pytest.raises(InvalidRequest) as caught:
        decode(data, max_pixels)
    assert caught.value.param == "here"
    return caught.value.message


def reference(data: bytes) -> PIL.Image.Image:
    """Read a picture as transformers' `load_image` does."""
    return PIL.ImageOps.exif_transpose(PIL.Image.open(BytesIO(data))).convert("RGB")


@pytest.mark.parametrize(("format", "mode", "options"), LOSSLESS)
def test_pixels_are_those_that_transformers_sees(format: str, mode: str, options: dict[str, Any]) -> None:
    source = picture(21, 10, "L").convert(mode) if mode == "I;16" else picture(21, 10, mode)
    data = encoded(source, format, **options)
    image = decode(data)
    assert (image.pixels.mode, image.pixels.size) == ("RGB", (21, 10))
    assert image.pixels.tobytes() == reference(data).tobytes()
    assert image.param == "here"


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_a_turned_picture_is_upright(format: str, orientation: int) -> None:
    exif = PIL.Image.Exif()
    exif[0x010F] = "a camera"
    exif[0x0112] = orientation
    data = encoded(picture(21, 10), format, exif=exif)
    assert decode(data).pixels.tobytes() == reference(data).tobytes()
    assert decode(data).pixels.size == ((21, 10) if orientation < 5 else (10, 21))


def test_the_orientation_may_stand_in_xmp() -> None:
    for xmp in (b'<x tiff:Orientation="6"/>', b"<tiff:Orientation>6</tiff:Orientation>"):
        data = encoded(picture(21, 10), "JPEG", xmp=xmp)
        assert decode(data).pixels.size == (10, 21)  # as in Pillow since 11.2


def test_of_an_animation_the_first_frame_is_read() -> None:
    frames = [PIL.Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "green")]
    for format in ("GIF", "WEBP", "PNG"):
        options = {"lossless": True} if format == "WEBP" else {}
        data = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
        assert decode(data).pixels.getpixel((0, 0)) == (255, 0, 0)


def test_equal_pixels_have_one_digest_whatever_the_file() -> None:
    one = decode(encoded(picture(70, 70))).digest
    assert len(one) == 32
    assert one == decode(encoded(picture(70, 70), "BMP")).digest
    others = [picture(70, 69), picture(69, 70), picture(70, 70).transpose(PIL.Image.Transpose.ROTATE_90)]
    assert len({one, *(decode(encoded(other)).digest for other in others)}) == 4
    flat, tall = PIL.Image.new("RGB", (8, 2)), PIL.Image.new("RGB", (2, 8))
    assert decode(encoded(flat)).digest != decode(encoded(tall)).digest


def test_size_is_judged_by_the_header() -> None:
    assert decode(encoded(picture(100, 100))).pixels.size == (100, 100)
    for format in ("PNG", "JPEG", "WEBP", "GIF", "BMP"):
        data = encoded(PIL.Image.new("RGB", (101, 100)), format)
        tracemalloc.start()
        assert "may have 10000 pixels, got 101 x 100" in refusal(data)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 1 << 20


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, body: bytes = b"") -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", body or zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


def webp_canvas(width: int, height: int) -> bytes:
    sizes = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return b"RIFF" + struct.pack("<I", 22) + b"WEBPVP8X" + struct.pack("<I", 10) + b"\2\0\0\0" + sizes


@pytest.mark.parametrize(
    "data",
    [
        png(2**31 - 1, 2**31 - 1), png(60_000, 60_000, zlib.compress(bytes(10_000_000))),
        webp_canvas(1 << 24, 1 << 8),
        b"RIFF\x1a\0\0\0WEBPVP8L\x0d\0\0\0\x2f" + b"\xff" * 12,
        b"GIF89a\xff\xff\xff\xff\0\0\0,\0\0\0\0\xff\xff\xff\xff\0\x02\x02L\x01\0;",
    ],
    ids=["largest png", "zeros in png", "webp canvas", "webp", "gif"],
)  # fmt: skip
def test_bombs_do_not_go_off(data: bytes) -> None:
    tracemalloc.start()
    assert "may have 33554432 pixels" in refusal(data, 1 << 25)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_a_frame_larger_than_its_screen_counts() -> None:
    data = b"GIF89a\x01\0\x01\0\0\0\0,\0\0\0\0\xff\xff\xff\xff\0\x02\x02L\x01\0;"
    assert "may have 10000 pixels, got more" in refusal(data)
    assert "got 1000 x 1000" in refusal(data.replace(b"\xff\xff", struct.pack("<H", 1000)))


@pytest.mark.parametrize(
    "data",
    [
        b"hello", b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>", b"%PDF-1.7",
        b"II*\0", b"MM\0*", b"P6 4 4 255 " + bytes(48), b"RIFF\x10\0\0\0WAVEfmt ",
        b"\x00\x00\x00\x1cftypavif", b"8BPS",
        encoded(format="TIFF"), encoded(format="PPM"), encoded(format="ICO"), encoded(format="TGA"),
    ],
)  # fmt: skip
def test_other_formats_are_refused_by_their_first_bytes(data: bytes) -> None:
    assert "none of PNG, JPEG, WebP, GIF and BMP" in refusal(data)


def test_no_bytes_are_called_so() -> None:
    assert "it is empty" in refusal(b"")


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_what_is_cut_off_is_refused(format: str) -> None:
    data = encoded(picture(40, 40), format)
    for size in (8, 20, len(data) // 3, len(data) // 2, len(data) * 3 // 4):
        refusal(data[:size])


@given(st.data())
def test_broken_files_are_refused_or_read(data: st.DataObject) -> None:
    format = data.draw(st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP"]))
    file = bytearray(encoded(picture(20, 20), format))
    for _ in range(data.draw(st.integers(1, 5))):
        file[data.draw(st.integers(4, len(file) - 1))] = data.draw(st.integers(0, 255))
    try:
        image = decode(bytes(file))
    except InvalidRequest as error:
        assert error.param == "here"
    else:
        assert image.pixels.mode == "RGB"


@given(
    st.binary(max_size=200),
    st.sampled_from([b"\xff\xd8\xff", b"RIFF....WEBP", b"GIF89a", b"BM", b"\x89PNG\r\n\x1a\n"]),
)
def test_noise_is_refused_or_read(noise: bytes, magic: bytes) -> None:
    try:
        decode(magic + noise)
    except InvalidRequest as error:
        assert error.param == "here"


@given(st.binary(max_size=100), st.sampled_from([b"II", b"MM", b"Exif\0\0II*\0\x08\0\0\0"]))
def test_broken_exif_says_nothing(noise: bytes, head: bytes) -> None:
    assert exif_orientation(head + noise) in {None, *range(1, 9)}


def segment(marker: int, content: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


def test_what_else_is_in_a_jpeg_is_not_looked_at() -> None:
    """Add oversized EXIF, colour profiles, comments, further pictures, and a trailing film; none matters."""
    plain = encoded(picture(40, 30), "JPEG")
    entries = b"".join(struct.pack("<HHII", i, 7, 60_000, 8) for i in range(0x8000, 0x8000 + 5000))
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 5000) + entries
    extra = [segment(0xE1, exif)] * 30 + [segment(0xE2, b"MPF\0" + bytes(99)), segment(0xFE, b"x" * 60_000)]
    data = plain[:2] + b"".join(extra) + plain[2:] + b"ftyp" + bytes(100_000) + b"\xff\xda" * 1000
    assert decode(data).digest == decode(plain).digest


def test_what_else_is_in_a_png_is_not_unpacked() -> None:
    """Add colour profiles and texts, each of a thousand bytes that may expand to a megabyte."""
    plain = encoded(picture(40, 30))
    extra = chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(1_000_000))) + chunk(b"zTXt", b"a\0\0!")
    for at in (33, len(plain) - 12):
        data = plain[:at] + extra * 2000 + plain[at:]
        assert decode(data).digest == decode(plain).digest
    assert f"more than {MAX_CHUNKS} chunks" in refusal(plain[:33] + chunk(b"abCd", b"") * MAX_CHUNKS)


@pytest.mark.parametrize("is_late", [False, True])
def test_a_png_is_turned_wherever_it_says_so(is_late: bool) -> None:
    plain = encoded(picture(21, 10))
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    xmp = b"XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation='6' tiff:Orientation=\"6\"/>"
    at = len(plain) - 12 if is_late else 33
    for kind, content in ((b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0")), (b"iTXt", xmp)):
        data = plain[:at] + chunk(kind, content) + plain[at:]
        assert decode(data).pixels.tobytes() == reference(data).tobytes()
        assert decode(data).pixels.size == (10, 21)


def test_scans_and_segments_of_a_jpeg_are_bounded() -> None:
    plain = encoded(picture(40, 30), "JPEG", progressive=True)
    at = plain.rindex(b"\xff\xda")
    scan = plain[at:-2]
    assert decode(plain[:-2] + scan * 5 + b"\xff\xd9").pixels.size == (40, 30)
    assert f"more than {MAX_SCANS} scans" in refusal(plain[:-2] + scan * MAX_SCANS + b"\xff\xd9")
    many = segment(0xFE, b"") * MAX_SEGMENTS
    assert f"more than {MAX_SEGMENTS} segments" in refusal(plain[:2] + many + plain[2:])


def test_what_else_is_in_a_gif_is_not_looked_at() -> None:
    """Add comments and an application's blocks; only the colour that is transparent matters."""
    plain = encoded(picture(40, 30, "P"), "GIF", duration=50, transparency=0)
    at = plain.index(b"!\xf9")
    extra = b"!\xfe" + (b"\xff" + b"a" * 255) * 9 + b"\0" + b"!\xff\x0bXMP DataXMP\2ab\0"
    for data in (plain[:at] + extra * 1000 + b"\0" + plain[at:], plain[: at + 8] + extra + plain[at + 8 :]):
        opened = open_picture(data, MAX_PIXELS, "here")
        assert not {"comment", "extension"} & set(opened._picture.info)
        assert opened.decode().pixels.tobytes() == reference(data).tobytes()
    for extra in (b"!\xfe\0" * (MAX_BLOCKS + 1), b"!\xfe" + b"\1a" * MAX_BLOCKS + b"\0"):
        assert f"more than {MAX_BLOCKS} blocks" in refusal(plain[:at] + extra + plain[at:])


@pytest.mark.parametrize(
    ("format", "mode", "options", "num_bytes"),
    [
        ("PNG", "RGBA", {}, 8), ("GIF", "P", {}, 8), ("WEBP", "RGB", {}, 16), ("JPEG", "CMYK", {}, 8),
        ("JPEG", "RGB", {"progressive": True}, 10), ("JPEG", "CMYK", {"progressive": True}, 12),
    ],
)  # fmt: skip
def test_the_peak_of_decoding_is_known(
    format: str, mode: str, options: dict[str, Any], num_bytes: int
) -> None:
    data = encoded(picture(20, 10, mode), format, **options)
    assert open_picture(data, MAX_PIXELS, "here").decoding_bytes == 200 * num_bytes


def test_a_scan_of_one_component_buffers_coefficients() -> None:
    data = encoded(picture(20, 10), "JPEG")
    at = data.index(b"\xff\xda\0\x0c\3")
    one = data[:at] + b"\xff\xda\0\x08\1\1\0\0\x3f\0" + data[at + 14 :]
    assert open_picture(one, MAX_PIXELS, "here").decoding_bytes == 200 * 10


def test_no_third_image_is_held_while_one_is_turned() -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    opened = open_picture(encoded(picture(21, 10, "RGBA"), exif=exif), MAX_PIXELS, "here")
    source = weakref.ref(opened._picture)
    assert opened.decode().pixels.size == (10, 21)
    assert source() is None


def test_run_lengths_in_bmp_are_refused() -> None:
    header = struct.pack("<IiiHHIIiiII", 40, 90, 90, 1, 8, 1, 0, 0, 0, 256, 0)
    data = b"BM" + struct.pack("<IHHI", 0, 0, 0, 14 + 40 + 1024) + header + bytes(1024) + b"\xff\0" * 50
    assert "run-length" in refusal(data)


def test_data_urls_hold_base64_of_images() -> None:
    data = encoded()
    assert bytes_of_url(data_url(data), "here") == data
    assert bytes_of_url(f"data:IMAGE/jpeg;charset=x;BASE64,{text_of(data)}", "here") == data
    for url in (
        "data:", "data:,", "data:image/png", "data:image/png,abc", f"data:text/plain;base64,{text_of(data)}",
        f"data:;base64,{text_of(data)}", "data:image/png;base64,a", "data:image/png;base64,!!!!",
        "data:image/png;base64,é", "data:image/png;base64,\ud800",
    ):  # fmt: skip
        with pytest.raises(InvalidRequest) as caught:
            bytes_of_url(url, "here")
        assert caught.value.param == "here"


@given(st.binary(max_size=99))
def test_base64_may_have_lines_and_lack_padding(data: bytes) -> None:
    text = text_of(data)
    assert bytes_of_base64(text, "here") == data
    assert bytes_of_base64(text.rstrip("="), "here") == data
    assert bytes_of_base64("\r\n".join(text), "here") == data
    assert bytes_of_base64(text.replace("+", "%2B").replace("/", "%2F").replace("=", "%3D"), "here") == data
