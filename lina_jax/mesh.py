"""The device mesh, and the one table that says which array axis is sharded over which mesh axes."""

import bisect
import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from lina_jax import chips, config_checks
from lina_jax.config import TIME_FEATURES, Config, MeshConfig, ModelConfig
from lina_jax.errors import UserError

# From the slowest links to the fastest. `replica` lies between slices or nodes: only gradients cross it, once per
# micro-batch. `tensor` exchanges activations in every layer.
AXES = ("replica", "data", "fsdp", "sequence", "tensor")

# Logical axis -> mesh axes. In parameters, their moments and EMA, and the frozen encoders, the first large axis is
# sharded over `fsdp`: arrays are gathered where they are used, so that no device holds the whole model. (With another
# axis, GPUs would transpose the matrix before and after.) Heads and hidden units are sharded over `tensor` (Megatron:
# partial sums of the width are reduced). Activations are sharded by batch, and the tokens of each image over `sequence`
# (models/sequence.py).
RULES: Mapping[str, tuple[str, ...]] = {
    "batch": ("replica", "data", "fsdp"),
    "tokens": ("sequence",),  # of condition and image; data and encoders are replicated over it
    "embed": ("fsdp",),  # widths of the residual stream and the diffusion head, channels of autoencoders
    "rows": ("fsdp",),  # of large tables with a row for each token
    "heads": ("tensor",),  # attention heads
    "mlp": ("tensor",),  # hidden units of MLPs
    "inner": ("tensor", "fsdp"),  # heads or hidden units, in a matrix that maps them to the residual stream
    "parts": (),  # maps stacked in one array: queries, keys, values; scale, shift, gate
}

# Size (number of elements) from which a layer's table of gates is sharded; tables for images up to 1024 px are smaller.
LARGE_TABLE = 2**18

# The most shards of widths 1024 and 1536 that have a multiple of 16 rows each. XLA:TPU does not gather other shards but
# sums padded copies of them, except in squares of chips with SparseCores (docs/planning.md).
WHOLE_TILES = 32


