"""Eight devices compute what one computes, whatever the mesh, and hold only their parts."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from lina_jax import mesh, state
from lina_jax.config import MeshConfig
from lina_jax.errors import UserError

# Relative differences, of the gradient in the Euclidean norm over all of it. Nothing but the order of sums may differ:
# measured 2.6e-7 (class) and 5.2e-7 (text). The bounds are eight times that; a forgotten reduction makes a difference
# of order 1.
TOLERANCE = {"class": 2e-6, "text": 4e-6}


def first_step(plan, rough, batch) -> tuple[float, object]:
    """(loss, gradient) of one step; with b1 = 0 Adam's first moment is the gradient."""
    run, metrics = state.make_train_step(plan)(rough(plan), batch)
    return float(metrics["loss"]), jax.device_get(run.opt_state[1][0].mu)


@pytest.fixture(scope="module")
def config_of(tiny):
    def make(condition):
        return tiny(model={"condition": condition, "mask_text_padding": True}, optim={"b1": 0.0})

    return make


@pytest.fixture(scope="module")
def alone(config_of, one_device, rough, batch_of):
    """(loss, gradient) on one device, by kind of condition."""

    def step(condition):
        config = config_of(condition)
        return first_step(state.blueprint(config, one_device), rough, batch_of(config))

    return {condition: step(condition) for condition in ("class", "text")}


@pytest.mark.parametrize(
    ("condition", "sizes"),
    [("class", (2, 2, 2)), ("class", (1, 8, 1)), ("text", (1, 2, 4))],
    ids=str,
)
def test_eight_devices_give_the_loss_and_gradients_of_one(
    condition, sizes, alone, config_of, rough, batch_of, error_between
):
    config = config_of(condition)
    loss, gradient = first_step(state.blueprint(config, mesh.build(MeshConfig(*sizes))), rough, batch_of(config))
    want_loss, want_gradient = alone[condition]
    assert abs(loss / want_loss - 1) < TOLERANCE["class"]
    assert error_between(gradient, want_gradient) < TOLERANCE[condition]


def local_share(tree) -> float:
    """The part of a tree's numbers that the first device holds."""
    leaves = jax.tree.leaves(tree)
    return sum(x.addressable_shards[0].data.size for x in leaves) / sum(x.size for x in leaves)


@pytest.mark.parametrize("name", ["params", "ema", "mu", "nu"])
def test_parameters_moments_and_average_are_cut_over_fsdp(name, tiny, rough):
    run = rough(state.blueprint(tiny(), mesh.build(MeshConfig(data=1, fsdp=8))))
    tree = getattr(run if name in ("params", "ema") else run.opt_state[1][0], name)
    # What is not cut are vectors: biases, norms, gates; here about a tenth of all numbers.
    assert local_share(tree) < 0.25


def test_parameters_are_cut_over_tensor(tiny, rough):
    run = rough(state.blueprint(tiny(), mesh.build(MeshConfig(data=1, fsdp=2, tensor=4))))
    assert local_share(run.params) < 0.25


def test_the_table_cuts_heads_and_width():
    assert mesh.spec("embed", None, "heads", None) == PartitionSpec("fsdp", None, "tensor", None)
    assert mesh.spec("batch", None) == PartitionSpec(("data", "fsdp"), None)


@pytest.mark.parametrize("names", [("batch", "embed"), ("heads", "mlp"), ("embed", "embed")])
def test_two_axes_on_one_mesh_axis_are_refused(names):
    with pytest.raises(ValueError, match="would use a mesh axis twice"):
        mesh.spec(*names)


def test_the_open_axis_takes_the_devices_that_are_left():
    assert dict(mesh.build(MeshConfig(data=2, fsdp=-1, tensor=2)).shape) == {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.mark.parametrize(
    ("config", "arithmetic"),
    [
        (MeshConfig(3, 1, 1), "data=3 x fsdp=1 x tensor=1 does not make 8 devices"),
        (MeshConfig(-1, 3, 1), "data=-1 x fsdp=3 x tensor=1 does not make 8 devices"),
        (MeshConfig(4, 4, 1), "data=4 x fsdp=4 x tensor=1 does not make 8 devices"),
        (MeshConfig(8, 0, 1), "data=8 x fsdp=0 x tensor=1 does not make 8 devices"),
        (MeshConfig(-2, -4, 1), "data=-2 x fsdp=-4 x tensor=1 does not make 8 devices"),
    ],
)
def test_impossible_meshes_are_refused_with_the_arithmetic(config, arithmetic):
    with pytest.raises(UserError) as error:
        mesh.build(config)
    assert str(error.value) == f"mesh: {arithmetic}"


@pytest.mark.parametrize(
    ("changes", "sizes", "message"),
    [
        ({"batch_size": 12}, (8, 1, 1), "batch_size / optim.accumulate=12 is not divisible by 8"),
        ({"optim": {"accumulate": 2}}, (4, 2, 1), "batch_size / optim.accumulate=4 is not divisible by 8"),
        ({}, (1, 1, 8), "model.heads=4 is not divisible by 8"),
        ({"model": {"head_width": 36}}, (1, 8, 1), "model.head_width=36 is not divisible by 8"),
        ({"model": {"width": 36}}, (1, 8, 1), "model.width=36 is not divisible by 8"),
    ],
)  # fmt: skip
def test_what_a_mesh_cannot_cut_is_refused(tiny, changes, sizes, message):
    with pytest.raises(UserError) as error:
        mesh.check(tiny(**changes), mesh.build(MeshConfig(*sizes)))
    assert str(error.value).startswith(message)


def test_constrain_does_nothing_without_a_mesh():
    x = np.ones((2, 2), np.float32)
    assert mesh.constrain(x, "batch", None) is x
