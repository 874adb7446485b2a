"""The record at a position is a function of (seed, position); components have the requested counts."""

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from lina_jax import order
from lina_jax.errors import UserError
from lina_jax.order import WINDOW

WEIGHTS = (Fraction("0.7"), Fraction("0.2"), Fraction("0.1"))
LENGTHS = (1000, 770, 310)


@pytest.fixture(scope="module")
def mixture():
    return order.make(LENGTHS, WEIGHTS, seed=5)


def test_every_window_has_the_exact_counts(mixture):
    total = Counter()
    for window in range(20):
        counts = Counter(mixture[window * WINDOW + i][0] for i in range(WINDOW))
        total += counts
        for component, weight in enumerate(WEIGHTS):
            assert abs(counts[component] - weight * WINDOW) < 2
            assert abs(total[component] - weight * WINDOW * (window + 1)) < 1


def test_each_epoch_of_a_component_has_every_record_once(mixture):
    for component, length in enumerate(LENGTHS):
        drawn = [record for at, record in (mixture[i] for i in range(8 * WINDOW)) if at == component]
        epochs, rest = divmod(len(drawn), length)
        assert epochs
        counts = Counter(Counter(drawn).values())
        # After whole windows: each record once per complete epoch, and `rest` records of the current epoch.
        assert counts == Counter({epochs + 1: rest, epochs: length - rest})


def test_components_are_shuffled_within_a_window(mixture):
    first = [mixture[i][0] for i in range(WINDOW)]
    assert first != [mixture[WINDOW + i][0] for i in range(WINDOW)]
    for part in np.split(np.array(first), 4):
        assert set(part) == {0, 1, 2}


def test_hosts_see_every_component(mixture):
    """Each of four hosts reads a block of 8 of a global batch of 32."""
    for host in range(4):
        block = [mixture[step * 32 + host * 8 + i][0] for step in range(32) for i in range(8)]
        assert set(block) == {0, 1, 2}


def test_the_seed_changes_the_order(mixture):
    other = order.make(LENGTHS, WEIGHTS, seed=6)
    assert [mixture[i] for i in range(100)] != [other[i] for i in range(100)]
    assert [mixture[i] for i in range(100)] == [order.make(LENGTHS, WEIGHTS, seed=5)[i] for i in range(100)]


def test_weights_may_have_any_sum(mixture):
    assert order.make(LENGTHS, (7, 2, 1), seed=5) == mixture


def test_one_dataset_is_shuffled_by_epoch():
    single = order.make([20], [Fraction(1)], seed=5)
    epochs = [[single[epoch * 20 + i][1] for i in range(20)] for epoch in range(4)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(20))] * 4
    assert len(set(map(tuple, epochs))) == 4


def test_seeds_next_to_each_other_share_no_order():
    """As in a study with seeds 0, 1, 2."""
    orders = [
        tuple(order.make([20], [Fraction(1)], seed)[epoch * 20 + i][1] for i in range(20))
        for seed in range(4)
        for epoch in range(4)
    ]
    assert len(set(orders)) == len(orders)


def test_equal_components_have_orders_of_their_own():
    """A window has 512 of the 1000 records of each; in a shared order they would be the same ones."""
    both = order.make([1000, 1000], [Fraction(1), Fraction(1)], seed=5)
    shown = [set(), set()]
    for position in range(WINDOW):
        component, record = both[position]
        shown[component].add(record)
    assert [len(records) for records in shown] == [512, 512]
    assert len(shown[0] & shown[1]) < 350  # 262 are expected by chance, with a standard deviation of 8


def test_ten_million_records_and_late_positions():
    large = order.make([10**7, 10**6], [Fraction(9), Fraction(1)], seed=5)
    component, record = large[10**12]
    assert 0 <= record < large.lengths[component]


def test_a_weight_too_small_for_a_window_is_refused():
    with pytest.raises(
        UserError, match=r"data.path: one dataset has 0.0002 of the sum of weights: each needs at least 1/1024"
    ):
        order.make([10, 10], [Fraction(5000), Fraction(1)], seed=0)
    with pytest.raises(UserError, match="one dataset has 0 of"):
        order.make([10, 10], [Fraction(10**400), Fraction(1)], seed=0)


def test_apportioned_counts_add_up():
    assert order.apportion(order.integers(WEIGHTS), 1024) == [717, 205, 102]
    assert order.apportion([1, 1, 1], 4) == [2, 1, 1]


def test_uniform_numbers_follow_from_seed_position_and_stream():
    drawn = order.uniforms(3, range(10_000), 0)
    np.testing.assert_array_equal(order.uniforms(3, range(5000, 5010), 0), drawn[5000:5010])
    assert drawn.min() >= 0 and drawn.max() < 1
    counts = np.histogram(drawn, 10, (0, 1))[0]
    assert abs(counts - 1000).max() < 150  # five standard deviations
    for other in (order.uniforms(4, range(10_000), 0), order.uniforms(3, range(10_000), 1)):
        assert abs(np.corrcoef(drawn, other)[0, 1]) < 0.05
