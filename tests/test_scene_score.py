"""The judge of the shapes task accepts what is there, and nothing else."""

import numpy as np
import pytest

from lina_jax import scene_score, shapes
from lina_jax.errors import UserError

FALSEHOODS = {
    "a large red circle on the left, on white": [
        "a small red circle on the left, on white",
        "a large blue circle on the left, on white",
        "a large red square on the left, on white",
        "a large red circle on the right, on white",
        "a large red circle in the center, on white",
        "a large red circle on the left, on gray",
        "two red circles on white",
    ],
    "a cyan shape": ["a blue shape", "a green shape", "a circle and a square"],
    "three green crosses on black": [
        "two green crosses on black",
        "four green crosses on black",
        "three cyan crosses on black",
        "three green squares on black",
        "three green crosses on gray",
        "a green cross on black",
    ],
    "a triangle and a square": ["a triangle and a circle", "a circle and a square", "a triangle and a cross"],
    "a purple circle and a blue square": [
        "a blue circle and a purple square",
        "a purple circle and a blue cross",
        "a purple circle and a red square",
        "a purple circle",
    ],
    "a small yellow triangle above a large red cross": [
        "a small yellow triangle below a large red cross",
        "a small yellow triangle left of a large red cross",
        "a large red cross above a small yellow triangle",
        "a large yellow triangle above a small red cross",
        "a small red triangle above a large yellow cross",
        "a small yellow cross above a large red triangle",
    ],
    "a red square left of a blue square": [
        "a red square right of a blue square",
        "a red square above a blue square",
        "a blue square left of a red square",
    ],
}


def drawn(count: int, seed: int = 0) -> list[shapes.Scene]:
    rng = np.random.default_rng(seed)
    return [shapes.compose(shapes.parse(text), rng) for _, text in shapes.evaluation_prompts(count, seed)]


def rendered(scenes: list[shapes.Scene], resolution: int = 32) -> np.ndarray:
    return np.stack([shapes.render(s, resolution) for s in scenes])


def captions(scenes: list[shapes.Scene]) -> list[str]:
    return [s.caption for s in scenes]


@pytest.mark.parametrize("resolution", [32, 64])
def test_true_pictures_are_right_in_every_category(resolution):
    scenes = drawn(240)
    score = scene_score.score(rendered(scenes, resolution), captions(scenes))
    assert score["examples"] == dict.fromkeys(shapes.CATEGORIES, 40)
    assert min(score[category] for category in shapes.CATEGORIES) >= 0.99


def test_detection_recovers_the_scene():
    for s in drawn(24, seed=1):
        found = scene_score.detect(shapes.render(s, 64))
        assert found.background == s.background and len(found.objects) == len(s.objects)
        for o in s.objects:
            near = min(found.objects, key=lambda other: np.hypot(other.x - o.x, other.y - o.y))
            assert (near.shape, near.color, near.size) == (o.shape, o.color, o.size)
            # Half a pixel.
            np.testing.assert_allclose((near.x, near.y, near.radius), (o.x, o.y, o.radius), atol=0.5 / 64)


def test_noise_changes_little():
    scenes = drawn(180, seed=2)
    images = rendered(scenes)
    noise = np.random.default_rng(0).normal(0, 8, images.shape)
    noisy = np.clip(images + noise, 0, 255).round().astype(np.uint8)
    assert scene_score.score(noisy, captions(scenes))["overall"] >= 0.97


def test_blur_and_pale_colours_change_little():
    scenes = drawn(180, seed=3)
    images = rendered(scenes).astype(np.float32)
    for axis in (1, 2):  # the kernel (1, 2, 1) / 4: a standard deviation of 0.7 pixels
        images = (np.roll(images, 1, axis) + 2 * images + np.roll(images, -1, axis)) / 4
    pale = (images * 0.85 + 20).astype(np.uint8)
    assert scene_score.score(pale, captions(scenes))["overall"] >= 0.95


def test_a_picture_of_another_scene_is_right_only_by_chance():
    """For any caption, the verdict on a picture is the truth about its scene."""
    scenes = drawn(60, seed=4)
    found = [scene_score.detect(image) for image in rendered(scenes)]
    parsed = [shapes.parse(text) for text in captions(scenes)]
    verdicts = np.array([[scene_score.satisfies(shown, caption) for caption in parsed] for shown in found])
    truth = np.array([[scene_score.satisfies(s, caption) for caption in parsed] for s in scenes])
    others = ~np.eye(len(scenes), dtype=bool)
    assert verdicts[others].mean() < 0.02
    # A place or a relation right at its boundary may fall on either side.
    assert np.mean(verdicts == truth) > 0.999


@pytest.mark.parametrize("stated", FALSEHOODS)
def test_a_false_statement_is_refused(stated):
    rng = np.random.default_rng(6)
    for _ in range(5):
        shown = scene_score.detect(shapes.render(shapes.compose(shapes.parse(stated), rng), 32))
        assert scene_score.satisfies(shown, shapes.parse(stated))
        assert not [text for text in FALSEHOODS[stated] if scene_score.satisfies(shown, shapes.parse(text))]


def test_specks_are_ignored_and_no_shape_is_no_match():
    dot = shapes.Object("square", "blue", "small", 0.5, 0.1, 1.5 / 32)
    circle = shapes.Object("circle", "red", "large", 0.5, 0.6, 8 / 32)
    image = shapes.render(shapes.Scene((circle, dot), "white", "", ""), 32)
    assert scene_score.matches(image, "a red circle")
    image[18:22] = shapes.COLORS["red"]  # a bar across the whole picture spoils it
    assert not scene_score.matches(image, "a red circle")


@pytest.mark.parametrize("value", [0, 128, 255])
def test_an_empty_picture_shows_nothing(value):
    image = np.full((32, 32, 3), value, np.uint8)
    assert scene_score.detect(image).objects == ()


def test_pure_noise_is_scored_not_crashed_on():
    images = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3)).astype(np.uint8)
    assert scene_score.score(images, [text for _, text in shapes.evaluation_prompts(6)])["overall"] == 0


def test_the_overall_score_is_the_mean_over_categories():
    scenes = [s for s in drawn(24, seed=7) if s.category in ("colors", "counting")][:3]
    assert [s.category for s in scenes] == ["colors", "counting", "colors"]
    images = rendered(scenes)
    images[0] = 255
    assert scene_score.score(images, captions(scenes)) == {
        "overall": 0.75,
        "colors": 0.5,
        "counting": 1.0,
        "examples": {"colors": 2, "counting": 1},
    }


def test_bad_input_is_named():
    images = np.zeros((1, 32, 32, 3), np.uint8)
    with pytest.raises(UserError, match="a pink elephant"):
        scene_score.score(images, ["a pink elephant"])
    with pytest.raises(UserError, match=r"1 images.*2 captions"):
        scene_score.score(images, ["a red shape", "a blue shape"])
    with pytest.raises(ValueError, match="float32"):
        scene_score.detect(np.zeros((32, 32, 3), np.float32))
