"""Searches: what is tried on a topology, and in which order; nothing is compiled."""

import dataclasses

import jax
import pytest

from lina_jax import search, topology
from lina_jax.chips import CHIPS
from lina_jax.config_fields import flatten
from lina_jax.errors import UserError


def test_a_search_tries_what_fits_by_estimate_and_leaves_a_fixed_batch_alone(tiny):
    where = topology.Topology("v5e", CHIPS["v5e"], (2, 4))
    candidates = search.ranked(tiny(batch_size=16), where, jax.devices(), fixed_batch=True)
    assert {candidate.batch_size for candidate in candidates} == {16}
    assert {candidate.remat for candidate in candidates} == {"none", "dots", "full"}
    small = topology.Topology("v5e", dataclasses.replace(CHIPS["v5e"], memory=1e3), (2, 4))
    assert search.ranked(tiny(batch_size=16), small, jax.devices(), fixed_batch=True) == []


@pytest.mark.parametrize("name", ["v5e", "h200"])
def test_a_search_cuts_images_as_far_as_their_rows_and_tokens_allow(name, tiny):
    where = topology.Topology(name, CHIPS[name], (1, 8))
    for condition_grid, parts in (((2, 2), {1, 2, 4}), ((1, 2), {1, 2})):
        config = tiny(batch_size=8, model={"condition_grid": condition_grid, "heads": 1})
        candidates = search.ranked(config, where, jax.devices(), fixed_batch=True)
        assert {candidate.sequence for candidate in candidates} == parts


def test_a_search_tries_batches_of_less_than_an_image_a_chip_where_images_are_cut(tiny):
    where = topology.Topology("v5e", CHIPS["v5e"], (2, 4))
    found = search.ranked(tiny(batch_size=8, model={"heads": 1}), where, jax.devices(), fixed_batch=False)
    whole = {8 * 2**n for n in range(7)}
    for sequence, least in ((1, set()), (2, {4}), (4, {2, 4})):
        sizes = {each.batch_size for each in found if (each.sequence, each.tensor) == (sequence, 1)}
        assert sizes == whole | least


def test_a_search_makes_a_replica_of_a_slice_but_leaves_those_that_are_set(tiny):
    where = topology.Topology("v5e", CHIPS["v5e"], (2, 2), slices=2)
    for given, made in ((1, 2), (-1, 2), (4, 4)):
        candidates = search.ranked(
            tiny(model={"heads": 1}, mesh={"replica": given, "data": 1}), where, jax.devices(), fixed_batch=True
        )
        assert {candidate.replica for candidate in candidates} == {made}


def test_a_search_for_which_the_mesh_allows_nothing_says_why(tiny):
    where = topology.Topology("v5e", CHIPS["v5e"], (2, 4))
    with pytest.raises(UserError, match=r"^--search: no mesh is possible: mesh: replica=3 x data=-1 .* 8 devices"):
        search.ranked(tiny(mesh={"replica": 3}), where, jax.devices(), fixed_batch=True)


def test_a_chip_of_two_devices_shares_its_images_between_them(tiny):
    """Memory and time of a batch on the same devices do not depend on how many chips they belong to."""
    config = tiny(batch_size=16, model={"heads": 1})

    def found(shape, memory):
        where = topology.Topology("tpu7x", dataclasses.replace(CHIPS["tpu7x"], memory=memory), shape)
        return search.ranked(config, where, jax.devices(), fixed_batch=True)

    tight = 1e6
    assert 0 < len(found((2, 2, 1), tight)) < len(found((2, 2, 1), 1e12))
    assert found((2, 2, 1), tight) == found((2, 2, 2), tight)


@pytest.mark.parametrize("refused", [1, 2])
def test_what_the_compiler_refuses_does_not_end_a_search(refused, tiny):
    """Unless it refuses every candidate."""
    where, reports = topology.Topology("v5e", CHIPS["v5e"], (2, 4)), iter(range(2))

    def plan(config):
        if next(reports) >= 2 - refused:
            raise UserError("more memory on chip than there is")
        return {"fits": True, "memory_bytes": {"total": 1}, "predicted_mfu": 0.5, "images_per_s": 1.0}

    def found():
        return search.search(tiny(batch_size=16), where, jax.devices(), plan, compiles=2, fixed_batch=True)

    if refused == 2:
        with pytest.raises(UserError, match="memory on chip"):
            found()
    else:
        assert [each["fits"] for each in found()["tried"]] == [True, False]


@pytest.mark.parametrize(
    ("reports", "best"),
    [
        ([(False, -9), (False, -1), (False, -5)], 1),
        ([(False, -1), (True, 10), (True, 20)], 2),
    ],
    ids=["lacks least", "fastest"],
)
def test_a_search_recommends_what_fits_and_is_fastest_or_else_lacks_least(reports, best, tiny):
    where, number = topology.Topology("v5e", CHIPS["v5e"], (2, 4)), iter(range(3))

    def plan(config):
        fits, figure = reports[at := next(number)]
        return {"at": at, "fits": fits, "images_per_s": figure, "headroom_bytes": figure, "memory_bytes": {"total": 1}}

    found = search.search(tiny(batch_size=16), where, jax.devices(), plan, compiles=3, fixed_batch=True)
    assert found["at"] == best


