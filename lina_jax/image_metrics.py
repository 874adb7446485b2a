"""FID, sFID, Inception score, precision and recall from features, by the definitions of ADM's evaluation suite.

Features arrive in chunks, in the order of the images. The distances need only their moments, accumulated in float64
(Chan et al. 1979): two matrices per group of images, instead of the features of all images, which only precision and
recall need. The groups give the standard errors of the distances, by the jackknife.
"""

import copy
import dataclasses
import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lina_jax.errors import UserError

GROUPS = 10  # consecutive parts of the samples, each left out once for the standard error of a distance
SPLIT = 5_000  # images per Inception score; the mean of the scores is reported
NEIGHBOURS = 3  # each ball of a manifold reaches to the neighbour of this rank
_BLOCK = 2_000  # rows and columns of distances computed at once


class Value(NamedTuple):
    """A metric and its standard error, which is None if there are too few images."""

    value: float
    standard_error: float | None


@dataclasses.dataclass(frozen=True)
class Gaussian:
    mean: np.ndarray  # (D,) float64
    covariance: np.ndarray  # (D, D) float64, divided by N - 1


class RunningCovariance:
    """Count, mean and scatter matrix of rows that arrive in chunks, in float64."""

    def __init__(self, dim: int):
        self.count, self.mean, self.scatter = 0, np.zeros(dim), np.zeros((dim, dim))

    def add(self, rows: np.ndarray) -> None:
        """rows (n, D), n > 0."""
        rows = rows.astype(np.float64)
        mean = rows.mean(axis=0)
        centred = rows - mean
        self._join(len(rows), mean, centred.T @ centred)

    def merge(self, other: "RunningCovariance") -> None:
        if other.count:
            self._join(other.count, other.mean, other.scatter)

    def without(self, part: "RunningCovariance") -> "RunningCovariance":
        """The same of all rows but those of `part`, which are some of them and not all."""
        rest = copy.copy(self)
        rest.count = self.count - part.count
        rest.mean = self.mean + (self.mean - part.mean) * (part.count / rest.count)
        step = part.mean - rest.mean
        rest.scatter = self.scatter - part.scatter
        rest.scatter -= np.outer(step * (rest.count * part.count / self.count), step)
        return rest

    def _join(self, count: int, mean: np.ndarray, scatter: np.ndarray) -> None:
        total = self.count + count
        step = mean - self.mean
        self.scatter += scatter
        self.scatter += np.outer(step * (self.count * count / total), step)
        self.mean = self.mean + step * (count / total)
        self.count = total

    def gaussian(self) -> Gaussian:
        """Raises UserError for fewer than two rows."""
        if self.count < 2:
            raise UserError(f"{self.count} images have no covariance: at least 2 are needed")
        return Gaussian(self.mean, self.scatter / (self.count - 1))


class Frechet:
    """The Fréchet distance to a reference: |m - m'|^2 + tr(C + C' - 2 sqrt(C C')).

    The trace of the root is the sum of the roots of the eigenvalues of F^T C F, where C' = F F^T is the reference's
    covariance. F^T C F is symmetric, so they are real, whatever the rank. Those at rounding level count as zero.
    """

    def __init__(self, reference: Gaussian):
        self._mean, self._trace = reference.mean, float(np.trace(reference.covariance))
        values, vectors = np.linalg.eigh(reference.covariance)
        values = _without_rounding(values)
        self._factor = vectors[:, values > 0] * np.sqrt(values[values > 0])

    def __call__(self, samples: Gaussian) -> float:
        """Raises UserError if the reference has another number of features."""
        if samples.mean.shape != self._mean.shape:
            raise UserError(f"the reference has {len(self._mean)} features, expected {len(samples.mean)}")
        inner = self._factor.T @ samples.covariance @ self._factor
        values = _without_rounding(np.linalg.eigvalsh((inner + inner.T) / 2))
        step = samples.mean - self._mean
        return float(step @ step + np.trace(samples.covariance) + self._trace - 2 * np.sqrt(values).sum())


def _without_rounding(values: np.ndarray) -> np.ndarray:
    """Eigenvalues of a positive semidefinite matrix, with those at rounding level set to zero."""
    if not len(values):
        return values
    return np.where(values > len(values) * np.finfo(np.float64).eps * values.max(), values, 0.0)


