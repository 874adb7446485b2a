"""Devices to mesh, and the one table that says which array axis lives on which mesh axis."""

import bisect
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from lina_jax import config_checks, places
from lina_jax.config import TIME_FEATURES, Config, MeshConfig, ModelConfig
from lina_jax.errors import UserError

# From the slowest links to the fastest: between slices or nodes stands `replica`, which only gradients cross, once for
# each micro-batch; `tensor` exchanges activations in every layer.
AXES = ("replica", "data", "fsdp", "sequence", "tensor")

# Logical axis -> mesh axes. Parameters, their moments and EMA, and the frozen encoders: the first large axis is
# cut over `fsdp` (gathered where used, so that no device holds the model; of another axis, GPUs would turn the matrix
# over before and after), heads and hidden units over `tensor` (Megatron: the width is summed). Activations: cut by
# batch, and the tokens of each image by `sequence` (models/sequence.py).
RULES: Mapping[str, tuple[str, ...]] = {
    "batch": ("replica", "data", "fsdp"),
    "tokens": ("sequence",),  # of condition and image; data and encoders are whole along it
    "embed": ("fsdp",),  # width of the residual stream and of the diffusion head, channels of autoencoders
    "rows": ("fsdp",),  # of large tables with a row for each token
    "heads": ("tensor",),  # attention heads
    "mlp": ("tensor",),  # hidden units of the two-layer perceptrons
    "inner": ("tensor", "fsdp"),  # heads or hidden units, of a matrix that maps them to the residual stream
    "parts": (),  # maps side by side in one array: queries, keys, values; scale, shift, gate
}

# Numbers of a layer's table of gates from which on it is cut: those of images up to 1024 px are smaller.
LARGE_TABLE = 2**18

# Into as many parts widths of 1024 and 1536 can be cut so that the rows of each are a multiple of 16: of other shards,
# XLA:TPU sums padded copies in place of gathering them (docs/planning.md).
WHOLE_TILES = 32