def from_config(config: Config, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh that a config trains on. Raises UserError as `build` and `check` do.

    If `sequence` is 0, images are split into the fewest parts with which the batch can be sharded over the devices.
    """
    devices = jax.devices() if devices is None else devices
    if config.mesh.sequence:
        mesh = build(config.mesh, devices)
        check(config, mesh)
        return mesh
    if config.mesh.replica > 0:
        _check_slices(config.mesh.replica, devices)
    refusals = {}
    for parts in range(1, len(devices) + 1):
        try:
            mesh = build(dataclasses.replace(config.mesh, sequence=parts), devices)
        except UserError as refusal:
            refusals.setdefault("mesh", refusal)
            continue
        try:
            check(config, mesh)
        except UserError as refusal:
            refusals.setdefault("config", refusal)
        else:
            return mesh
    raise UserError(f"{refusals.get('config') or refusals['mesh']}; no value of mesh.sequence fixes this")


def build(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over all devices; neighbours in the mesh are neighbours in the machine.

    `fsdp` of 0 is chosen: all devices that the other axes leave, if neither `data` nor `replica` is -1. Else it is the
    greatest common divisor of that number, WHOLE_TILES, and the sequence x tensor groups in a slice or node (`nodes`),
    or a size near it (`_along_whole_axes`). `sequence` of 0 means 1, as no batch is known here.

    Raises UserError with the arithmetic if the product of the axes is not the number of devices, `replica` does not fit
    the slices of a TPU, or the slices differ in size.
    """
    config_checks.check_mesh(config)
    devices = jax.devices() if devices is None else devices
    sizes = {axis: getattr(config, axis) for axis in AXES}
    sizes["sequence"] = sizes["sequence"] or 1
    if sizes["fsdp"] != 0:
        return _mesh(sizes, devices)
    left = len(devices) // max(1, math.prod(n for n in sizes.values() if n > 0))
    if -1 not in (sizes["data"], sizes["replica"]):
        return _mesh(sizes | {"fsdp": left}, devices)
    node_of, others = nodes(devices), max(1, sizes["sequence"] * sizes["tensor"])
    node = node_of.count(node_of[0])
    near = 1 if node % others else node // others
    limit = math.gcd(left, near)
    fsdp = math.gcd(limit, WHOLE_TILES)
    if others == 1:
        first = [device for device, number in zip(devices, node_of, strict=True) if number == node_of[0]]
        fsdp = _along_whole_axes(fsdp, limit, first)
    return _mesh(sizes | {"fsdp": fsdp}, devices)


def _along_whole_axes(usual: int, limit: int, devices: Sequence[jax.Device]) -> int:
    """`usual`, or a size near it whose groups fill whole axes of a 3D torus, as SparseCores gather along all of them.

    Near is from half of `usual` up to it, in a square up to twice it. The size divides `limit`; more axes win, then
    larger groups. `devices` are those of one slice.
    """
    chip = chips.of_kind(getattr(devices[0], "device_kind", ""))
    if chip is None or chip.torus != 3 or not chip.sparse_cores:
        return usual
    extents = [len(np.unique(axis)) for axis in np.array([device.coords for device in devices]).T]
    if (cores := len(devices) // math.prod(extents)) > 1:
        extents.append(cores)
    divisible, found = math.gcd(limit, 2 * WHOLE_TILES), [(0, usual)]
    for count in range(2, len(extents) + 1):
        for axes in itertools.combinations(extents, count):
            size, square = math.prod(axes), count == 2 and axes[0] == axes[1]
            if usual <= 2 * size <= (4 if square else 2) * usual and divisible % size == 0:
                found.append((count, size))
    return max(found)[1]


def _mesh(sizes: dict[str, int], devices: Sequence[jax.Device]) -> Mesh:
    """The mesh of these sizes, one of which may be -1."""
    known = math.prod(n for n in sizes.values() if n != -1)
    if -1 in sizes.values() and known > 0 and len(devices) % known == 0:
        sizes = {axis: len(devices) // known if n == -1 else n for axis, n in sizes.items()}
    if min(sizes.values()) < 1 or math.prod(sizes.values()) != len(devices):
        raise UserError(f"mesh: {_product(sizes)} does not match {len(devices)} devices")
    _check_slices(sizes["replica"], devices)
    return Mesh(_arranged(sizes, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _slices(devices: Sequence[jax.Device]) -> int:
    return len(set(nodes(devices))) if devices[0].platform == "tpu" else 1


def _check_slices(replica: int, devices: Sequence[jax.Device]) -> None:
    slices = _slices(devices)
    if replica % slices:
        raise UserError(
            f"mesh.replica={replica}: {slices} slices need a multiple of {slices} (--config.mesh.replica={slices})"
        )


def mesh_for_weights(model: ModelConfig) -> Mesh:
    """A mesh to hold weights: sharded over this process's devices if the widths allow it, else on one of them."""
    devices = jax.local_devices()
    mesh = build(MeshConfig(data=1, fsdp=len(devices)), devices)
    try:
        check_model(model, mesh)
    except UserError:
        return build(MeshConfig(), devices[:1])
    return mesh


def nodes(devices: Sequence[jax.Device]) -> list[int]:
    """The number of the slice (TPU) or node (GPU), within which links are fast, of each device of a program.

    Both are JAX's `slice_index`, which numbers GPUs by machine or NVLink domain, however many processes drive them. If
    all GPUs have the same number (compilers for absent GPUs; machines that hide their boot id), each process is a node,
    unless every process has just one GPU: then all are one node, as on one machine with launch/slurm.sh. Devices
    without numbers (CPUs) are grouped by process.
    """
    slices = [getattr(device, "slice_index", None) for device in devices]
    if devices[0].platform == "tpu":
        return [number or 0 for number in slices]  # None from the compiler for an absent slice
    processes = [device.process_index for device in devices]
    if None in slices or (len(set(slices)) == 1 and len(set(processes)) < len(devices)):
        return processes
    return slices


def sums_cross_nodes(mesh: Mesh) -> bool:
    """Whether gradients are reduced within GPU nodes, then between them: no `fsdp` group spans several nodes."""
    devices = list(mesh.devices.flat)
    node_of = np.array(nodes(devices)).reshape(mesh.devices.shape)
    groups = np.moveaxis(node_of, AXES.index("fsdp"), -1)
    several = devices[0].platform == "gpu" and node_of.min() < node_of.max()
    return several and mesh.shape["fsdp"] > 1 and bool((groups == groups[..., :1]).all())


def _arranged(sizes: dict[str, int], devices: Sequence[jax.Device]) -> np.ndarray:
    shape, node_of = tuple(sizes.values()), nodes(devices)
    if devices[0].platform != "tpu":
        # Node by node. The last axes vary fastest, so that `replica` and `data` are the ones that cross nodes.
        order = sorted(range(len(devices)), key=lambda i: (node_of[i], devices[i].id))
        return np.array([devices[i] for i in order], object).reshape(shape)
    slices = [
        [device for device, node in zip(devices, node_of, strict=True) if node == number]
        for number in sorted(set(node_of))
    ]
    if len(counts := {len(part) for part in slices}) > 1:
        raise UserError(f"mesh: slices of {' and '.join(map(str, sorted(counts)))} devices: all must be equally large")
    inner = (sizes["replica"] // len(slices), *shape[1:])
    return np.concatenate([_in_slice(inner, part) for part in slices])


def _in_slice(shape: tuple[int, ...], devices: Sequence[jax.Device]) -> np.ndarray:
    """The devices of a TPU slice in this shape; neighbours in the mesh are neighbours in the torus."""
    try:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    except (ValueError, TypeError):  # it finds few layouts for edges like 20, 28 and 44 (jax 0.10)
        return _in_boxes(shape, devices)


def _in_boxes(shape: tuple[int, ...], devices: Sequence[jax.Device]) -> np.ndarray:
    """Axes after `data` become boxes of the torus: the cores of a chip, then of each edge as much as divides it."""
    places = np.array([(*device.coords, device.core_on_chip) for device in devices])
    places -= places.min(axis=0)
    torus = np.empty(places.max(axis=0) + 1, object)
    torus[tuple(places.T)] = devices
    left, counts = math.prod(shape[2:]), []
    for edge in torus.shape[::-1]:
        part = math.gcd(edge, left)
        counts = [edge // part, part, *counts]
        left //= part
    axes = range(len(counts))
    return torus.reshape(counts).transpose(*axes[::2], *axes[1::2]).reshape(shape)


def _product(sizes: dict[str, int]) -> str:
    return " x ".join(f"{axis}={n}" for axis, n in sizes.items())


def parse(text: str, devices: Sequence[jax.Device] | None = None) -> MeshConfig:
    """The config of 'fsdp=2,sequence=4'. Raises UserError for any other form, or sizes that no mesh has.

    Other axes have their defaults, except `replica`: it is the number of slices, each of which draws its own images.
    """
    sizes = {}
    for part in filter(None, text.split(",")):
        axis, _, size = part.partition("=")
        if axis not in AXES or not size.removeprefix("-").isdecimal():
            raise UserError(f"--mesh={text}: expected AXIS=SIZE,AXIS=SIZE with axes {', '.join(AXES)}")
        if axis in sizes:
            raise UserError(f"--mesh={text}: {axis} is given twice")
        sizes[axis] = int(size)
    slices = _slices(jax.devices() if devices is None else devices)
    config = MeshConfig(**{"replica": slices} | sizes)
    config_checks.check_mesh(config)
    return config


def batch_parts(mesh: Mesh | AbstractMesh) -> int:
    """The number of shards of a batch; 1 without a mesh."""
    return math.prod(mesh.shape.get(axis, 1) for axis in RULES["batch"])


def round_up_batch(mesh: Mesh, count: int) -> int:
    """The smallest batch of at least `count` (and one per shard) that the batch shards of a mesh share evenly."""
    parts = batch_parts(mesh)
    return max(1, -(-count // parts)) * parts


def check(config: Config, mesh: Mesh) -> None:
    """Raises UserError if the batch, the heads, a width or the tokens cannot be sharded as RULES says."""
    config_checks.check_micro_batches(config)
    _divides(mesh, "batch_size / optim.accumulate", config.batch_size // config.optim.accumulate, batch_parts(mesh))
    check_model(config.model, mesh)


def check_model(model: ModelConfig, mesh: Mesh) -> None:
    """`check` of all but the batch."""
    size, (rows, columns) = mesh.shape, model.image_grid
    _divides(mesh, "model.heads", model.heads, size["tensor"])
    for name, width in (("model.width", model.width), ("model.head_width", model.head_width)):
        _divides(mesh, name, width, size["fsdp"] * size["tensor"])
    _divides(mesh, "the number of time features", TIME_FEATURES, size["fsdp"])
    _divides(mesh, f"model.image_grid={rows},{columns}: its number of rows", rows, size["sequence"])
    _divides(mesh, "model.condition_grid: its number of tokens", model.condition_tokens, size["sequence"])
    tokens = model.condition_tokens + model.image_tokens
    columns_of_gates = {"none": 0, "dynamic": 0, "shared": 1}.get(model.kv_gate, model.heads)
    if tokens * columns_of_gates >= LARGE_TABLE:
        _divides(mesh, "the number of condition and image tokens", tokens, size["fsdp"])
    edge = model.conv_kernel // 2 if model.depthwise_conv and model.attention != "softmax" else 0
    if size["sequence"] > 1 and rows // size["sequence"] < edge:
        raise UserError(
            f"mesh.sequence={size['sequence']} leaves {rows // size['sequence']} of {rows} rows per device; "
            f"model.conv_kernel={model.conv_kernel} reaches {edge} rows into the next device: use at most "
            f"mesh.sequence={rows // edge}"
        )


def _divides(mesh: Mesh, name: str, value: int, parts: int) -> None:
    if value % parts:
        cut = {axis: n for axis, n in mesh.shape.items() if n > 1}
        raise UserError(f"{name}={value} is not divisible by {parts} devices (mesh {cut})")


def spec(*names: str | None) -> PartitionSpec:
    """The PartitionSpec of an array whose axes have these logical names (None: not sharded)."""
    cut = [RULES[name] or None if name else None for name in names]
    used = [axis for axes in cut if axes for axis in axes]
    if len(used) != len(set(used)):
        raise ValueError(f"axes {names} would use a mesh axis twice: {used}")
    return PartitionSpec(*cut)


def sharding(mesh: Mesh, *names: str | None) -> NamedSharding:
    """The sharding of an array whose axes have these logical names (RULES; None: not sharded)."""
    return NamedSharding(mesh, spec(*names))


def local_rows(mesh: Mesh, count: int) -> list[int]:
    """The rows of a batch of `count` that the devices of this process hold, in order.

    Processes that `sequence` or `tensor` spans hold the same rows.
    """
    slices = sharding(mesh, "batch").addressable_devices_indices_map((count,)).values()
    return sorted(set().union(*(range(*rows.indices(count)) for (rows,) in slices)))


def make_global_batch(
    mesh: Mesh, count: int, rows: Sequence[int], arrays: Mapping[str, np.ndarray]
) -> dict[str, jax.Array]:
    """A batch of `count` on the devices, to which each process contributes its rows (`local_rows`)."""
    place = sharding(mesh, "batch")

    def put(array: np.ndarray) -> jax.Array:
        def part(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(count)
            at = bisect.bisect_left(rows, start)
            return array[at : at + stop - start]

        return jax.make_array_from_callback((count, *array.shape[1:]), place, part)

    return {name: put(array) for name, array in arrays.items()}


def device_bytes(tree: Any) -> int:
    """Bytes per device of a tree of arrays, abstract or not."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Constrain the sharding of an activation; without a mesh (`jax.set_mesh`) nothing happens.

    A batch that cannot be sharded evenly, like the single unconditional image of guidance, is not sharded: each device
    would have padding, and layers would exchange it.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    parts = batch_parts(mesh)
    names = [None if name == "batch" and size % parts else name for name, size in zip(names, x.shape, strict=True)]
    return jax.lax.with_sharding_constraint(x, spec(*names))


def gathered(x: jax.Array, *names: str | None) -> jax.Array:
    """A parameter gathered along `fsdp`, as its layer reads it; its gradient is sharded again."""
    if jax.sharding.get_abstract_mesh().shape.get("fsdp", 1) == 1:
        return x
    whole = PartitionSpec(*(tuple(axis for axis in RULES.get(name, ()) if axis != "fsdp") or None for name in names))

    @jax.custom_vjp
    def gather(x):
        return jax.lax.with_sharding_constraint(x, whole)

    gather.defvjp(lambda x: (gather(x), None), lambda _, g: (jax.lax.with_sharding_constraint(g, spec(*names)),))
    return gather(x)
