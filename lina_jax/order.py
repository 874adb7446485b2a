"""The order of records: a pure function of (seed, position), for one dataset or a weighted mixture.

Positions number the examples of all global batches: batch b of size B has positions b B to b B + B - 1. Nothing is
stored per record, so ten million records cost no more than ten.
"""

import bisect
import dataclasses
import functools
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from grain.experimental import index_shuffle

from lina_jax.errors import UserError

WINDOW = 1024  # positions over which a mixture has exact counts
SHORT_CAPTIONS, FLIPS, _WINDOWS = range(3)  # streams of random numbers


@dataclasses.dataclass(frozen=True)
class Order:
    """Maps positions to (component, record).

    Every window of WINDOW positions holds the components in proportion to their weights, shuffled. Fractions carry over
    from window to window, so that the counts of the first n windows are within one of their share of n WINDOW. Every
    epoch of a component visits each of its records once, in its own order.
    """

    lengths: tuple[int, ...]
    weights: tuple[int, ...]
    seed: int

    def __getitem__(self, position: int) -> tuple[int, int]:
        component, ordinal = self._ordinal(position) if len(self.lengths) > 1 else (0, position)
        length = self.lengths[component]
        epoch, index = divmod(ordinal, length)
        return component, index_shuffle(index, length - 1, _permutation(self.seed, component, epoch), 4)

    def _ordinal(self, position: int) -> tuple[int, int]:
        """(component, number of the record within it, counted over all epochs)."""
        window, slot = divmod(position, WINDOW)
        before, starts, shuffled = _window(self.weights, self.seed, window)
        slot = shuffled[slot]
        component = bisect.bisect_right(starts, slot) - 1
        return component, before[component] + slot - starts[component]


def make(lengths: Sequence[int], weights: Sequence[Fraction], seed: int) -> Order:
    """Order of a mixture. Raises UserError as `integers` does."""
    return Order(tuple(lengths), integers(weights), seed)


def integers(weights: Sequence[Fraction]) -> tuple[int, ...]:
    """The smallest integers in the proportion of the weights, which may have any sum.

    Raises UserError if a weight is too small for its dataset to appear in every window.
    """
    if min(weights) * WINDOW < sum(weights):
        share = float(min(weights) / sum(weights))
        raise UserError(f"data.path: one dataset has {share:.2g} of the sum of weights: each needs at least 1/{WINDOW}")
    scale = math.lcm(*(Fraction(weight).denominator for weight in weights))
    scaled = [int(weight * scale) for weight in weights]
    return tuple(weight // math.gcd(*scaled) for weight in scaled)


def apportion(weights: Sequence[int], count: int) -> list[int]:
    """Split `count` by weight: integers, each within one of its share (largest remainders; ties go to the first)."""
    shares = [divmod(weight * count, sum(weights)) for weight in weights]
    whole = [share for share, _ in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: -shares[i][1])
    for i in by_remainder[: count - sum(whole)]:
        whole[i] += 1
    return whole


@functools.lru_cache(maxsize=64)
def _permutation(seed: int, component: int, epoch: int) -> int:
    """Key of one epoch's order, hashed so that epoch e + 1 of one seed is not epoch e of the next seed."""
    return int(np.random.SeedSequence((seed, component, epoch)).generate_state(1)[0])


@functools.lru_cache(maxsize=64)
def _window(weights: tuple[int, ...], seed: int, window: int) -> tuple[list[int], list[int], list[int]]:
    """(records of each component before this window, first slot of each in it, the shuffled slots)."""
    before = apportion(weights, window * WINDOW)
    after = apportion(weights, (window + 1) * WINDOW)
    starts = np.cumsum([0, *(b - a for a, b in zip(before, after, strict=True))])[:-1]
    # Not index_shuffle, which takes ten times longer per number in a range of a thousand than of a million.
    shuffled = np.argsort(uniforms(seed, range(window * WINDOW, (window + 1) * WINDOW), _WINDOWS), kind="stable")
    return before, starts.tolist(), shuffled.tolist()


def uniforms(seed: int, positions: Sequence[int], stream: int) -> np.ndarray:
    """(N,) float64 in [0, 1), functions of (seed, position, stream): SplitMix64 (Steele et al. 2014), applied twice."""

    def mixed(x: np.ndarray) -> np.ndarray:
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))

    key = mixed(np.array([(seed << 8) + stream], np.uint64))
    return (mixed(mixed(np.asarray(positions, np.uint64)) ^ key) >> np.uint64(11)) * 2.0**-53
