"""Does a picture show what its caption states? A rule-based judge in the manner of GenEval, with nothing to download.

Every pixel is unmixed into background and one palette colour. Connected pixels form an object. Its shape is the one
that, rendered with the same area in the same place, covers it best. Lengths are in units of the image side.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import permutations

import numpy as np

from lina_jax import shapes
from lina_jax.errors import UserError
from lina_jax.shapes import CATEGORIES, PALETTE, PLACES, RELATIONS, SHAPES, Caption, Noun, Object, Scene

MIN_AREA = 0.01  # of the picture; less is a speck (our smallest objects cover 0.03)
MIN_CONTRAST = 60  # in 8-bit RGB; a colour closer to the background is not looked for
MIN_OVERLAP = 0.7  # intersection over union; if no shape covers an object this well, its shape is unknown
CENTER = 0.09  # an object this far from the center is not in the center, but at a side


@dataclass(frozen=True)
class Detection:
    """What a picture shows; shapes may be "unknown", objects and background may have any name of the palette."""

    objects: tuple[Object, ...]
    background: str


def detect(image: np.ndarray) -> Detection:
    """Return what is in `image` (H, H, 3), uint8 RGB, tolerating noise and blur.

    Raises ValueError on any other shape or type, such as pixels in -1..1.
    """
    if image.shape != (len(image), len(image), 3) or image.dtype != np.uint8:
        raise ValueError(f"expected a square RGB image in uint8, got {image.shape} {image.dtype}")
    pixels = image.astype(np.float32)
    ground = np.median(np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]), axis=0)
    distance = {name: np.linalg.norm(ground - rgb) for name, rgb in PALETTE.items()}
    colors = [name for name in PALETTE if distance[name] > MIN_CONTRAST]

    # pixel = ground + opacity * (colour - ground), for the one colour that leaves the least unexplained
    contrast = np.array([PALETTE[name] for name in colors], np.float32) - ground
    offset = pixels - ground
    opacity = np.einsum("hwc,kc->khw", offset, contrast) / np.sum(contrast**2, axis=1)[:, None, None]
    opacity = np.clip(opacity, 0, 1)
    rest = np.sum((offset - opacity[..., None] * contrast[:, None, None]) ** 2, axis=-1)
    best = np.argmin(rest, axis=0)

    objects = []
    for k, color in enumerate(colors):
        for part in _components((best == k) & (opacity[k] > 0.5)):
            # A pale object is still a whole one: the upper quartile of its opacity counts as opaque.
            whole = np.quantile(opacity[k][part], 0.75)
            objects.append(_recognise(np.minimum(opacity[k] / whole, 1) * _box(part), color))
    sized = tuple(replace(thing, size=shapes.size_word(thing.radius, len(objects))) for thing in objects)
    return Detection(sized, min(distance, key=distance.get))


def _components(mask: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the connected parts of `mask` (H, W) from MIN_AREA on, each a mask itself; neighbours share an edge."""
    from scipy import ndimage  # here, as few commands need it and it is a sixth of the package's import time

    labels, count = ndimage.label(mask)
    areas = np.bincount(labels.ravel(), minlength=count + 1) / mask.size  # noise has thousands of parts
    for label in range(1, count + 1):
        if areas[label] >= MIN_AREA:
            yield labels == label


def _box(part: np.ndarray) -> np.ndarray:
    """Return the mask of the box around `part`, one pixel wider on each side, for soft edges."""
    rows, columns = (np.flatnonzero(part.any(axis)) for axis in (1, 0))
    box = np.zeros_like(part)
    box[max(rows[0] - 1, 0) : rows[-1] + 2, max(columns[0] - 1, 0) : columns[-1] + 2] = True
    return box


def _moments(opacity: np.ndarray) -> tuple[float, float, float]:
    """Return the area and the centroid (x, y) of what `opacity` (H, H) in 0..1 shows."""
    middles = (np.arange(len(opacity)) + 0.5) / len(opacity)
    total = opacity.sum()
    return total / opacity.size, opacity.sum(0) @ middles / total, opacity.sum(1) @ middles / total


