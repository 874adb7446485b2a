"""The real train step and sampling program, compiled for devices that may be absent."""

import dataclasses
import functools
import re
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from lina_jax import encoders, generate, state, training_step
from lina_jax import mesh as mesh_lib
from lina_jax.config import Config
from lina_jax.encoders import Autoencoder, Encoders
from lina_jax.errors import UserError, first_line
from lina_jax.models import vae
from lina_jax.state import Blueprint, Program

Tree = Any


class OutOfMemory(Exception):
    """The compiler reports that a program does not fit; `needed` and `capacity` are bytes per device."""

    def __init__(self, needed: float, capacity: float):
        super().__init__(f"{needed / 2**30:.2f} GiB of {capacity / 2**30:.2f} GiB")
        self.needed, self.capacity = needed, capacity


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled program, its text and its memory; all bytes are per device."""

    text: str
    arguments: int
    temporaries: int
    outputs: int  # without those that reuse the memory of arguments
    seconds: float  # for lowering and compiling
    executable: jax.stages.Compiled

    @property
    def total(self) -> int:
        return self.arguments + self.temporaries + self.outputs


def train_step(config: Config, mesh: Mesh) -> tuple[Program, tuple]:
    """The step and its abstract arguments: the state, and a batch of cached latents and text features."""
    blueprint = state.make_blueprint(config, mesh)
    return training_step.make_train_step(blueprint), (blueprint.shapes, batch(config, mesh))


def sampling_step(config: Config, mesh: Mesh, images: int, *, autoencoder: bool = True) -> tuple[Program, tuple]:
    """The sampler for `images` images, with the autoencoder if its latents need one, and its abstract arguments.

    Texts are given as features: encoding prompts is separate work, done once for many images.
    """
    blueprint = state.make_blueprint(config, mesh, abstract_encoders(config, mesh) if autoencoder else Encoders())
    whole = mesh_lib.sharding(mesh)
    numbers = jax.ShapeDtypeStruct((images,), jnp.int32, sharding=mesh_lib.sharding(mesh, "batch"))
    seed = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    arguments = (blueprint.shapes.ema, blueprint.shapes.frozen, condition(config, mesh, images), numbers, seed)
    return generate.make_sampler(blueprint, config.sample), arguments


def batch(config: Config, mesh: Mesh) -> Tree:
    """An abstract batch like those of `data.open_records`: moments (pixels without an autoencoder) and conditions."""
    model, size = config.model, config.batch_size
    array = functools.partial(_batched, mesh, size)
    if config.autoencoder.kind == "identity":
        data = {"image": array((*model.latent_size, 3), jnp.uint8)}
    else:
        data = {"moments": array((2 * model.latent_channels, *model.latent_size), jnp.float16)}
    return data | condition(config, mesh, size)


def condition(config: Config, mesh: Mesh, size: int) -> Tree:
    """Abstract labels, bytes or text features of `size` images."""
    model, array = config.model, functools.partial(_batched, mesh, size)
    if model.condition == "class":
        return {"label": array((), jnp.int32)}
    if model.text_encoder == "bytes":
        return {"text": array((model.text_length,), jnp.uint8), "text_length": array((), jnp.int32)}
    text = array((model.text_length, model.text_dim), jnp.float16)
    return {"text": text, "text_length": array((), jnp.int32)}


def abstract_encoders(config: Config, mesh: Mesh) -> Encoders:
    """The published autoencoder of the config's kind, with abstract weights, sharded as by `load_encoders`."""
    kind = config.autoencoder.kind
    if kind == "identity":
        return Encoders()
    sizes = dataclasses.replace(vae.PUBLISHED[kind], latent_channels=config.model.latent_channels)
    dtype = config.model.dtype
    module = nnx.eval_shape(lambda: vae.AutoencoderKL(sizes, rngs=nnx.Rngs(0), dtype=jnp.dtype(dtype)))
    graphdef, weights = encoders.abstract(module, mesh, dtype)
    return Encoders(Autoencoder(sizes, graphdef), None, config.autoencoder.tile, {"autoencoder": weights})


def compile_program(program: Program, arguments: tuple, options: Mapping[str, object]) -> Compiled:
    """Compile. Raises OutOfMemory if the program does not fit, UserError if the compiler refuses it otherwise."""
    start = time.monotonic()
    lowered = program.lower(*arguments)
    try:
        compiled = lowered.compile(compiler_options=dict(options))
    except jax.errors.JaxRuntimeError as error:
        if match := re.search(r"memory space vmem\. Used (\S+) of (\S+) vmem", str(error)):
            raise UserError(
                f"the program needs {match[1]} of {match[2]} on-chip memory (vmem): compiler flags ask for too much "
                "(lina_jax/xla_flags.py, LIBTPU_INIT_ARGS)"
            ) from None
        raise _out_of_memory(str(error)) or UserError(
            f"the compiler refuses the program: {first_line(error)}"
        ) from error
    memory = compiled.memory_analysis()
    return Compiled(
        compiled.as_text(),
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.output_size_in_bytes - memory.alias_size_in_bytes,
        time.monotonic() - start,
        compiled,
    )


def _out_of_memory(message: str) -> OutOfMemory | None:
    """Parses 'Used 19.75G of 15.75G hbm' or '... (143.31G) exceeds available HBM (95.74G)'; None for other messages."""
    number = r"([\d.]+)([KMGTP]?)"
    match = re.search(rf"Used {number} of {number} hbm", message)
    match = match or re.search(rf"\({number}\) exceeds available HBM \({number}\)", message)
    if not match:
        return None
    unit = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, "P": 2**50}
    return OutOfMemory(float(match[1]) * unit[match[2]], float(match[3]) * unit[match[4]])


def state_bytes(blueprint: Blueprint) -> dict[str, int]:
    """Bytes per device of the state, by kind."""
    shapes = blueprint.shapes
    return {
        "params": mesh_lib.device_bytes(shapes.params) + mesh_lib.device_bytes(shapes.frozen),
        "optimizer": mesh_lib.device_bytes(shapes.opt_state),
        "ema": mesh_lib.device_bytes(shapes.ema),
    }


def _batched(mesh: Mesh, size: int, shape: tuple[int, ...], dtype) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((size, *shape), dtype, sharding=mesh_lib.sharding(mesh, "batch"))
