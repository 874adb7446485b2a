"""Devices to mesh, and the one table that says which array axis lives on which mesh axis."""

import math
from collections.abc import Mapping
from pathlib import Path

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lina_jax import places
from lina_jax.config import Config, MeshConfig
from lina_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")

# Logical axis -> mesh axes. Parameters: one large axis is cut over `fsdp` (gathered where used, so that no device holds
# the model), the other over `tensor` (Megatron: heads and hidden units are cut, the width is summed). Activations: cut
# by batch.
RULES: Mapping[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "embed": ("fsdp",),  # width of the residual stream and of the diffusion head, channels of autoencoders
    "heads": ("tensor",),  # attention heads
    "mlp": ("tensor",),  # hidden units of the two-layer perceptrons
    "parts": (),  # maps side by side in one array: queries, keys, values; scale, shift, gate
}


def build(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh over all devices. Raises UserError with the arithmetic when the axes do not multiply to their number."""
    devices = jax.devices() if devices is None else devices
    sizes = {axis: getattr(config, axis) for axis in AXES}
    known = math.prod(n for n in sizes.values() if n != -1)
    if -1 in sizes.values() and known > 0 and len(devices) % known == 0:
        sizes = {axis: len(devices) // known if n == -1 else n for axis, n in sizes.items()}
    product = " x ".join(f"{axis}={n}" for axis, n in sizes.items())
    if min(sizes.values()) < 1 or math.prod(sizes.values()) != len(devices):
        raise UserError(f"mesh: {product} does not make {len(devices)} devices")
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def cache_programs(directory: Path) -> None:
    """Keep compiled programs in a directory, if it can be written, so that the next start need not compile them."""
    if jax.config.jax_compilation_cache_dir is None and places.writable(directory):
        jax.config.update("jax_compilation_cache_dir", str(directory.resolve()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


def check(config: Config, mesh: Mesh) -> None:
    """Raises UserError when a batch, the heads or a width cannot be cut as the table says."""
    model, size = config.model, dict(mesh.shape)
    rows = size["data"] * size["fsdp"]
    for name, value, parts in (
        ("batch_size / optim.accumulate", config.batch_size // config.optim.accumulate, rows),
        ("model.heads", model.heads, size["tensor"]),
        ("model.width", model.width, size["fsdp"]),
        ("model.width", model.width, size["tensor"]),
        ("model.head_width", model.head_width, size["fsdp"]),
        ("model.head_width", model.head_width, size["tensor"]),
    ):
        if value % parts:
            raise UserError(f"{name}={value} is not divisible by {parts} devices (mesh {size})")


def spec(*names: str | None) -> PartitionSpec:
    """The PartitionSpec of an array whose axes have these logical names (None: not cut)."""
    cut = [RULES[name] or None if name else None for name in names]
    used = [axis for axes in cut if axes for axis in axes]
    if len(used) != len(set(used)):
        raise ValueError(f"axes {names} would use a mesh axis twice: {used}")
    return PartitionSpec(*cut)


def sharding(mesh: Mesh, *names: str | None) -> NamedSharding:
    return NamedSharding(mesh, spec(*names))


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Pin an activation's axes to the mesh; outside a mesh (`jax.set_mesh`) nothing happens."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(*names))
