"""Captioned scenes of coloured shapes: a text-to-image task small enough for a laptop, judged by `scene_score`.

A `Caption` states some facts and leaves the others open; a `Scene` is one picture in which those facts hold. The
captions follow GenEval's six categories (Ghosh et al. 2023) and are few enough to be listed: the list is the grammar,
so drawing and parsing cannot disagree. Lengths are in units of the image side, x to the right, y downwards.
"""

import hashlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import permutations, product

import numpy as np
from PIL import Image, ImageDraw

from lina_jax.errors import UserError

SPLITS = ("train", "validation")
# The share of each category in a split. One object is what a laptop learns to draw in minutes.
CATEGORIES = {
    "single_object": 0.9,
    "colors": 0.02,
    "counting": 0.02,
    "two_objects": 0.02,
    "color_attribution": 0.02,
    "position": 0.02,
}
# The share of captions that state the background, which is most of a picture: so a model soon learns to read.
GROUNDED = 0.9
COLORS = {
    "red": (225, 30, 35),
    "green": (25, 165, 50),
    "blue": (30, 60, 225),
    "yellow": (250, 215, 20),
    "purple": (165, 25, 190),
    "cyan": (30, 205, 225),
}
BACKGROUNDS = {"white": (255, 255, 255), "black": (0, 0, 0), "gray": (128, 128, 128)}
PALETTE = COLORS | BACKGROUNDS
# Radius of a single object, and of one among others; and the boundaries between small and large.
SIZES = {"small": (7.2 / 32, 5 / 32), "large": (10 / 32, 6.5 / 32)}
SIZE_BOUNDARIES = (8.5 / 32, 5.7 / 32)
COUNTS = {1: "a", 2: "two", 3: "three", 4: "four"}
# Directions from the center of the picture, and from the second object to the first.
PLACES = {
    "on the left": (-1, 0),
    "on the right": (1, 0),
    "at the top": (0, -1),
    "at the bottom": (0, 1),
    "in the center": (0, 0),
}
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}

# Outlines of radius 1 stay within the box [-1, 1]²: objects in disjoint boxes cannot overlap.
_TURN = np.linspace(0, 2 * np.pi, 64, endpoint=False)
_CORNER = np.array([(1, 0.36), (0.36, 0.36), (0.36, 1)])  # a quarter of the cross
_OUTLINES = {
    "circle": np.stack([np.cos(_TURN), np.sin(_TURN)], axis=1),
    "square": 0.9 * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]),
    "triangle": np.array([(0, -1), (1, 0.9), (-1, 0.9)]),
    "cross": np.concatenate([_CORNER, _CORNER[::-1] * (-1, 1), -_CORNER, _CORNER[::-1] * (1, -1)]),
}
SHAPES = tuple(_OUTLINES)

_MARGIN = 1 / 32  # free space around the box of every object
_SUPERSAMPLING = 4


@dataclass(frozen=True)
class Noun:
    """What a caption says about one object; None where it says nothing."""

    shape: str | None = None
    color: str | None = None
    size: str | None = None

    def text(self, count: int = 1) -> str:
        """Return the noun phrase for `count` such objects: "a small red circle", "two crosses"."""
        shape = self.shape or "shape"
        plural = "" if count == 1 else "es" if shape.endswith("s") else "s"
        return " ".join(filter(None, [COUNTS[count], self.size, self.color, shape + plural]))


@dataclass(frozen=True)
class Caption:
    """All that a caption states: one noun per object in the picture, and None where it says nothing."""

    category: str
    nouns: tuple[Noun, ...]
    relation: str | None = None
    place: str | None = None
    background: str | None = None

    def text(self) -> str:
        """Return the sentence: lower case ASCII, at most 66 bytes."""
        first, *others = self.nouns
        if self.category == "counting":
            sentence = first.text(len(self.nouns))
        elif others:
            sentence = f"{first.text()} {self.relation or 'and'} {others[0].text()}"
        else:
            sentence = first.text()
        if self.place:
            sentence += f" {self.place}"
        if self.background:
            sentence += f"{',' if self.place else ''} on {self.background}"
        return sentence


