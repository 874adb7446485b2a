"""The shapes task: captions and pictures agree, and the splits stay apart."""

from collections import Counter

import numpy as np
import pytest

from lina_jax import shapes
from lina_jax.errors import UserError

SENTENCES = [text for captions in shapes.grammar().values() for text in captions]


def pictures(category: str, count: int = 40) -> list[shapes.Scene]:
    rng = np.random.default_rng(0)
    captions = list(shapes.grammar()[category].values())
    return [shapes.compose(captions[i], rng) for i in rng.integers(len(captions), size=count)]


def test_every_sentence_is_short_lower_case_ascii_and_means_one_thing():
    assert max(len(text.encode("ascii")) for text in SENTENCES) <= 66
    assert all(text == text.lower() for text in SENTENCES)
    assert len(set(SENTENCES)) == len(SENTENCES)
    assert all(shapes.parse(text).text() == text for text in SENTENCES[::97])


@pytest.mark.parametrize(
    "text",
    [
        "a red circle",
        "a large red circle at the top, on black",
        "a green shape",
        "three blue crosses on white",
        "a circle and a square",
        "a red circle and a blue square",
        "a large red circle above a small blue square",
    ],
)
def test_the_grammar_has_the_sentences_we_advertise(text):
    assert text in SENTENCES


def test_an_unknown_caption_or_split_is_named():
    with pytest.raises(UserError, match="a pink elephant"):
        shapes.parse("a pink elephant")
    with pytest.raises(UserError, match="'test'"):
        shapes.scene("test", 0)


def test_a_scene_is_a_pure_function_of_split_index_and_seed():
    assert shapes.scene("train", 5) == shapes.scene("train", 5)
    others = [shapes.scene("train", 6), shapes.scene("train", 5, seed=1), shapes.scene("validation", 5)]
    assert shapes.scene("train", 5) not in others


def test_the_splits_share_no_picture():
    """Not even if single objects are rounded to 1/32; chance alone would repeat some of those."""
    seen = {"train": set(), "validation": set()}
    for split, count in (("train", 4000), ("validation", 250)):
        for s in (shapes.scene(split, i) for i in range(count)):
            if len(s.objects) == 1:
                (o,) = s.objects
                seen[split].add((s.background, o.shape, o.color, *(round(32 * v) for v in (o.x, o.y, o.radius))))
    assert len(seen["train"]) > 1000 and len(seen["validation"]) > 50
    assert not seen["train"] & seen["validation"]


def test_training_draws_every_category_by_its_weight():
    drawn = Counter(shapes.scene("train", i).category for i in range(1000))
    for category, weight in shapes.CATEGORIES.items():
        assert abs(drawn[category] / 1000 - weight) < 4 * np.sqrt(weight * (1 - weight) / 1000)  # 4 standard errors


@pytest.mark.parametrize("category", shapes.CATEGORIES)
def test_objects_keep_apart_and_inside(category):
    for s in pictures(category):
        for i, a in enumerate(s.objects):
            assert a.radius <= min(a.x, a.y, 1 - a.x, 1 - a.y)
            for b in s.objects[:i]:
                assert max(abs(a.x - b.x), abs(a.y - b.y)) > a.radius + b.radius


@pytest.mark.parametrize("category", shapes.CATEGORIES)
def test_what_the_caption_states_is_drawn(category):
    for s in pictures(category):
        caption = shapes.parse(s.caption)
        assert (s.category, len(s.objects)) == (category, len(caption.nouns))
        assert caption.background in (None, s.background)
        for noun, o in zip(caption.nouns, s.objects, strict=True):
            assert noun.shape in (None, o.shape)
            assert noun.color in (None, o.color)
            assert noun.size in (None, o.size)
            assert o.size == shapes.size_word(o.radius, len(s.objects))


@pytest.mark.parametrize("resolution", [17, 32, 128])
def test_render_paints_the_palette_with_soft_edges(resolution):
    circle = shapes.Object("circle", "red", "large", 0.4, 0.5, 0.25)
    image = shapes.render(shapes.Scene((circle,), "white", "", ""), resolution)
    assert image.shape == (resolution, resolution, 3) and image.dtype == np.uint8
    assert tuple(image[0, 0]) == shapes.BACKGROUNDS["white"]
    assert tuple(image[int(0.5 * resolution), int(0.4 * resolution)]) == shapes.COLORS["red"]
    # Area and position are right at any resolution, to a quarter of a pixel (the supersampling) along the outline.
    redness = (255 - image[..., 1].astype(float)) / (255 - shapes.COLORS["red"][1])
    middles = (np.arange(resolution) + 0.5) / resolution
    assert abs(redness.mean() - np.pi * 0.25**2) < 2 * np.pi * 0.25 * 0.25 / resolution
    assert abs(redness.sum(0) @ middles / redness.sum() - 0.4) < 0.25 / resolution


def test_evaluation_prompts_are_balanced_distinct_and_repeatable():
    prompts = shapes.evaluation_prompts(60)
    assert prompts == shapes.evaluation_prompts(60) != shapes.evaluation_prompts(60, seed=1)
    assert all(caption in shapes.grammar()[category] for category, caption in prompts)
    assert Counter(category for category, _ in prompts) == dict.fromkeys(shapes.CATEGORIES, 10)
    for category, captions in shapes.grammar().items():
        assert len({text for own, text in prompts if own == category}) == min(10, len(captions))
