"""Images of any kind become upright RGB, or are refused with a short reason."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from lina_jax import images


def test_cpus_that_others_have_are_not_counted(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 5}, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert images.cpus() == 2
    monkeypatch.delattr(os, "sched_getaffinity")
    assert images.cpus() == 64


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def plain(mode: str, color, size=(6, 4)) -> Image.Image:
    return Image.new(mode, size, color)


def levels_16(level: int) -> Image.Image:
    return Image.fromarray(np.full((4, 6), level, np.uint16))


def rotated(orientation: int, odd: bool = False, kind: str = "JPEG") -> bytes:
    """An image with an EXIF orientation and, if `odd`, a tag whose value has the wrong type."""
    image = Image.new("RGB", (32, 16), "black")
    image.paste("white", (0, 0, 16, 8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = exif.tobytes()
    if odd:  # a second entry: the exposure time, a signed fraction where an unsigned one belongs
        entry = struct.pack("<HHII", 0x829A, 10, 1, 38) + struct.pack("<I", 0) + struct.pack("<ii", -1, 50)
        entries = struct.pack("<H", 2) + struct.pack("<HHII", 0x0112, 3, 1, orientation)
        data = b"Exif\0\0II*\0" + struct.pack("<I", 8) + entries + entry
    return encoded(image, kind, exif=data, **{"quality": 95} if kind == "JPEG" else {})


def bomb() -> bytes:
    """A PNG of a few bytes that claims 60,000 x 60,000 pixels."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


GOOD = {
    "gray": (encoded(plain("L", 7)), 7),
    "one bit": (encoded(plain("1", 1)), 255),
    "palette": (encoded(plain("RGB", (9, 9, 9)).convert("P", palette=Image.Palette.ADAPTIVE)), 9),
    "gray with alpha": (encoded(plain("LA", (0, 0))), 255),
    "transparent": (encoded(plain("RGBA", (10, 20, 30, 0))), 255),
    "half transparent": (encoded(plain("RGBA", (0, 0, 0, 127))), 128),
    "opaque": (encoded(plain("RGBA", (7, 7, 7, 255))), 7),
    "palette with a transparent color": (encoded(plain("P", 0), transparency=0), 255),
    "16 bits": (encoded(levels_16(257 * 90)), 90),
    "16 bits TIFF": (encoded(levels_16(65535), "TIFF"), 255),
    "16 bits with a transparent level": (encoded(levels_16(300), transparency=300), 255),
    "16 bits with another transparent level": (encoded(levels_16(0), transparency=300), 0),
    "16 bits, white is zero": (encoded(levels_16(65535), "TIFF", tiffinfo={262: 0}), 0),
    "CMYK": (encoded(plain("CMYK", (0, 0, 0, 255)), "JPEG", quality=95), 0),
    "GIF": (encoded(plain("L", 50), "GIF"), 50),
    "animation": (encoded(plain("L", 20), "GIF", save_all=True, append_images=[plain("L", 90)]), 20),
    "WebP": (encoded(plain("RGB", (40, 40, 40)), "WEBP", lossless=True), 40),
    "BMP": (encoded(plain("RGB", (41, 41, 41)), "BMP"), 41),
}
NOISE = Image.effect_noise((64, 64), 50)
BAD = {
    "empty": (b"", "undecodable image: UnidentifiedImageError"),
    "text": (b"<html>404</html>", "undecodable image: UnidentifiedImageError"),
    "truncated JPEG": (encoded(NOISE, "JPEG")[:-200], "truncated image"),
    "truncated PNG": (encoded(NOISE)[:-500], "truncated image"),
    "head of a JPEG": (encoded(NOISE, "JPEG")[:20], "undecodable image: .*"),
    "flipped bytes": (encoded(NOISE)[:200] + b"\xff" * 50 + encoded(NOISE)[250:], "(undecodable|truncated) image.*"),
    "bomb": (bomb(), "decompression bomb: more than 134217728 pixels"),
    "small": (encoded(plain("L", 0, (100, 3))), "smaller than 4 pixels"),
    "line": (encoded(plain("L", 0, (400, 5))), "one side is more than 50 times the other"),
    "32 bits": (encoded(Image.fromarray(np.full((4, 6), 70_000, np.int32)), "TIFF"), "pixels of mode I, neither .*"),
    "floats": (encoded(Image.fromarray(np.zeros((4, 6), np.float32)), "TIFF"), "pixels of mode F, neither .*"),
}  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_kinds_that_survive(name):
    data, level = GOOD[name]
    image = images.decode(data)
    assert image.mode == "RGB"
    assert image.size == (6, 4)
    np.testing.assert_allclose(np.asarray(image, int), level, atol=1)  # JPEG rounds


@pytest.mark.parametrize("name", BAD)
def test_kinds_that_are_refused(name):
    data, reason = BAD[name]
    with pytest.raises(images.BadImage, match=f"^({reason})$"):
        images.decode(data, min_size=4)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])  # Pillow turns TIFF files by itself
@pytest.mark.parametrize("orientation", range(10))
def test_exif_turns_the_image(orientation, kind):
    data = rotated(orientation, kind=kind)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(rotated(orientation, kind="PNG"))))
    np.testing.assert_allclose(np.asarray(images.decode(data), int), np.asarray(expected), atol=1)  # JPEG rounds


def test_odd_exif_is_no_matter():
    np.testing.assert_array_equal(
        np.asarray(images.decode(rotated(6, odd=True))), np.asarray(images.decode(rotated(6)))
    )
    unreadable = encoded(plain("RGB", (9, 9, 9)), exif=b"no EXIF at all")
    assert images.decode(unreadable).getpixel((0, 0)) == (9, 9, 9)


@pytest.mark.parametrize("quality", [0, 90])
def test_nothing_but_pixels_is_kept(quality):
    """Profiles and comments may be larger than the picture; Pillow refuses to read a PNG with a profile over 1 MiB."""
    noted = encoded(NOISE.convert("RGB"), "JPEG", icc_profile=os.urandom(2**21), comment=b"remark" * 1000, quality=95)
    bare = images.encode(images.decode(noted), quality)
    assert not {"icc_profile", "comment"} & Image.open(io.BytesIO(bare)).info.keys()
    assert len(bare) < 2**16


def test_resize_keeps_the_middle_of_the_shorter_side():
    image = Image.fromarray(np.repeat(np.arange(0, 240, 20, dtype=np.uint8)[None, :, None], 4, 0).repeat(3, 2))
    np.testing.assert_array_equal(np.asarray(images.resize_and_crop(image, 4))[0, :, 0], [80, 100, 120, 140])
    assert images.resize_and_crop(Image.new("RGB", (100, 33)), 8).size == (8, 8)
    assert images.resize_and_crop(Image.new("RGB", (5, 3)), 8).size == (8, 8)
    same = Image.effect_noise((8, 8), 50).convert("RGB")
    np.testing.assert_array_equal(np.asarray(images.resize_and_crop(same, 8)), np.asarray(same))


def test_quality_chooses_the_code():
    image = NOISE.convert("RGB")
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(images.encode(image, 0)))), np.asarray(image))
    sizes = [len(images.encode(image, quality)) for quality in (30, 95)]
    assert sizes[0] < sizes[1] < len(images.encode(image, 0))
    assert Image.open(io.BytesIO(images.encode(image, 30))).format == "JPEG"