@dataclass(frozen=True)
class Object:
    """One shape: (x, y) is the middle of its box, which reaches `radius` to each side."""

    shape: str
    color: str
    size: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """One picture and its caption; the objects are in the order of the caption's nouns."""

    objects: tuple[Object, ...]
    background: str
    caption: str
    category: str


def _captions(category: str) -> Iterator[Caption]:
    """Yield every caption of a category. Two objects always differ in what the caption says about them."""
    sizes, backgrounds = (None, *SIZES), (None, *BACKGROUNDS)
    if category == "single_object":
        for shape, color, size, place, ground in product(SHAPES, COLORS, sizes, (None, *PLACES), backgrounds):
            yield Caption(category, (Noun(shape, color, size),), place=place, background=ground)
    elif category == "colors":
        for color, ground in product(COLORS, backgrounds):
            yield Caption(category, (Noun(color=color),), background=ground)
    elif category == "counting":
        for count, shape, color, ground in product((2, 3, 4), SHAPES, COLORS, backgrounds):
            yield Caption(category, (Noun(shape, color),) * count, background=ground)
    elif category == "two_objects":
        for shapes, ground in product(permutations(SHAPES, 2), backgrounds):
            yield Caption(category, tuple(Noun(shape) for shape in shapes), background=ground)
    elif category == "color_attribution":
        for shapes, colors, ground in product(permutations(SHAPES, 2), permutations(COLORS, 2), backgrounds):
            yield Caption(category, tuple(map(Noun, shapes, colors)), background=ground)
    elif category == "position":
        kinds = permutations(product(SHAPES, COLORS), 2)
        for (one, two), size_one, size_two, relation, ground in product(kinds, sizes, sizes, RELATIONS, backgrounds):
            yield Caption(category, (Noun(*one, size_one), Noun(*two, size_two)), relation, background=ground)


@cache
def grammar() -> dict[str, dict[str, Caption]]:
    """Return every caption there is, by category and then by its text."""
    return {category: {caption.text(): caption for caption in _captions(category)} for category in CATEGORIES}


def parse(text: str) -> Caption:
    """Return what a caption states. Raises UserError if it is not a sentence of the grammar."""
    for captions in grammar().values():
        if text in captions:
            return captions[text]
    raise UserError(f"caption {text!r} is not in the shapes grammar; one is 'a red circle above a small blue square'")


@cache
def _texts(category: str, grounded: bool | None = None) -> tuple[str, ...]:
    """Return the captions of a category: all, or those that state the background, or those that do not."""
    captions = grammar()[category].items()
    return tuple(text for text, c in captions if grounded is None or grounded == (c.background is not None))


