"""A mesh is built from the available devices, or refused with the arithmetic."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from lina_jax import mesh
from lina_jax.config import MeshConfig
from lina_jax.errors import UserError


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
    assert str(error.value) == f"mesh: {arithmetic} does not match 8 devices"


@dataclasses.dataclass(frozen=True)
class Chip:
    """The attributes of a device that mesh.build reads."""

    id: int
    process_index: int
    slice_index: int
    platform: str = "gpu"
    device_kind: str = "GPU"


def chips(slices: int, processes: int, count: int = 8) -> list[Chip]:
    """`count` chips, divided evenly among the slices and among the processes."""
    return [Chip(i, i * processes // count, i * slices // count) for i in range(count)]


@dataclasses.dataclass(frozen=True)
class TpuChip(Chip):
    platform: str = "tpu"
    device_kind: str = "TPU v5"
    core_on_chip: int = 0
    extents: tuple[int, ...] = (2, 2, 1)

    @property
    def coords(self) -> tuple[int, int, int]:
        x, y, z = self.extents
        return self.id % x, self.id // x % y, self.id // (x * y) % z


@pytest.mark.parametrize(
    ("sizes", "processes", "made"),
    [
        ({}, 1, {"data": 3, "fsdp": 32}),
        ({}, 12, {"data": 12, "fsdp": 8}),
        ({"data": 1}, 12, {"data": 1, "fsdp": 96}),
        ({"data": 8, "sequence": 4}, 1, {"data": 8, "fsdp": 3, "sequence": 4}),
        ({"replica": 2}, 1, {"replica": 2, "data": 3, "fsdp": 16}),
        ({"sequence": 2}, 12, {"data": 12, "fsdp": 4, "sequence": 2}),
        ({"sequence": 3}, 12, {"data": 32, "fsdp": 1, "sequence": 3}),  # three does not divide eight chips
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
    """A device of a runtime without slice numbers."""

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
    assert mesh.from_config(config).shape == dict.fromkeys(mesh.AXES, 1) | made


@pytest.mark.parametrize(("sizes", "parts"), [({"fsdp": 0}, 8), ({"data": 2, "fsdp": 2}, 4)])
def test_a_batch_that_no_choice_can_cut_is_refused_by_its_size(sizes, parts, tiny):
    with pytest.raises(
        UserError, match=rf"accumulate=7 is not divisible by {parts} devices .*; no value of mesh.sequence fixes this"
    ):
        mesh.from_config(tiny(batch_size=7, mesh={"sequence": 0} | sizes))


@pytest.mark.parametrize(("slices", "processes"), [(2, 2), (2, 8), (1, 2)])
def test_a_replica_is_a_slice_or_a_node(slices, processes):
    devices = mesh.build(MeshConfig(replica=2, data=1, fsdp=2, tensor=2), chips(slices, processes)[::-1]).devices
    assert [sorted(chip.id for chip in block.flat) for block in devices] == [[0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"replica": 4, "fsdp": 8}, {"replica": 2, "fsdp": 4}], ids=str)
def test_nodes_of_gpus_need_no_replica_and_fsdp_stays_in_a_node(sizes):
    """GPUs are numbered node by node or, as tasks can be, dealt out to the nodes in turn."""
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
        ({"data": 1, "fsdp": 8}, 2, False),  # one reduction, over all devices
        ({"data": 8, "fsdp": 1}, 2, False),
        ({"data": 2, "fsdp": 4}, 1, False),
    ],
    ids=str,
)
def test_gradients_are_summed_between_nodes_where_fsdp_stays_in_them(sizes, nodes, crossing):
    assert mesh.sums_cross_nodes(mesh.build(MeshConfig(**sizes), chips(nodes, 8))) == crossing


@pytest.mark.parametrize(
    ("kind", "extents", "fsdp"),
    [
        ("v5", (4, 4, 4), 16),
        ("v5", (2, 2, 4), 16),
        ("v5", (8, 8, 16), 64),
        ("v5", (4, 4, 8), 32),
        ("v5", (16, 16, 16), 32),
        ("v4", (8, 8, 8), 32),
        ("v5 lite", (16, 16, 1), 32),
    ],
)
def test_gathers_on_a_3d_torus_go_along_whole_axes(kind, extents, fsdp):
    devices = [TpuChip(i, 0, 0, device_kind=f"TPU {kind}", extents=extents) for i in range(math.prod(extents))]
    groups = np.moveaxis(mesh.build(MeshConfig(fsdp=0), devices).devices, mesh.AXES.index("fsdp"), -1)
    assert groups.shape[-1] == fsdp
    if kind == "v5" and min(extents) < 16:
        spanned = [len({chip.coords[axis] for chip in groups.reshape(-1, fsdp)[0]}) for axis in range(3)]
        assert all(size in (1, extent) for size, extent in zip(spanned, extents, strict=True))


def test_slices_of_tpus_are_joined_by_replicas_alone():
    devices = [TpuChip(i, i // 4, i // 4) for i in range(8)]
    blocks = mesh.build(MeshConfig(replica=2, data=1, fsdp=4), devices).devices
    assert [{chip.slice_index for chip in block.flat} for block in blocks] == [{0}, {1}]
    inferred = mesh.build(MeshConfig(replica=-1, data=1, fsdp=0), devices)
    assert (inferred.shape["replica"], inferred.shape["fsdp"]) == (2, 4)


@pytest.mark.parametrize("sizes", [{"data": 8}, {"fsdp": 0, "sequence": 0}], ids=str)
def test_slices_without_replicas_are_refused_with_what_helps(sizes, tiny):
    devices = [TpuChip(i, i // 4, i // 4) for i in range(8)]
    with pytest.raises(UserError) as error:
        mesh.from_config(tiny(batch_size=8, mesh=sizes), devices)
    assert str(error.value) == "mesh.replica=1: 2 slices need a multiple of 2 (--config.mesh.replica=2)"


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
        ({"model": {"conv_kernel": 5}}, {"sequence": 4}, "mesh.sequence=4 leaves 1 of 4 rows per device; model.conv_"),
    ],
)  # fmt: skip
def test_what_a_mesh_cannot_cut_is_refused(tiny, changes, sizes, message):
    config = tiny(**changes | {"batch_size": 8})
    config = dataclasses.replace(config, batch_size=changes.get("batch_size", 8))  # not validated, as in a search
    with pytest.raises(UserError) as error:
        mesh.check(config, mesh.build(MeshConfig(**sizes)))
    assert str(error.value).startswith(message)


def test_weights_of_which_something_cannot_be_cut_are_held_by_one_device(tiny, monkeypatch):
    """A timestep has 256 features, whatever the widths are."""
    three, model = jax.devices()[:3], tiny(model={"width": 48, "head_width": 48}).model
    with pytest.raises(UserError, match=r"^the number of time features=256 is not divisible by 3 devices"):
        mesh.check_model(model, mesh.build(MeshConfig(data=1, fsdp=3), three))
    monkeypatch.setattr(jax, "local_devices", lambda: three)
    assert mesh.mesh_for_weights(model).size == 1


def test_a_mesh_on_the_command_line():
    assert mesh.parse("fsdp=2,sequence=4") == MeshConfig(fsdp=2, sequence=4)
    assert mesh.parse("") == MeshConfig()
    slices = [TpuChip(i, i // 4, i // 4) for i in range(8)]
    assert mesh.parse("", slices) == MeshConfig(replica=2)
    assert mesh.build(mesh.parse("fsdp=2", slices), slices).shape["data"] == 2


@pytest.mark.parametrize("text", ["sequnce=4", "sequence", "sequence=four", "sequence=²", "4"])
def test_a_mesh_that_cannot_be_read_is_named(text):
    with pytest.raises(UserError, match=f"--mesh={text}: expected AXIS=SIZE,AXIS=SIZE with axes replica, data, fsdp"):
        mesh.parse(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fsdp=2,fsdp=4", "--mesh=fsdp=2,fsdp=4: fsdp is given twice"),
        ("fsdp=-1", "mesh.data and mesh.fsdp are -1: only one axis can be inferred"),
    ],
)
def test_a_mesh_on_the_command_line_that_says_too_much_is_named(text, message):
    with pytest.raises(UserError) as error:
        mesh.parse(text)
    assert str(error.value) == message


@dataclasses.dataclass(frozen=True)
class PlacedChip(TpuChip):
    """A chip in a slice of 4 x 6 x 10 chips."""

    @property
    def coords(self) -> tuple[int, int, int]:
        return 8 + self.id % 4, self.id // 4 % 6, self.id // 24 % 10


@dataclasses.dataclass(frozen=True)
class Core(PlacedChip):
    """One of the two cores of a chip, in a slice of 2 x 6 x 10 chips."""

    @property
    def coords(self) -> tuple[int, int, int]:
        return self.id // 2 % 2, self.id // 4 % 6, self.id // 24 % 10


@pytest.mark.parametrize("slices", [1, 2])
@pytest.mark.parametrize("inner", [{"fsdp": 16}, {"fsdp": 0}, {"fsdp": 4, "sequence": 2, "tensor": 2}], ids=str)
@pytest.mark.parametrize(("kind", "edges"), [(PlacedChip, [1, 2, 2, 4]), (Core, [2, 2, 2, 2])])
def test_where_jax_finds_no_layout_neighbours_are_boxes_of_the_torus(slices, inner, kind, edges, monkeypatch):
    """JAX finds none for 4 x 4 x 20 chips of v5p with fsdp=32, for example (jax 0.10)."""

    def fail(*_, **__):
        raise TypeError("int() argument must be a string, not 'NoneType'")

    monkeypatch.setattr(mesh.mesh_utils, "create_device_mesh", fail)
    devices = [kind(i, 0, i // 240, core_on_chip=i % 2 if kind is Core else 0) for i in range(240 * slices)]
    made = mesh.build(MeshConfig(replica=slices, **inner), devices).devices
    assert sorted(device.id for device in made.flat) == list(range(240 * slices))
    for box in made.reshape(-1, 16):
        assert len({device.slice_index for device in box}) == 1
        places = np.array([(*device.coords, device.core_on_chip) for device in box])
        assert sorted(np.ptp(places, axis=0) + 1) == edges


def test_slices_that_are_not_alike_are_one_line():
    with pytest.raises(UserError, match=r"^mesh: slices of 2 and 4 devices: all must be equally large$"):
        mesh.build(MeshConfig(replica=2), [TpuChip(i, 0, i // 4) for i in range(6)])