def of(config: Config, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh that a config trains on.

    `sequence` of 0 is chosen: the fewest parts of an image with which the batch can be cut over the devices.

    Raises UserError as `build` and `check` do.
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
    raise UserError(f"{refusals.get('config') or refusals['mesh']}; no mesh.sequence helps")


def build(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over all devices, neighbours in it neighbours in the machine.

    `fsdp` of 0 is chosen: with `data` or `replica` -1 as many of the devices that the other axes leave as divide
    WHOLE_TILES and are in one slice or node (`nodes`), else all of them. `sequence` of 0 is 1, as no batch is known
    here.

    Raises UserError with the arithmetic when the axes do not multiply to the number of devices, `replica` does not fit
    the slices of a TPU, or these are not alike.
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
    return _mesh(sizes | {"fsdp": math.gcd(left, WHOLE_TILES, near)}, devices)


def _mesh(sizes: dict[str, int], devices: Sequence[jax.Device]) -> Mesh:
    """Of these sizes, of which one may be -1."""
    known = math.prod(n for n in sizes.values() if n != -1)
    if -1 in sizes.values() and known > 0 and len(devices) % known == 0:
        sizes = {axis: len(devices) // known if n == -1 else n for axis, n in sizes.items()}
    if min(sizes.values()) < 1 or math.prod(sizes.values()) != len(devices):
        raise UserError(f"mesh: {_product(sizes)} does not make {len(devices)} devices")
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


def holding(model: ModelConfig) -> Mesh:
    """A mesh to hold weights without a batch: cut over the devices here where widths allow it, else on one of them."""
    devices = jax.local_devices()
    mesh = build(MeshConfig(data=1, fsdp=len(devices)), devices)
    try:
        check_model(model, mesh)
    except UserError:
        return build(MeshConfig(), devices[:1])
    return mesh


def nodes(devices: Sequence[jax.Device]) -> list[int]:
    """For each of all devices of a program, the slice (TPU) or node (GPU) it is in, where links are fast.

    Both are JAX's `slice_index`: it numbers GPUs by machine or NVLink domain, however many processes drive them. Where
    all GPUs have the same number (compilers for absent ones; machines that hide their boot id), a process that drives
    several is a node, but a process for each is one node, as on one machine by launch/slurm.sh. Devices without
    numbers (CPUs) are near those of their process.
    """
    slices = [getattr(device, "slice_index", None) for device in devices]
    if devices[0].platform == "tpu":
        return [number or 0 for number in slices]  # the compiler for an absent slice gives none
    processes = [device.process_index for device in devices]
    if None in slices or (len(set(slices)) == 1 and len(set(processes)) < len(devices)):
        return processes
    return slices


def sums_cross_nodes(mesh: Mesh) -> bool:
    """Whether gradients are summed within nodes of GPUs, then between them: no `fsdp` group spans several."""
    devices = list(mesh.devices.flat)
    node_of = np.array(nodes(devices)).reshape(mesh.devices.shape)
    groups = np.moveaxis(node_of, AXES.index("fsdp"), -1)
    several = devices[0].platform == "gpu" and node_of.min() < node_of.max()
    return several and mesh.shape["fsdp"] > 1 and bool((groups == groups[..., :1]).all())


def _arranged(sizes: dict[str, int], devices: Sequence[jax.Device]) -> np.ndarray:
    shape, node_of = tuple(sizes.values()), nodes(devices)
    if devices[0].platform != "tpu":
        # Node by node. The last axes change fastest, so that `replica` and `data` are the ones between nodes.
        order = sorted(range(len(devices)), key=lambda i: (node_of[i], devices[i].id))
        return np.array([devices[i] for i in order], object).reshape(shape)
    slices = [
        [device for device, node in zip(devices, node_of, strict=True) if node == number]
        for number in sorted(set(node_of))
    ]
    if len(counts := {len(part) for part in slices}) > 1:
        raise UserError(f"mesh: slices of {' and '.join(map(str, sorted(counts)))} devices: all must be alike")
    inner = (sizes["replica"] // len(slices), *shape[1:])
    return np.concatenate([_in_slice(inner, part) for part in slices])


def _in_slice(shape: tuple[int, ...], devices: Sequence[jax.Device]) -> np.ndarray:
    """Of a TPU, neighbours in the mesh neighbours in the torus."""
    try:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    except (ValueError, TypeError):  # of edges like 20, 28 and 44 it finds few layouts (jax 0.10)
        return _in_boxes(shape, devices)


def _in_boxes(shape: tuple[int, ...], devices: Sequence[jax.Device]) -> np.ndarray:
    """The axes behind `data` are boxes of the torus: the cores of a chip, then of each edge as much as divides it."""
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
    """'fsdp=2,sequence=4' as a config. Raises UserError.

    Axes that are not named are the defaults, but `replica` is the number of slices: each draws images of its own.
    """
    sizes = {}
    for part in filter(None, text.split(",")):
        axis, _, size = part.partition("=")
        if axis not in AXES or not size.removeprefix("-").isdecimal():
            raise UserError(f"--mesh={text}: expected AXIS=SIZE,AXIS=SIZE with axes {', '.join(AXES)}")
        if axis in sizes:
            raise UserError(f"--mesh={text}: {axis} stands there twice")
        sizes[axis] = int(size)
    slices = _slices(jax.devices() if devices is None else devices)
    config = MeshConfig(**{"replica": slices} | sizes)
    config_checks.check_mesh(config)
    return config


def cache_programs(directory: Path) -> None:
    """Keep compiled programs in a directory, if it can be written, so that the next start need not compile them."""
    if jax.config.jax_compilation_cache_dir is None and places.writable(directory):
        jax.config.update("jax_compilation_cache_dir", str(directory.resolve()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


def batch_parts(mesh: Mesh | AbstractMesh) -> int:
    """Into how many parts a batch is cut; 1 without a mesh."""
    return math.prod(mesh.shape.get(axis, 1) for axis in RULES["batch"])


def check(config: Config, mesh: Mesh) -> None:
    """Raises UserError when a batch, the heads, a width or the tokens cannot be cut as the table says."""
    config_checks.check_micro_batches(config)
    _divides(mesh, "batch_size / optim.accumulate", config.batch_size // config.optim.accumulate, batch_parts(mesh))
    check_model(config.model, mesh)


def check_model(model: ModelConfig, mesh: Mesh) -> None:
    """`check`, without the batch."""
    size, (rows, columns) = mesh.shape, model.image_grid
    _divides(mesh, "model.heads", model.heads, size["tensor"])
    for name, width in (("model.width", model.width), ("model.head_width", model.head_width)):
        _divides(mesh, name, width, size["fsdp"] * size["tensor"])
    _divides(mesh, "the number of features of a time", TIME_FEATURES, size["fsdp"])
    _divides(mesh, f"model.image_grid={rows},{columns}: its number of rows", rows, size["sequence"])
    _divides(mesh, "model.condition_grid: its number of tokens", model.condition_tokens, size["sequence"])
    tokens = model.condition_tokens + model.image_tokens
    columns_of_gates = {"none": 0, "dynamic": 0, "shared": 1}.get(model.kv_gate, model.heads)
    if tokens * columns_of_gates >= LARGE_TABLE:
        _divides(mesh, "the number of condition and image tokens", tokens, size["fsdp"])
    edge = model.conv_kernel // 2 if model.depthwise_conv and model.attention != "softmax" else 0
    if size["sequence"] > 1 and rows // size["sequence"] < edge:
        raise UserError(
            f"mesh.sequence={size['sequence']} leaves {rows // size['sequence']} of {rows} rows to a device; "
            f"model.conv_kernel={model.conv_kernel} reaches {edge} rows into the neighbour: at most "
            f"mesh.sequence={rows // edge}"
        )


def _divides(mesh: Mesh, name: str, value: int, parts: int) -> None:
    if value % parts:
        cut = {axis: n for axis, n in mesh.shape.items() if n > 1}
        raise UserError(f"{name}={value} is not divisible by {parts} devices (mesh {cut})")


def spec(*names: str | None) -> PartitionSpec:
    """The PartitionSpec of an array whose axes have these logical names (None: not cut)."""
    cut = [RULES[name] or None if name else None for name in names]
    used = [axis for axes in cut if axes for axis in axes]
    if len(used) != len(set(used)):
        raise ValueError(f"axes {names} would use a mesh axis twice: {used}")
    return PartitionSpec(*cut)


def sharding(mesh: Mesh, *names: str | None) -> NamedSharding:
    """Where an array lies whose axes have these logical names (RULES); a None is not cut."""
    return NamedSharding(mesh, spec(*names))


def rows_here(mesh: Mesh, count: int) -> list[int]:
    """The rows of a batch of `count` that devices of this process hold, in order.

    Where `sequence` or `tensor` reach over processes, these hold the same rows.
    """
    slices = sharding(mesh, "batch").addressable_devices_indices_map((count,)).values()
    return sorted(set().union(*(range(*rows.indices(count)) for (rows,) in slices)))


def placed(mesh: Mesh, count: int, rows: Sequence[int], arrays: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """A batch of `count` on the devices, of which each process gives its own `rows`, those of `rows_here`."""
    place = sharding(mesh, "batch")

    def put(array: np.ndarray) -> jax.Array:
        def part(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(count)
            at = bisect.bisect_left(rows, start)
            return array[at : at + stop - start]

        return jax.make_array_from_callback((count, *array.shape[1:]), place, part)

    return {name: put(array) for name, array in arrays.items()}


def device_bytes(tree: Any) -> int:
    """Bytes that one device holds of a tree of arrays, abstract or not."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Pin an activation's axes to the mesh; outside a mesh (`jax.set_mesh`) nothing happens.

    A batch that its devices cannot share evenly stays whole, like the one unconditional image of guidance: cut, each
    device would have padding, and layers would exchange it.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    parts = batch_parts(mesh)
    names = [None if name == "batch" and size % parts else name for name, size in zip(names, x.shape, strict=True)]
    return jax.lax.with_sharding_constraint(x, spec(*names))


def gathered(x: jax.Array, *names: str | None) -> jax.Array:
    """A parameter as its layer reads it, whole along `fsdp`; its gradient is scattered again."""
    if jax.sharding.get_abstract_mesh().shape.get("fsdp", 1) == 1:
        return x
    whole = PartitionSpec(*(tuple(axis for axis in RULES.get(name, ()) if axis != "fsdp") or None for name in names))

    @jax.custom_vjp
    def gather(x):
        return jax.lax.with_sharding_constraint(x, whole)

    gather.defvjp(lambda x: (gather(x), None), lambda _, g: (jax.lax.with_sharding_constraint(g, spec(*names)),))
    return gather(x)


def platform() -> str:
    """cpu, gpu or tpu: what is traced is meant for devices of the mesh in use, or else for those of this process."""
    device_mesh = jax.sharding.get_abstract_mesh()
    return jax.default_backend() if device_mesh.empty else device_mesh.abstract_device.platform


# portable(True): what is traced inside is meant for every platform (exports).
portable = jax.make_user_context(default_value=False)


def one_cpu() -> bool:
    """Whether what is traced is meant for one CPU and nothing else."""
    device_mesh = jax.sharding.get_abstract_mesh()
    return platform() == "cpu" and not portable.value and (device_mesh.empty or device_mesh.size == 1)


def by_platform(*args, default: Callable, **functions: Callable):
    """The one of `functions` (cpu, cuda, tpu) that `platform` asks for, or else `default`, of the arguments.

    Chosen now, but in `portable`: of jax.lax.platform_dependent remat would keep what the functions that do not run
    give, too, as zeros.
    """
    if portable.value:
        return jax.lax.platform_dependent(*args, default=default, **functions)
    known = platform()
    return functions.get("cuda" if known == "gpu" else known, default)(*args)


def loops_gather_late() -> bool:
    """Whether compilers leave a loop's gathers of weights in the iteration that uses them, which then waits for them.

    Those for TPUs do; those for GPUs move gathers into the iteration before (`xla_flags`).
    """
    return platform() == "tpu" and jax.sharding.get_abstract_mesh().shape.get("fsdp", 1) > 1
