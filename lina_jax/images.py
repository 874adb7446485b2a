"""Decode images of any kind to RGB of one size, and encode them."""

import io
import os
import warnings

import numpy as np
from PIL import ExifTags, Image, TiffImagePlugin

MAX_PIXELS = 2**27  # per image; more is a decompression bomb or a mistake

FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")  # Pillow runs other programs for some
MAX_ASPECT = 50  # long side / short side; a line of pixels, scaled until it fills a square crop, would fill the memory

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # by EXIF orientation

Image.MAX_IMAGE_PIXELS = None  # Pillow would warn at one size and raise at a larger one; `decode` checks MAX_PIXELS
warnings.filterwarnings("ignore", module=r"PIL\.")  # about odd metadata; what matters is whether the image decodes


def cpus() -> int:
    """CPUs that this process may use, fewer than the machine has in containers and batch jobs: threads for images."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class BadImage(Exception):
    """Why an image cannot be used, in a few words."""


def decode(data: bytes | np.ndarray, min_size: int = 1) -> Image.Image:
    """RGB image: upright, transparency over white, 16 bits scaled to 8, the first frame of several. Raises BadImage."""
    try:
        image = Image.fromarray(data) if isinstance(data, np.ndarray) else Image.open(io.BytesIO(data), formats=FORMATS)
        short, long = sorted(image.size)
        if short * long > MAX_PIXELS:
            raise BadImage(f"decompression bomb: more than {MAX_PIXELS} pixels")
        if short < min_size:
            raise BadImage(f"smaller than {min_size} pixels")
        if long > MAX_ASPECT * short:
            raise BadImage(f"one side is more than {MAX_ASPECT} times the other")
        is_tiff = isinstance(image, TiffImagePlugin.TiffImageFile)
        white_is_zero = is_tiff and image.tag_v2.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0
        image = _rgb(_upright(image), white_is_zero)
        image.info = {}  # Pillow would write color profiles and comments into each encoded copy
        return image
    except BadImage:
        raise
    except Exception as error:  # Pillow raises nearly anything on corrupt bytes
        if "truncated" in str(error) or "cannot load this image" in str(error):
            raise BadImage("truncated image") from None
        raise BadImage(f"undecodable image: {type(error).__name__}") from None


def _upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation alone: Pillow's own function rewrites all EXIF data, and fails if any of it is odd."""
    image.load()  # TIFF files are turned here, and lose the tag
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # Pillow raises nearly anything on corrupt bytes; these say nothing of the pixels
        turn = None
    return image if turn is None else image.transpose(turn)


def _rgb(image: Image.Image, white_is_zero: bool) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        levels = np.asarray(image)
        if levels.dtype.kind == "f" or levels.min() < 0 or levels.max() > 65535:
            raise BadImage(f"pixels of mode {image.mode}, neither 8 nor 16 bits")
        if white_is_zero:  # which Pillow heeds for up to 8 bits
            levels = 65535 - levels
        levels = np.where(levels == image.info.get("transparency"), 65535, levels)  # the one level that is transparent
        return Image.fromarray(np.uint8(np.round(levels / 257))).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def resize_and_crop(image: Image.Image, resolution: int) -> Image.Image:
    """Scale the shorter side to `resolution` and crop the center, as in ADM (Dhariwal and Nichol 2021)."""
    while min(image.size) >= 2 * resolution:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = resolution / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - resolution) // 2, (image.height - resolution) // 2
    return image.crop((left, top, left + resolution, top + resolution))


def encode(image: Image.Image, quality: int) -> bytes:
    """PNG for quality 0, JPEG of quality 1 to 100 otherwise."""
    out = io.BytesIO()
    if quality:
        image.save(out, "JPEG", quality=quality)
    else:
        image.save(out, "PNG", compress_level=1)  # the default takes 15 % longer and saves 2 %, at 256 px
    return out.getvalue()