def test_ways_of_running_layers_take_turns_in_a_search(tiny):
    def ways(name, **model):
        where = topology.Topology(name, CHIPS[name], (2, 4))
        config = tiny(batch_size=16, model={"scan_layers": None} | model)
        found = search.ranked(config, where, jax.devices(), fixed_batch=True)
        return [(candidate.scan_layers, candidate.attention_kernel) for candidate in found[:4]]

    assert ways("h200") == [(False, "pallas"), (False, "xla")] * 2
    assert ways("h200", attention_kernel="xla", scan_layers=True) == [(True, "xla")] * 4
    assert ways("v5e") == [(True, "xla")] * 4
    assert ways("v5p", dtype="bfloat16") == [(True, "pallas"), (True, "xla")] * 2


def test_what_a_search_recommends_is_told_as_flags_of_training(tiny):
    where, planned = topology.Topology("h200", CHIPS["h200"], (1, 8)), []
    given = tiny(batch_size=16, model={"heads": 1, "scan_layers": None})

    def plan(config):
        planned.append(flatten(config))
        return {"fits": True, "memory_bytes": {"total": 1}, "images_per_s": 1.0}

    report = search.search(given, where, jax.devices(), plan, compiles=1, fixed_batch=True)
    flags = dict(flag.removeprefix("--config.").split("=") for flag in report["overrides"])
    assert {"batch_size", "model.scan_layers", "model.attention_kernel"} <= flags.keys()
    assert {name: str(value) for name, value in planned[0].items()} == (
        {name: str(value) for name, value in flatten(given).items()} | flags
    )


def test_a_search_leaves_alone_what_a_config_sets_and_open_what_devices_choose_so(tiny):
    where = topology.Topology("v5e", CHIPS["v5e"], (2, 4))
    found = search.ranked(tiny(batch_size=16, model={"remat": "full"}), where, jax.devices(), fixed_batch=True)
    assert {candidate.remat for candidate in found} == {"full"}
    given = tiny(batch_size=16, model={"scan_layers": None})  # the CPUs that act as chips here choose remat none
    for candidate in search.ranked(given, where, jax.devices(), fixed_batch=True):
        made = search.recommended(given, dataclasses.asdict(candidate), jax.devices())
        assert made.model.remat == ("auto" if candidate.remat == "none" else candidate.remat)


def test_where_memory_is_slow_a_search_first_cuts_the_state(tiny):
    slow = topology.Topology("v5e", dataclasses.replace(CHIPS["v5e"], memory_bandwidth=1e6), (2, 4))
    first = search.ranked(tiny(batch_size=16), slow, jax.devices(), fixed_batch=True)[0]
    assert first.fsdp * first.tensor == 8


@pytest.fixture
def best_first(tiny):
    """(fsdp, batch size) of a search's candidates, in order, on eight chips with these rates; sequence is 1."""

    def find(shape=(2, 4), slices=1, fixed_batch=True, accumulate=1, **rates):
        where = topology.Topology("v5e", dataclasses.replace(CHIPS["v5e"], **rates), shape, slices=slices)
        model = {"heads": 1, "remat": "full"}  # no `tensor`
        config = tiny(batch_size=64, model=model, optim={"accumulate": accumulate})
        found = search.ranked(config, where, jax.devices(), fixed_batch=fixed_batch)
        return [(each.fsdp, each.batch_size) for each in found if each.sequence == 1]

    return find


def test_a_search_first_cuts_the_state_into_whole_tiles_but_not_where_micro_batches_gather_it_anew(best_first):
    """Memory is so slow that any sharding would pay; a width of 32 has whole tiles for two shards."""
    assert [fsdp for fsdp, _ in best_first(memory_bandwidth=3e11)] == [2, 8, 4, 1]
    assert best_first(memory_bandwidth=3e11, accumulate=8)[0] == (1, 64)


def test_a_search_cuts_gradients_that_slow_links_between_slices_sum(best_first):
    apart = {"shape": (2, 2), "slices": 2, "memory_bandwidth": float("inf")}
    assert [fsdp for fsdp, _ in best_first(**apart)] == [4, 2, 1]
    assert [fsdp for fsdp, _ in best_first(**apart, slow_link=float("inf"))] == [1, 2, 4]


def test_a_search_prefers_many_images_for_each_gathering_of_the_weights(best_first):
    found = best_first(memory_bandwidth=float("inf"), fixed_batch=False)
    assert [images for fsdp, images in found if fsdp == 2] == [512, 256, 128, 64, 32, 16, 8]
