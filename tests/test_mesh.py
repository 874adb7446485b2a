"""Eight devices compute what one computes, whatever the mesh, and hold only their parts."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from lina_jax import hlo, mesh, state
from lina_jax.config import MeshConfig
from lina_jax.errors import UserError
from lina_jax.models.attention import AttentionConfig
from lina_jax.models.layers import over_variables
from lina_jax.models.transformer import Block, apply_layers, by_image, stacked

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
    def make(condition, scan=False, accumulate=1):
        model = {"condition": condition, "mask_text_padding": True, "scan_layers": scan}
        return tiny(model=model, optim={"b1": 0.0, "accumulate": accumulate})

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
    [
        ("class", {"data": 1, "fsdp": 8}),
        ("text", {"data": 1, "fsdp": 2, "tensor": 4}),
        ("class", {"replica": 2, "data": 1, "fsdp": 2, "sequence": 2}),
        ("text", {"data": 1, "sequence": 4, "tensor": 2}),
    ],
    ids=str,
)
def test_eight_devices_give_the_loss_and_gradients_of_one(
    condition, sizes, alone, config_of, rough, batch_of, error_between
):
    config = config_of(condition)
    loss, gradient = first_step(state.blueprint(config, mesh.build(MeshConfig(**sizes))), rough, batch_of(config))
    want_loss, want_gradient = alone[condition]
    assert abs(loss / want_loss - 1) < TOLERANCE["class"]
    assert error_between(gradient, want_gradient) < TOLERANCE[condition]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_three_axes_with_loops_and_micro_batches_give_the_gradients_of_one_device(
    scan, accumulate, alone, config_of, rough, batch_of, error_between
):
    """Where XLA's partitioner may exchange tokens of few images in place of weights, it pairs those of others."""
    config = config_of("class", scan, accumulate)
    plan = state.blueprint(config, mesh.build(MeshConfig(data=2, fsdp=2, tensor=2)))
    loss, gradient = first_step(plan, rough, batch_of(config))
    want_loss, want_gradient = alone["class"]
    assert abs(loss / want_loss - 1) < TOLERANCE["class"]
    assert error_between(gradient, want_gradient) < TOLERANCE["class"]


@pytest.fixture(scope="module")
def stack():
    return nnx.split(stacked(lambda rngs: Block(AttentionConfig(32, 2), 2, rngs=rngs), 3, nnx.Rngs(0)))


def run_stack(stack, grid, ahead=False, scan=True):
    """Text of the compiled program, and what it gives: the mean square of what leaves the layers, and its gradient."""
    graph, weights = stack
    x = np.random.default_rng(0).standard_normal((8, 6, 32), np.float32)

    def cut(variable):
        return variable.replace(mesh.sharding(grid, None, *variable.get_metadata("axes")))

    def loss(weights, x):
        layers = by_image(nnx.merge(graph, weights), len(x))
        y = apply_layers(lambda x, block: block(x), x, layers, scan=scan, remat="dots", ahead=ahead)
        return jnp.mean(jnp.square(y))

    at = over_variables(cut, weights)
    with jax.set_mesh(grid):
        weights, x = jax.device_put((weights, x), (at, mesh.sharding(grid, "batch", None, None)))
        program = jax.jit(jax.value_and_grad(loss), out_shardings=(None, at)).lower(weights, x).compile()
        return program.as_text(), *jax.device_get(program(weights, x))


def in_loops(text, kind):
    """The collectives of this kind that run in each iteration."""
    module = hlo.Module(text)
    loops = [name for name in module.computations if name != module.entry]
    return [i for name in loops for i in module.instructions(name) if hlo.collective_kind(i) == kind]


