"""The text encoder of runs without a pretrained one: bytes to features of words."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lina_jax.decode import encode_text
from lina_jax.models.embeddings import ByteEncoder


@pytest.fixture(scope="module")
def encode():
    """Sentences -> (features of their words, numbers of words)."""

    def encode(*sentences: str, words: int = 6, layers: int = 2) -> tuple[np.ndarray, np.ndarray]:
        encoder = ByteEncoder(words, 8, layers, rngs=nnx.Rngs(0), dtype=jnp.float32)
        features, count = encoder(*map(jnp.asarray, encode_text(sentences, 40)))
        return np.asarray(features), np.asarray(count)

    return encode


def test_every_word_is_one_feature(encode):
    features, count = encode("a red circle", "", "one")
    assert count.tolist() == [3, 0, 1]
    assert features.shape == (3, 6, 8)
    assert [np.any(f != 0, axis=-1).tolist() for f in features] == [
        [True] * 3 + [False] * 3,
        [False] * 6,
        [True] + [False] * 5,
    ]


def test_the_order_of_words_and_of_letters_matters(encode):
    (one, other, anagram), _ = encode("red above blue", "blue above red", "der above blue")
    assert np.abs(np.sort(one, axis=0) - np.sort(other, axis=0)).max() > 0.1
    assert np.abs(one - anagram).max() > 0.1


def test_without_convolutions_words_differ_by_their_place_alone(encode):
    (one, other), _ = encode("red blue", "blue red", layers=0)
    # Moving a word adds the same difference of positions to each.
    np.testing.assert_allclose(other[1] - one[0], one[1] - other[0], atol=1e-6)


def test_blanks_add_no_words(encode):
    features, count = encode("red blue", "  red   blue ")
    assert count.tolist() == [2, 2]
    np.testing.assert_array_equal(features[0], features[1])


def test_words_past_the_last_are_heard_in_it(encode):
    features, count = encode("one two three", "one two four", words=2)
    assert count.tolist() == [2, 2]
    assert np.abs(features[0, 1] - features[1, 1]).max() > 0.1


def test_the_order_of_letters_survives_in_long_words(encode):
    (one, other), count = encode("a" * 17 + "bc", "a" * 17 + "cb")
    assert count.tolist() == [2, 2]
    assert np.abs(one - other).max() > 0.1