def _coverage(shape: str, x: float, y: float, radius: float, resolution: int) -> np.ndarray:
    """Return how much of each pixel a shape covers: (resolution, resolution) in 0..1."""
    white = Object(shape, "white", "", x, y, radius)
    return shapes.render(Scene((white,), "black", "", ""), resolution)[..., 0] / 255


@cache
def _unit_moments(shape: str) -> tuple[float, float, float]:
    """Return the area and the centroid of a shape of radius 1 at the origin."""
    area, x, y = _moments(_coverage(shape, 0.5, 0.5, 0.25, 256))
    return area / 0.25**2, (x - 0.5) / 0.25, (y - 0.5) / 0.25


def _recognise(opacity: np.ndarray, color: str) -> Object:
    """Return the object that `opacity` (H, H) in 0..1 resembles most; its size is left empty."""
    area, x, y = _moments(opacity)
    fits = []
    for shape in SHAPES:
        unit_area, unit_x, unit_y = _unit_moments(shape)
        radius = np.sqrt(area / unit_area)
        place = (x - radius * unit_x, y - radius * unit_y, radius)
        drawn = _coverage(shape, *place, len(opacity))
        fits.append((np.minimum(opacity, drawn).sum() / np.maximum(opacity, drawn).sum(), shape, *map(float, place)))
    overlap, shape, x, y, radius = max(fits)
    return Object(shape if overlap >= MIN_OVERLAP else "unknown", color, "", x, y, radius)


def satisfies(shown: Detection | Scene, caption: Caption) -> bool:
    """Return whether all that the caption states holds, and nothing else is in the picture."""
    if caption.background not in (None, shown.background) or len(shown.objects) != len(caption.nouns):
        return False
    return any(
        all(map(_answers, order, caption.nouns))
        and (caption.place is None or _lies(order[0], caption.place))
        and (caption.relation is None or _relates(*order, caption.relation))
        for order in permutations(shown.objects)
    )


def _answers(thing: Object, noun: Noun) -> bool:
    return noun.shape in (None, thing.shape) and noun.color in (None, thing.color) and noun.size in (None, thing.size)


def _lies(thing: Object, place: str) -> bool:
    x, y = thing.x - 0.5, thing.y - 0.5
    right, down = PLACES[place]
    if right == down == 0:
        return max(abs(x), abs(y)) < CENTER
    return x * right + y * down > CENTER


def _relates(first: Object, second: Object, relation: str) -> bool:
    """Return whether the first lies in the relation's direction from the second, farther along it than across."""
    x, y = first.x - second.x, first.y - second.y
    right, down = RELATIONS[relation]
    return x * right + y * down > abs(x * down) + abs(y * right)


def matches(image: np.ndarray, caption: str) -> bool:
    """Return whether `image` (H, H, 3), uint8, shows what the caption states, in the words of the grammar."""
    return satisfies(detect(image), shapes.parse(caption))


def score(images: np.ndarray, captions: Sequence[str]) -> dict[str, float | dict[str, int]]:
    """Return the fraction of correct images in each category, and "overall", the mean over the categories.

    `images` is (N, H, H, 3) in uint8. "examples" holds the number of pictures in each category.
    Raises UserError on a caption outside the grammar, or unless there are as many captions as images, and at least one.
    """
    if not len(images) == len(captions) > 0:
        raise UserError(f"{len(images)} images cannot be scored against {len(captions)} captions")
    parsed = [shapes.parse(caption) for caption in captions]
    verdicts = {category: [] for category in CATEGORIES}
    for image, caption in zip(images, parsed, strict=True):
        verdicts[caption.category].append(satisfies(detect(image), caption))
    verdicts = {category: found for category, found in verdicts.items() if found}
    fractions = {category: float(np.mean(found)) for category, found in verdicts.items()}
    examples = {category: len(found) for category, found in verdicts.items()}
    return {"overall": float(np.mean(list(fractions.values()))), **fractions, "examples": examples}