@pytest.mark.parametrize("sizes", [{"data": 1, "fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_weights_gathered_ahead_are_gathered_once_and_change_nothing(sizes, stack, one_device, error_between):
    fsdp = mesh.build(MeshConfig(**sizes))
    _, want_loss, want = run_stack(stack, one_device)
    at_use, *_ = run_stack(stack, fsdp)
    ahead, loss, gradient = run_stack(stack, fsdp, ahead=True)
    assert abs(loss / want_loss - 1) < TOLERANCE["class"]
    assert error_between(gradient, want) < TOLERANCE["class"]
    # Where they are used, a block gathers them for its forward and again for its backward pass.
    assert len(in_loops(ahead, "all-gather")) < len(in_loops(at_use, "all-gather"))


@pytest.mark.parametrize("how", [{"scan": False}, {"scan": True}, {"scan": True, "ahead": True}], ids=str)
def test_the_last_layer_makes_only_what_is_read(how, stack, one_device, error_between):
    graph, weights = stack
    x = np.random.default_rng(0).standard_normal((8, 6, 32), np.float32)

    def forward(grid, **settings):
        def run(weights, x):
            return apply_layers(lambda x, block: block(x), x, nnx.merge(graph, weights), remat="none", **settings)

        with jax.set_mesh(grid):
            return jax.device_get(jax.jit(run)(weights, x))

    def last(x, block):
        return block(x, read=lambda tokens: tokens[:, 2:4])

    read = forward(mesh.build(MeshConfig(data=1, fsdp=8)), last=last, **how)
    assert error_between(read, forward(one_device, scan=True)[:, 2:4]) < TOLERANCE["class"]


def test_tokens_are_not_exchanged_in_place_of_weights(stack):
    """However few there are: layers are a chain of products, which would wait for each exchange."""
    text, *_ = run_stack(stack, mesh.build(MeshConfig(data=1, fsdp=8)), scan=False)
    module = hlo.Module(text)
    exchanged = [i for i in module.instructions(module.entry) if hlo.collective_kind(i) == "all-to-all"]
    gathered = [i for i in module.instructions(module.entry) if hlo.collective_kind(i) == "all-gather"]
    assert not exchanged
    tokens, width = 6, 32
    assert gathered and (tokens, width) not in {shape.dims[-2:] for i in gathered for shape in i.shapes}


def test_no_layer_waits_for_sums_of_small_gradients(stack):
    """Those of biases and norms are summed over devices once, after the loop; in it are those of matrices alone."""
    text, *_ = run_stack(stack, mesh.build(MeshConfig(data=8)))
    sums = in_loops(text, "all-reduce")
    assert sums and all(len(shape.dims) > 1 for i in sums for shape in i.shapes)


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


def test_the_table_cuts_heads_width_and_tokens():
    assert mesh.spec("embed", None, "heads", None) == PartitionSpec("fsdp", None, "tensor", None)
    assert mesh.spec("inner", None) == PartitionSpec(("tensor", "fsdp"), None)
    assert mesh.spec("batch", "tokens", None) == PartitionSpec(("replica", "data", "fsdp"), "sequence", None)


@pytest.mark.parametrize("names", [("batch", "embed"), ("heads", "mlp"), ("embed", "embed")])
def test_two_axes_on_one_mesh_axis_are_refused(names):
    with pytest.raises(ValueError, match="would use a mesh axis twice"):
        mesh.spec(*names)


def test_no_program_argument_of_the_size_of_a_matrix_is_whole_on_a_device(tiny, batch_of):
    """Of the state; the text table, which is read a few rows at a time, is frozen and small."""
    config = tiny(model={"condition": "class"}, batch_size=8)
    plan = state.blueprint(config, mesh.build(MeshConfig(data=1, fsdp=8)))
    batch = jax.device_put(batch_of(config), mesh.sharding(plan.mesh, "batch"))
    compiled = state.make_train_step(plan).lower(plan.shapes, batch).compile()
    (run, _, _), _ = compiled.input_shardings
    large = [
        (path, leaf, sharding)
        for (path, leaf), sharding in zip(
            jax.tree.leaves_with_path(plan.shapes), jax.tree.leaves(run, is_leaf=lambda x: x is None), strict=True
        )
        if leaf.size >= config.model.width**2 and path[0].name != "frozen"
    ]
    assert len(large) > 20
    assert [path for path, leaf, sharding in large if sharding.shard_shape(leaf.shape) == leaf.shape] == []


def test_the_open_axis_takes_the_devices_that_are_left():
    sizes = dict(mesh.build(MeshConfig(data=2, fsdp=-1, tensor=2)).shape)
    assert sizes == {"replica": 1, "data": 2, "fsdp": 2, "sequence": 1, "tensor": 2}


@pytest.mark.parametrize(
    ("sizes", "arithmetic"),
    [
        ({"data": 3}, "replica=1 x data=3 x fsdp=1 x sequence=1 x tensor=1"),
        ({"fsdp": 3}, "replica=1 x data=-1 x fsdp=3 x sequence=1 x tensor=1"),
        ({"data": 4, "sequence": 4}, "replica=1 x data=4 x fsdp=1 x sequence=4 x tensor=1"),
        ({"data": 8, "replica": 0}, "replica=0 x data=8 x fsdp=1 x sequence=1 x tensor=1"),
        ({"data": -2, "fsdp": -4}, "replica=1 x data=-2 x fsdp=-4 x sequence=1 x tensor=1"),
    ],
    ids=str,
)
def test_impossible_meshes_are_refused_with_the_arithmetic(sizes, arithmetic):
    with pytest.raises(UserError) as error:
        mesh.build(MeshConfig(**sizes))
    assert str(error.value) == f"mesh: {arithmetic} does not make 8 devices"


@dataclasses.dataclass(frozen=True)
class Chip:
    """What mesh.build asks of a device."""

    id: int
    process_index: int
    slice_index: int
    platform: str = "gpu"
    device_kind: str = "GPU"


def chips(slices: int, processes: int, count: int = 8) -> list[Chip]:
    """Chips of that many slices and processes."""
    return [Chip(i, i * processes // count, i * slices // count) for i in range(count)]


@dataclasses.dataclass(frozen=True)
class TpuChip(Chip):
    platform: str = "tpu"
    device_kind: str = "TPU v5"
    core_on_chip: int = 0

    @property
    def coords(self) -> tuple[int, int, int]:
        return self.id % 2, self.id // 2 % 2, 0


@pytest.mark.parametrize(
    ("sizes", "processes", "made"),
    [
        ({}, 1, {"data": 3, "fsdp": 32}),
        ({}, 12, {"data": 12, "fsdp": 8}),
        ({"data": 1}, 12, {"data": 1, "fsdp": 96}),
        ({"data": 8, "sequence": 4}, 1, {"data": 8, "fsdp": 3, "sequence": 4}),
        ({"replica": 2}, 1, {"replica": 2, "data": 3, "fsdp": 16}),
        ({"sequence": 2}, 12, {"data": 12, "fsdp": 4, "sequence": 2}),
    ],
    ids=str,
)
def test_fsdp_of_zero_is_chosen_from_the_devices_that_are_left(sizes, processes, made):
    shape = mesh.build(MeshConfig(fsdp=0, **sizes), chips(1, processes, 96)).shape
    assert shape == {"replica": 1, "sequence": 1, "tensor": 1} | made


@pytest.mark.parametrize(("nodes", "processes"), [(4, 32), (4, 4), (1, 32), (1, 1)])
def test_gpus_of_a_node_are_near_however_many_processes_drive_them(nodes, processes):
    made = mesh.build(MeshConfig(fsdp=0), chips(nodes, processes, 32))
    assert (made.shape["data"], made.shape["fsdp"]) == (nodes, 32 // nodes)


@dataclasses.dataclass(frozen=True)
class Unnumbered:
    """A device of a runtime that numbers no slices."""

    id: int
    process_index: int
    platform: str = "gpu"


@pytest.mark.parametrize(("processes", "fsdp"), [(4, 8), (32, 1)])
def test_devices_without_numbers_are_near_those_of_their_process(processes, fsdp):
    devices = [Unnumbered(i, i * processes // 32) for i in range(32)]
    assert mesh.build(MeshConfig(fsdp=0), devices).shape["fsdp"] == fsdp


@pytest.mark.parametrize(
    ("batch_size", "fsdp", "made"),
    [(16, 0, {"fsdp": 8}), (12, 0, {"fsdp": 4, "sequence": 2}), (12, 2, {"data": 2, "fsdp": 2, "sequence": 2})],
)
def test_sequence_of_zero_is_chosen_so_that_the_batch_can_be_cut(batch_size, fsdp, made, tiny):
    config = tiny(batch_size=batch_size, mesh={"fsdp": fsdp, "sequence": 0})
    assert mesh.of(config).shape == dict.fromkeys(mesh.AXES, 1) | made


@pytest.mark.parametrize(("sizes", "parts"), [({"fsdp": 0}, 8), ({"data": 2, "fsdp": 2}, 4)])
def test_a_batch_that_no_choice_can_cut_is_refused_by_its_size(sizes, parts, tiny):
    with pytest.raises(
        UserError, match=rf"accumulate=7 is not divisible by {parts} devices .*; no mesh.sequence helps"
    ):
        mesh.of(tiny(batch_size=7, mesh={"sequence": 0} | sizes))


@pytest.mark.parametrize(("slices", "processes"), [(2, 2), (2, 8), (1, 2)])
def test_a_replica_is_a_slice_or_a_node(slices, processes):
    devices = mesh.build(MeshConfig(replica=2, data=1, fsdp=2, tensor=2), chips(slices, processes)[::-1]).devices
    assert [sorted(chip.id for chip in block.flat) for block in devices] == [[0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"replica": 4, "fsdp": 8}, {"replica": 2, "fsdp": 4}], ids=str)
def test_nodes_of_gpus_need_no_replica_and_fsdp_stays_in_a_node(sizes):
    """Numbered node by node or, as tasks can be, dealt out to them."""
    for node in (lambda i: i // 8, lambda i: i % 4):
        gpus = [Chip(i, i, node(i)) for i in range(32)]
        blocks = mesh.build(MeshConfig(**sizes), gpus).devices.reshape(-1, sizes["fsdp"])
        assert sorted(chip.id for chip in blocks.flat) == list(range(32))
        assert all(len({chip.slice_index for chip in block}) == 1 for block in blocks)


@pytest.mark.parametrize(
    ("sizes", "nodes", "crossing"),
    [
        ({"data": 2, "fsdp": 4}, 2, True),
        ({"replica": 2, "data": 1, "fsdp": 2, "sequence": 2}, 2, True),
        ({"data": 1, "fsdp": 8}, 2, False),  # one sum, over all
        ({"data": 8, "fsdp": 1}, 2, False),
        ({"data": 2, "fsdp": 4}, 1, False),
    ],
    ids=str,
)
def test_gradients_are_summed_between_nodes_where_fsdp_stays_in_them(sizes, nodes, crossing):
    assert mesh.sums_cross_nodes(mesh.build(MeshConfig(**sizes), chips(nodes, 8))) == crossing


def test_slices_of_tpus_are_joined_by_replicas_alone():
    devices = [TpuChip(i, i // 4, i // 4) for i in range(8)]
    blocks = mesh.build(MeshConfig(replica=2, data=1, fsdp=4), devices).devices
    assert [{chip.slice_index for chip in block.flat} for block in blocks] == [{0}, {1}]
    with pytest.raises(UserError, match=r"mesh.replica=1: 2 slices need a multiple of 2"):
        mesh.build(MeshConfig(data=8), devices)


@pytest.mark.parametrize(
    ("changes", "sizes", "message"),
    [
        ({"batch_size": 12}, {"data": 8}, "batch_size / optim.accumulate=12 is not divisible by 8"),
        ({"batch_size": 12}, {"replica": 2, "data": 4}, "batch_size / optim.accumulate=12 is not divisible by 8"),
        ({"optim": {"accumulate": 2}}, {"fsdp": 2}, "batch_size / optim.accumulate=4 is not divisible by 8"),
        ({"batch_size": 17, "optim": {"accumulate": 2}}, {"fsdp": 8}, "batch_size=17 is not divisible by optim.accum"),
        ({}, {"tensor": 8}, "model.heads=4 is not divisible by 8"),
        ({"model": {"head_width": 36}}, {"fsdp": 8}, "model.head_width=36 is not divisible by 8"),
        ({"model": {"width": 36}}, {"fsdp": 8}, "model.width=36 is not divisible by 8"),
        ({"model": {"width": 36}}, {"fsdp": 4, "tensor": 2}, "model.width=36 is not divisible by 8"),
        ({}, {"sequence": 8}, "model.image_grid=4,4: its number of rows=4 is not divisible by 8"),
        ({"model": {"condition_grid": (1, 2)}}, {"sequence": 4}, "model.condition_grid: its number of tokens=2 is not"),
        ({"model": {"conv_kernel": 5}}, {"sequence": 4}, "mesh.sequence=4 leaves 1 of 4 rows to a device; model.conv_"),
    ],
)  # fmt: skip
def test_what_a_mesh_cannot_cut_is_refused(tiny, changes, sizes, message):
    config = tiny(**changes | {"batch_size": 8})
    config = dataclasses.replace(config, batch_size=changes.get("batch_size", 8))  # as plans choose one
    with pytest.raises(UserError) as error:
        mesh.check(config, mesh.build(MeshConfig(**sizes)))
    assert str(error.value).startswith(message)


def test_weights_of_which_something_cannot_be_cut_are_held_by_one_device(tiny, monkeypatch):
    """The features of a time are 256, whatever the widths."""
    three, model = jax.devices()[:3], tiny(model={"width": 48, "head_width": 48}).model
    with pytest.raises(UserError, match=r"^the number of features of a time=256 is not divisible by 3 devices"):
        mesh.check_model(model, mesh.build(MeshConfig(data=1, fsdp=3), three))
    monkeypatch.setattr(jax, "local_devices", lambda: three)
    assert mesh.holding(model).size == 1


def test_a_mesh_on_the_command_line():
    assert mesh.parse("fsdp=2,sequence=4") == MeshConfig(fsdp=2, sequence=4)
    assert mesh.parse("") == MeshConfig()


@pytest.mark.parametrize("text", ["sequnce=4", "sequence", "sequence=four", "sequence=²", "4"])
def test_a_mesh_that_cannot_be_read_is_named(text):
    with pytest.raises(UserError, match=f"--mesh={text}: expected AXIS=SIZE,AXIS=SIZE with axes replica, data, fsdp"):
        mesh.parse(text)


def test_constrain_does_nothing_without_a_mesh():
    x = np.ones((2, 2), np.float32)
    assert mesh.constrain(x, "batch", None) is x


def test_a_platform_is_chosen_when_tracing_or_where_an_export_runs():
    def either(x):
        return mesh.by_platform(x, cpu=lambda x: x + 1, default=lambda x: x - 1)

    x = np.float32(1)
    assert "platform_index" not in str(jax.make_jaxpr(either)(x))
    with mesh.portable(True):
        exported = jax.export.export(jax.jit(either), platforms=("cpu", "tpu"))(x)
    assert exported.call(x) == 2
    assert "add" in exported.mlir_module() and "subtract" in exported.mlir_module()


def test_a_slice_for_which_jax_finds_no_layout_is_one_line(monkeypatch):
    """As of 4 x 4 x 20 chips of v5p with fsdp of 32 (jax 0.10)."""

    def fail(*_, **__):
        raise TypeError("int() argument must be a string, not 'NoneType'")

    monkeypatch.setattr(mesh.mesh_utils, "create_device_mesh", fail)
    devices = [types.SimpleNamespace(platform="tpu", slice_index=0, id=number) for number in range(8)]
    with pytest.raises(UserError, match=r"^mesh: JAX finds no layout of replica=1 x data=2 x fsdp=4 .* set another"):
        mesh.build(MeshConfig(fsdp=4), devices)