def jackknife(groups: list[RunningCovariance], distance: Frechet) -> Value:
    """The distance of all rows, and its standard error from the distances that leave out one group each."""
    moments = RunningCovariance(len(groups[0].mean))
    for group in groups:
        moments.merge(group)
    whole = distance(moments.gaussian())
    if min(group.count for group in groups) < 2:
        return Value(whole, None)
    without = np.array([distance(moments.without(group).gaussian()) for group in groups])
    spread = np.sum(np.square(without - without.mean()))
    return Value(whole, float(np.sqrt(spread * (len(groups) - 1) / len(groups))))


class InceptionScore:
    """exp(mean KL divergence of p(class | image) from its mean) per split of 5,000 images, averaged over the splits."""

    def __init__(self):
        self._splits: list[tuple[int, float, np.ndarray]] = []  # images, sum of p log p, sum of p

    def add(self, logits: np.ndarray) -> None:
        """logits (n, classes)."""
        while len(logits):
            if not self._splits or self._splits[-1][0] == SPLIT:
                self._splits.append((0, 0.0, np.zeros(logits.shape[1])))
            count, entropy, sums = self._splits[-1]
            rows, logits = logits[: SPLIT - count], logits[SPLIT - count :]
            log_p = rows.astype(np.float64)
            log_p -= log_p.max(axis=1, keepdims=True)
            log_p -= np.log(np.exp(log_p).sum(axis=1, keepdims=True))
            p = np.exp(log_p)
            self._splits[-1] = count + len(rows), entropy + float((p * log_p).sum()), sums + p.sum(axis=0)

    def value(self) -> Value:
        scores = []
        for count, entropy, sums in self._splits:
            mean = sums / count
            known = mean > 0  # classes that no image has add nothing
            scores.append(math.exp(entropy / count - float((mean[known] * np.log(mean[known])).sum())))
        error = float(np.std(scores, ddof=1) / math.sqrt(len(scores))) if len(scores) > 1 else None
        return Value(float(np.mean(scores)), error)


def precision_recall(reference: np.ndarray, samples: np.ndarray) -> tuple[Value, Value]:
    """Share of the samples in the reference's manifold, and of the reference in the samples' manifold.

    reference (M, D), samples (N, D). A manifold is the union of balls around its points, each with the distance to its
    third neighbour as radius (Kynkäänniemi et al. 2019). Distances are float32 (ADM's suite: float16). Raises UserError
    if there are too few points.
    """
    few = min(len(reference), len(samples))
    if few <= NEIGHBOURS:
        raise UserError(f"precision and recall of {few} images: more than {NEIGHBOURS} are needed")
    balls, sample_balls = _radii(reference), _radii(samples)
    inside, covered = np.zeros(len(samples), bool), np.zeros(len(reference), bool)
    for rows, columns in _blocks(len(reference), len(samples)):
        distances = _distances(reference[rows], samples[columns])
        covered[rows] |= np.asarray(jnp.any(distances <= sample_balls[None, columns], axis=1))
        inside[columns] |= np.asarray(jnp.any(distances <= balls[rows, None], axis=0))
    return _share(inside), _share(covered)


def _share(hits: np.ndarray) -> Value:
    share = float(np.mean(hits))
    return Value(share, math.sqrt(share * (1 - share) / len(hits)))


def _radii(points: np.ndarray) -> np.ndarray:
    """Squared distance (N,) from each point to its third neighbour."""
    nearest = np.full((len(points), NEIGHBOURS + 1), np.inf, np.float32)  # the first of them is the point itself
    for rows, columns in _blocks(len(points), len(points)):
        distances = _distances(points[rows], points[columns])
        found = -jax.lax.top_k(-distances, min(NEIGHBOURS + 1, distances.shape[1]))[0]
        nearest[rows] = np.sort(np.concatenate([nearest[rows], found], axis=1))[:, : NEIGHBOURS + 1]
    return nearest[:, -1]


def _blocks(rows: int, columns: int) -> Iterator[tuple[slice, slice]]:
    for row in range(0, rows, _BLOCK):
        for column in range(0, columns, _BLOCK):
            yield slice(row, min(row + _BLOCK, rows)), slice(column, min(column + _BLOCK, columns))


@jax.jit
def _distances(a: jax.Array, b: jax.Array) -> jax.Array:
    """Squared distances (N, M) of rows a (N, D) and b (M, D)."""
    a, b = jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)
    products = jnp.einsum("nd,md->nm", a, b, precision=jax.lax.Precision.HIGHEST)
    return jnp.maximum(jnp.sum(a * a, axis=1)[:, None] - 2 * products + jnp.sum(b * b, axis=1)[None], 0)
