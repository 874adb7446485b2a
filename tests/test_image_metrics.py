"""Metrics of features have known values: for Gaussians, for small sets worked out by hand, compared with scipy."""

import math

import numpy as np
import pytest

from lina_jax import image_metrics
from lina_jax.errors import UserError
from lina_jax.image_metrics import Frechet, Gaussian, InceptionScore, RunningCovariance


def gaussian(mean, covariance):
    return Gaussian(np.asarray(mean, np.float64), np.asarray(covariance, np.float64))


def random_gaussian(dim, rank, seed):
    rng = np.random.default_rng(seed)
    factor = rng.standard_normal((dim, rank)) / math.sqrt(rank)
    return gaussian(rng.standard_normal(dim), factor @ factor.T)


def test_distance_of_a_gaussian_to_itself_is_zero():
    for rank in (3, 40):
        one = random_gaussian(40, rank, 0)
        assert abs(Frechet(one)(one)) < 1e-10


def test_distance_of_gaussians_that_commute_is_known():
    """|m - m'|^2 + sum of (sqrt(a) - sqrt(b))^2."""
    distance = Frechet(gaussian([0, 0, 0], np.diag([4.0, 1.0, 0.0])))
    assert distance(gaussian([1, 0, 2], np.diag([1.0, 9.0, 0.25]))) == pytest.approx(5 + 1 + 4 + 0.25, rel=1e-12)


def test_distance_is_symmetric_and_does_not_depend_on_the_axes():
    one, two = random_gaussian(20, 20, 1), random_gaussian(20, 30, 2)
    there = Frechet(one)(two)
    assert Frechet(two)(one) == pytest.approx(there, rel=1e-10)
    turn = np.linalg.qr(np.random.default_rng(3).standard_normal((20, 20)))[0]
    turned = [gaussian(turn @ g.mean, turn @ g.covariance @ turn.T) for g in (one, two)]
    assert Frechet(turned[0])(turned[1]) == pytest.approx(there, rel=1e-10)


@pytest.mark.parametrize("ranks", [(60, 80), (10, 80), (10, 12)])
def test_distance_is_that_of_scipy_also_where_covariances_are_singular(ranks):
    """Where the root of the product fails, ADM's offset of 1e-6 is added: with 60 features that is exact to 1e-3."""
    linalg = pytest.importorskip("scipy.linalg")
    one, two = (random_gaussian(60, rank, seed) for seed, rank in enumerate(ranks))
    offset = 0 if min(ranks) >= 60 else 1e-6 * np.eye(60)
    root = linalg.sqrtm((one.covariance + offset) @ (two.covariance + offset)).real
    step = one.mean - two.mean
    want = step @ step + np.trace(one.covariance + two.covariance - 2 * root)
    assert Frechet(one)(two) == pytest.approx(want, rel=1e-9 if min(ranks) >= 60 else 1e-3)


def test_streaming_moments_are_those_of_all_rows():
    """Added in parts, far from zero, where variances from sums of squares in float64 would be off by 2e-3."""
    rows = np.random.default_rng(0).standard_normal((1000, 5)) + 1e6
    moments = RunningCovariance(5)
    for part in np.split(rows, [1, 10, 11, 700]):
        moments.add(part)
    got = moments.gaussian()
    np.testing.assert_allclose(got.mean, rows.mean(axis=0), rtol=1e-14)
    np.testing.assert_allclose(got.covariance, np.cov(rows, rowvar=False), rtol=1e-9, atol=1e-9)


def test_rows_that_are_left_out_are_as_if_they_had_not_come():
    rows = np.random.default_rng(0).standard_normal((1000, 5)) + 1e6
    moments, part = RunningCovariance(5), RunningCovariance(5)
    moments.add(rows)
    part.add(rows[100:250])
    kept = np.delete(rows, slice(100, 250), axis=0)
    got = moments.without(part).gaussian()
    np.testing.assert_allclose(got.mean, kept.mean(axis=0), rtol=1e-14)
    np.testing.assert_allclose(got.covariance, np.cov(kept, rowvar=False), rtol=1e-9, atol=1e-9)


def test_the_standard_error_is_the_spread_of_repetitions():
    """Jackknife over ten groups, against the spread of 200 repetitions; one alone is off by a quarter, 1/sqrt(18)."""
    rng, reference = np.random.default_rng(0), Frechet(gaussian(np.zeros(3), np.eye(3)))

    def measured():
        groups = [RunningCovariance(3) for _ in range(10)]
        for group in groups:
            group.add(rng.normal([0.5, 0, 0], 1, (40, 3)))
        return image_metrics.jackknife(groups, reference)

    values, errors = zip(*(measured() for _ in range(200)), strict=True)
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(np.std(values), rel=0.15)


def test_too_few_rows_are_told():
    with pytest.raises(UserError, match="1 images have no covariance"):
        one = RunningCovariance(2)
        one.add(np.ones((1, 2)))
        one.gaussian()


def test_inception_score_of_certain_and_balanced_classes_is_their_number():
    logits = 1e3 * np.eye(7)[np.arange(70) % 7]
    score = InceptionScore()
    score.add(logits[:30])
    score.add(logits[30:])
    assert score.value().value == pytest.approx(7, rel=1e-9)


def test_inception_score_of_images_that_are_alike_is_one():
    score = InceptionScore()
    score.add(np.tile(np.random.default_rng(0).standard_normal(9), (50, 1)))
    assert score.value().value == pytest.approx(1, rel=1e-12)


def test_inception_score_is_the_mean_of_splits(monkeypatch):
    monkeypatch.setattr(image_metrics, "SPLIT", 20)
    logits = 3 * np.random.default_rng(0).standard_normal((50, 6))
    score = InceptionScore()
    for part in np.split(logits, [7, 33]):
        score.add(part)
    wanted = []
    for rows in (logits[:20], logits[20:40], logits[40:]):
        p = np.exp(rows) / np.exp(rows).sum(axis=1, keepdims=True)
        wanted.append(np.exp(np.mean(np.sum(p * (np.log(p) - np.log(p.mean(axis=0))), axis=1))))
    got = score.value()
    assert got.value == pytest.approx(np.mean(wanted), rel=1e-12)
    assert got.standard_error == pytest.approx(np.std(wanted, ddof=1) / math.sqrt(3), rel=1e-9)


def brute_force(reference, samples):
    def within(points, centres):
        among = np.linalg.norm(centres[:, None] - centres[None], axis=-1)
        radii = np.sort(among, axis=1)[:, 3]
        return np.mean(np.any(np.linalg.norm(points[:, None] - centres[None], axis=-1) <= radii, axis=1))

    return within(samples, reference), within(reference, samples)


def test_precision_and_recall_are_those_of_the_definition(monkeypatch):
    monkeypatch.setattr(image_metrics, "_BLOCK", 16)
    rng = np.random.default_rng(0)
    reference, samples = rng.standard_normal((50, 3)), 0.6 * rng.standard_normal((37, 3)) + 0.5
    precision, recall = image_metrics.precision_recall(reference, samples)
    assert (precision.value, recall.value) == brute_force(reference, samples)
    assert 0 < recall.value < precision.value < 1
    assert precision.standard_error == pytest.approx(math.sqrt(precision.value * (1 - precision.value) / 37))


def test_samples_of_one_mode_are_precise_and_recall_half():
    line = np.stack([np.linspace(0, 1, 50), np.zeros(50)], axis=1)
    reference = np.concatenate([line, line + 100])
    precision, recall = image_metrics.precision_recall(reference, np.add(line, [0, 1e-3]))
    assert (precision.value, recall.value) == (1.0, 0.5)
