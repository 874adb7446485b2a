"""Images on paper: captioned grids as PNG."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lina_jax import places

SMALLEST_CELL = 128  # pixels; smaller images are enlarged without smoothing


def grid(images: np.ndarray, captions: Sequence[str] | None = None, columns: int = 0) -> np.ndarray:
    """images (N, H, W, 3) uint8, each over its caption -> one picture (H', W', 3) uint8; a square by default."""
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


def save(path: Path, image: np.ndarray) -> None:
    """Write a PNG."""
    with places.new_file(path) as partial:
        Image.fromarray(image).save(partial, "PNG")