def evaluation_prompts(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Return `count` pairs (category, caption): categories in turn, every caption of one before any repeats."""
    rng = np.random.default_rng(seed)
    orders = {category: rng.permutation(_texts(category)).tolist() for category in CATEGORIES}
    rounds = ((category, k) for k in range(-(-count // len(CATEGORIES))) for category in CATEGORIES)
    return [(category, orders[category][k % len(orders[category])]) for category, k in rounds][:count]


def scene(split: str, index: int, seed: int = 0) -> Scene:
    """Return scene `index` of a split, a pure function of the arguments.

    No picture is in both splits, whatever the seeds: a hash of its content, rounded to 1/32, decides its split.
    Raises UserError on an unknown split.
    """
    if split not in SPLITS:
        raise UserError(f"split {split!r} is unknown, expected one of {', '.join(SPLITS)}")
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    while True:
        category = rng.choice(list(CATEGORIES), p=list(CATEGORIES.values()))
        texts = _texts(category, bool(rng.random() < GROUNDED))
        drawn = compose(grammar()[category][_pick(texts, rng)], rng)
        if _split(drawn) == split:
            return drawn


@cache
def fingerprint() -> str:
    """Return a digest of the first scenes, which changes with what is drawn and how."""
    digest = hashlib.blake2b(digest_size=8)
    for drawn in (scene("train", i) for i in range(64)):
        digest.update(drawn.caption.encode() + render(drawn, 16).tobytes())
    return digest.hexdigest()


def _split(drawn: Scene) -> str:
    """Return the split of a picture; the validation split gets 1 hash in 16."""
    cells = sorted((o.shape, o.color, round(32 * o.x), round(32 * o.y), round(32 * o.radius)) for o in drawn.objects)
    digest = hashlib.blake2b(repr((drawn.background, cells)).encode(), digest_size=1).digest()
    return "validation" if digest[0] % 16 == 0 else "train"


def compose(caption: Caption, rng: np.random.Generator) -> Scene:
    """Draw a scene in which the caption holds; what it leaves open is random."""
    company = len(caption.nouns) > 1
    # Four large objects would not fit, and sizes must not give away the count.
    sizes = ("small",) if caption.category == "counting" else tuple(SIZES)
    kinds = [
        (noun.shape or _pick(SHAPES, rng), noun.color or _pick(COLORS, rng), noun.size or _pick(sizes, rng))
        for noun in caption.nouns
    ]
    radii = np.array([SIZES[size][company] for _, _, size in kinds]) * rng.uniform(0.95, 1.05)
    if caption.category == "counting":
        centers = _scattered(radii, rng)
    elif company:
        centers = _paired(radii, RELATIONS[caption.relation or _pick(RELATIONS, rng)], rng)
    else:
        centers = _alone(radii[0], PLACES[caption.place or _pick(PLACES, rng)], rng)
    return Scene(
        tuple(Object(*kind, *map(float, (*center, r))) for kind, center, r in zip(kinds, centers, radii, strict=True)),
        caption.background or _pick(BACKGROUNDS, rng),
        caption.text(),
        caption.category,
    )


def size_word(radius: float, objects: int) -> str:
    """Return the size word for an object of this radius in a picture of so many `objects`."""
    return "small" if radius < SIZE_BOUNDARIES[objects > 1] else "large"


def _pick(options: Collection[str], rng: np.random.Generator) -> str:
    return tuple(options)[rng.integers(len(options))]


def _alone(radius: float, place: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Return the center (1, 2) of a single object."""
    low, high = _MARGIN + radius, 1 - _MARGIN - radius
    # At a side means near its edge, and clear of the center whatever the object's size.
    bands = {-1: (low, min(low + 0.05, 0.37)), 0: (0.48, 0.52), 1: (max(high - 0.05, 0.63), high)}
    return np.array([[rng.uniform(*bands[step]) for step in place]])


def _paired(radii: np.ndarray, direction: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Return the centers (2, 2) of two objects: the first in `direction` from the second, more along it than across."""
    axis = 0 if direction[0] else 1
    near, far = (0, 1) if direction[axis] < 0 else (1, 0)
    slack = 1 - 4 * _MARGIN - 2 * radii.sum()
    before, until = np.sort(rng.uniform(0, slack, 2))
    centers = rng.uniform(0.4, 0.6, (2, 2))
    centers[near, axis] = _MARGIN + radii[near] + before
    centers[far, axis] = 1 - _MARGIN - radii[far] - (slack - until)
    return centers


def _scattered(radii: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the centers (n, 2) of up to four objects, each in its own quarter of the picture."""
    quarters = rng.permutation([(0.25, 0.25), (0.25, 0.75), (0.75, 0.25), (0.75, 0.75)])[: len(radii)]
    reach = 0.25 - _MARGIN - radii[:, None]
    return quarters + reach * rng.uniform(-1, 1, quarters.shape)


def render(scene: Scene, resolution: int) -> np.ndarray:
    """Return the picture (resolution, resolution, 3) in uint8 RGB, with smooth edges."""
    side = resolution * _SUPERSAMPLING
    image = Image.new("RGB", (side, side), PALETTE[scene.background])
    draw = ImageDraw.Draw(image)
    for o in scene.objects:
        # Pillow's origin is the center of the first pixel, ours is its corner.
        outline = side * (o.radius * _OUTLINES[o.shape] + (o.x, o.y)) - 0.5
        draw.polygon(outline.ravel().tolist(), PALETTE[o.color])
    return np.array(image.reduce(_SUPERSAMPLING))
