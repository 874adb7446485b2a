"""Captioned grids of images, views of unfinished pictures, and PNG files."""

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lina_jax import output_files

GRID, SETTINGS = "grid.png", "settings.json"  # what `lina_jax.sample` writes beside its images
SHOWN = 36  # the most images that commands show of many
SMALLEST_CELL = 128  # pixels; smaller images are enlarged without smoothing
SMALLEST_SHOWN = 256  # the same for an unfinished picture
BLANK, FRAME = (206, 206, 200), (255, 122, 26)
FIRST, LAST = (44, 40, 110), (250, 222, 96)  # colours of the first and the last tokens in `order`


def grid(images: np.ndarray, captions: Sequence[str] | None = None, columns: int = 0) -> np.ndarray:
    """images (N, H, W, 3) uint8, each above its caption -> one picture (H', W', 3) uint8; nearly square by default."""
    count, height, width, _ = images.shape
    columns = min(columns or int(np.ceil(np.sqrt(count))), count)
    scale = max(1, -(-SMALLEST_CELL // min(height, width)))
    height, width, gap = height * scale, width * scale, 6
    font = ImageFont.load_default(size=12)
    letters = max(1, int(width / font.getlength("n")))
    wrapped = [textwrap.wrap(caption, letters) for caption in captions] if captions else [[]] * count
    text_height = max(map(len, wrapped), default=0) * 15 + (4 if captions else 0)
    rows = -(-count // columns)
    cell_height, cell_width = height + text_height + gap, width + gap
    paper = Image.new("RGB", (columns * cell_width + gap, rows * cell_height + gap), (246, 246, 244))
    draw = ImageDraw.Draw(paper)
    for i, (image, lines) in enumerate(zip(images, wrapped, strict=True)):
        x, y = gap + i % columns * cell_width, gap + i // columns * cell_height
        paper.paste(Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST), (x, y))
        draw.multiline_text((x, y + height + 3), "\n".join(lines), fill=(40, 40, 40), font=font, spacing=3)
    return np.asarray(paper)


def is_grid(path: Path) -> bool:
    """Whether a file is the grid that `lina_jax.sample` wrote beside its images."""
    return path.name == GRID and (path.parent / SETTINGS).is_file()


def save(path: Path, image: np.ndarray) -> None:
    """Write a PNG."""
    with output_files.new_file(path) as partial:
        partial.write_bytes(png(image))


def png(image: np.ndarray) -> bytes:
    data = io.BytesIO()
    Image.fromarray(image).save(data, "PNG")
    return data.getvalue()


def unfinished(image: np.ndarray, sets: np.ndarray, step: int) -> np.ndarray:
    """A picture (H, W, 3) uint8 after `step` decoding steps, enlarged if it is small -> (H', W', 3).

    sets (rows, columns): the step, from 1, in which each token is drawn. The latest are framed, later ones are blank.
    """
    scale = max(1, -(-SMALLEST_SHOWN // min(image.shape[:2])))
    side = image.shape[0] * scale // sets.shape[0]  # of a token
    shown, sets = _enlarged(image, scale), _enlarged(sets, side)
    rows, columns = (np.arange(length) % side for length in sets.shape)
    edge = [np.minimum(place, side - 1 - place) < max(1, side // 16) for place in (rows, columns)]
    shown[(sets == step) & (edge[0][:, None] | edge[1])] = FRAME
    shown[sets > step] = BLANK
    return shown


def order(sets: np.ndarray, step: int) -> np.ndarray:
    """(rows, columns, 3) uint8: when each token is drawn, from dark to light; blank for tokens after `step`."""
    share = (sets - 1) / max(1, sets.max() - 1)
    shown = (np.array(FIRST) + share[..., None] * np.subtract(LAST, FIRST)).astype(np.uint8)
    shown[sets > step] = BLANK
    return shown


def _enlarged(array: np.ndarray, times: int) -> np.ndarray:
    return array.repeat(times, axis=0).repeat(times, axis=1)
