"""The measurements of `benchmark attention`, `benchmark train` and `benchmark sample`: the programs that runs use."""

import contextlib
import dataclasses
import functools
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from lina_jax import (
    config_checks,
    decoding_schedule,
    errors,
    execution,
    flops,
    hlo,
    kernel_check,
    metrics,
    programs,
    roofline,
    state,
    timing,
    xla_flags,
)
from lina_jax import mesh as mesh_lib
from lina_jax.config import Config, MeshConfig, ModelConfig
from lina_jax.errors import UserError
from lina_jax.models import chunks, tiles
from lina_jax.models.attention import Attention, AttentionConfig
from lina_jax.programs import Compiled
from lina_jax.state import Program
from lina_jax.timing import Row

Tree = Any

SAMPLED = 4  # default number of images at once


def train(config: Config, batches: Sequence[int], runs: int) -> Iterator[Row]:
    """A row for each global batch size: the train step on cached latents and text features, which are noise here."""
    for size in batches or [config.batch_size]:
        config_checks.check_value("batch_size", size)
        with _out_of_memory_as_user_error(size):
            config = dataclasses.replace(config, batch_size=size)
            config_checks.check_run(config)
            yield _train(config, runs)


def _train(config: Config, runs: int) -> Row:
    mesh = mesh_lib.from_config(config)
    step = Training(config, mesh)
    (took,) = timing.in_turns({"train": step}, runs).values()
    if skipped := int(step.train_state.skipped):
        raise RuntimeError(
            f"{skipped} of {int(step.train_state.step)} steps were skipped: the loss or gradient was not finite"
        )
    needed = config.batch_size * flops.training_flops(config.model, config.loss)
    row = _named("train", config.model) | _settings(step.config, mesh)
    row["shapes"] = {"batch": config.batch_size, **_shapes(config.model), "loss_repeat": config.loss.repeat}
    row |= took.fields() | {"images_per_s": config.batch_size / took.median}
    row |= timing.efficiency(needed, took.median, _peak(config))
    most = chunks.max_count(config.batch_size // config.optim.accumulate * config.model.image_tokens)
    return row | _compiled(step.compiled, mesh.size, most) | timing.memory()


class Training:
    """A state and a batch of noise; each call runs one step and returns arrays to wait for."""

    def __init__(self, config: Config, mesh: Mesh):
        config = kernel_check.resolve_kernel(config, mesh)
        blueprint = state.make_blueprint(config, mesh)
        program, (shapes, batch) = programs.train_step(config, mesh)
        self.config = blueprint.config
        self.compiled = programs.compile_program(program, (shapes, batch), {})
        self.train_state = blueprint.init_from_weights(weights(shapes.params), weights(shapes.frozen))
        self._inputs = inputs(batch, config.model), *program.trailing

    def __call__(self) -> Tree:
        self.train_state, scalars = self.compiled.executable(self.train_state, *self._inputs)
        return self.train_state, scalars


def sample(config: Config, batches: Sequence[int], runs: int, *, autoencoder: bool) -> Iterator[Row]:
    """A row for each number of images: the sampler up to latents or, with the published autoencoder, to pixels.

    Parameters and text features are noise; prompts are not encoded. Raises UserError for an autoencoder that the model
    does not use.
    """
    if autoencoder and config.autoencoder.kind == "identity":
        raise UserError("--autoencoder: this model generates pixels and needs no autoencoder")
    default = mesh_lib.round_up_batch(mesh_lib.build(config.mesh), SAMPLED)
    for images in batches or [default]:
        config_checks.check_value("batch_size", images)
        with _out_of_memory_as_user_error(images):
            yield _sample(config, images, runs, autoencoder)


def _sample(config: Config, images: int, runs: int, autoencoder: bool) -> Row:
    mesh = _mesh_for(config, images)
    mesh_lib.check_model(config.model, mesh)
    config = kernel_check.resolve_kernel(config, mesh)
    resolved = execution.for_inference(config, mesh)
    call, compiled = sampling(config, mesh, images, autoencoder=autoencoder)
    (took,) = timing.in_turns({"sample": call}, runs).values()
    schedule = decoding_schedule.make_schedule(config)
    row = _named("sample", config.model) | _settings(resolved, mesh)
    row["shapes"] = {
        "batch": images, **_shapes(config.model), "steps": config.sample.steps,
        "euler_steps": config.sample.euler_steps, "guided": schedule.guided,
        "autoencoder": autoencoder,
    }  # fmt: skip
    row |= took.fields() | {"images_per_s": images / took.median}
    row |= timing.efficiency(images * flops.sampling_flops(config.model, schedule), took.median, _peak(config))
    return row | _compiled(compiled, mesh.size, float(schedule.euler_steps.mean())) | timing.memory()


def sampling(config: Config, mesh: Mesh, images: int, *, autoencoder: bool) -> tuple[Callable[[], Tree], Compiled]:
    """(a call that draws `images` images with weights of noise and returns arrays to wait for, its program)."""
    program, (params, frozen, *rest) = programs.sampling_step(config, mesh, images, autoencoder=autoencoder)
    compiled = programs.compile_program(program, (params, frozen, *rest), {})
    arguments = weights(params), weights(frozen), *inputs(rest, config.model), *map(weights, program.trailing)
    return functools.partial(compiled.executable, *arguments), compiled


@dataclasses.dataclass(frozen=True)
class AttentionSizes:
    """One attention layer of a decoder block, as in a model of square images."""

    tokens: int  # condition and image tokens, in the ratio 1 : 4
    width: int
    heads: int
    dtype: str
    kernel: str = "xla"

    def __post_init__(self):
        """Raises UserError for sizes that no such layer can have."""
        side = math.isqrt(self.tokens * 4 // 5)
        if self.tokens < 5 or 4 * self.tokens != 5 * side**2:
            raise UserError(f"--tokens={self.tokens}: expected s * s * 5 / 4 with s even, such as 320, 1280 or 5120")
        if self.width < 1 or self.heads < 1 or self.width % self.heads:
            raise UserError(f"--width={self.width} --heads={self.heads}: --width must be divisible by --heads")

    @property
    def model(self) -> ModelConfig:
        side = math.isqrt(self.tokens * 4 // 5)
        grids = {"image_grid": (side, side), "condition_grid": (side // 2, side // 2)}
        sizes = {"width": self.width, "heads": self.heads, "dtype": self.dtype}
        return ModelConfig(attention_kernel=self.kernel, **sizes, **grids)

    def layer(self, kind: str) -> AttentionConfig:
        """Its config: `linear` has the convolution and gates of the default model, `softmax` has neither."""
        model = self.model
        plain = AttentionConfig(
            self.width, self.heads, kind, condition_tokens=model.condition_tokens, grid=model.image_grid,
            dtype=self.dtype,
        )  # fmt: skip
        if kind == "softmax":
            return plain
        return dataclasses.replace(plain, conv_kernel=model.conv_kernel, gate=model.kv_gate, kernel=self.kernel)


def attention(sizes: AttentionSizes, batches: Sequence[int], runs: int) -> Iterator[Row]:
    """Rows of the linear attention layer (division, convolution, head-wise gates) and of softmax attention.

    For each number of sequences: the forward pass alone, then forward and backward. `of_X` is the speed relative to X
    in the same turn, `flops_of_X` the FLOPs relative to X.
    """
    kernel_check.check(sizes.model)
    for batch in batches or [1]:
        with _out_of_memory_as_user_error(batch):
            yield from _attention(sizes, batch, runs, backward=False)
            yield from _attention(sizes, batch, runs, backward=True)


def _attention(sizes: AttentionSizes, batch: int, runs: int, *, backward: bool) -> Iterator[Row]:
    model, compiled, calls = sizes.model, {}, {}
    for kind in ("linear", "softmax"):
        calls[kind], compiled[kind] = attention_layer(sizes, kind, batch, backward=backward)
    timings = timing.in_turns(calls, runs)
    needed = {
        kind: batch * (3 if backward else 1)
        * flops.attention_flops(model, sizes.tokens, softmax=kind == "softmax", conv=kind == "linear")
        for kind in calls
    }  # fmt: skip
    name = "attention" if backward else "attention_forward"
    for kind, took in timings.items():
        row = _named(name, dataclasses.replace(model, attention=kind))
        row |= timing.machine() | {"devices": 1, "dtype": sizes.dtype}
        row |= {"attention_kernel": _kernel(sizes.kernel if kind == "linear" else "xla")}
        row["shapes"] = {"batch": batch, "tokens": sizes.tokens, "width": sizes.width, "heads": sizes.heads}
        row |= took.fields() | {"tokens_per_s": batch * sizes.tokens / took.median}
        row |= timing.efficiency(needed[kind], took.median, metrics.peak_flops(Config()))
        if kind == "linear":
            theirs = timings["softmax"].seconds
            row |= {
                f"of_{name}_softmax": statistics.median(b / a for a, b in zip(took.seconds, theirs, strict=True)),
                f"flops_of_{name}_softmax": needed["linear"] / needed["softmax"],
            }
        yield row | _compiled(compiled[kind], 1) | timing.memory()


def attention_layer(
    sizes: AttentionSizes, kind: str, batch: int, *, backward: bool
) -> tuple[Callable[[], Tree], Compiled]:
    """(a call of one layer, its program); with `backward` it also computes gradients of parameters and inputs."""
    mesh, layer = mesh_lib.build(MeshConfig(), jax.devices()[:1]), sizes.layer(kind)
    module = nnx.eval_shape(lambda: Attention(layer, rngs=nnx.Rngs(0)))
    graphdef, variables = nnx.split(module)
    whole = mesh_lib.sharding(mesh)
    params = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole), nnx.to_pure_dict(variables)
    )
    x = jax.ShapeDtypeStruct((batch, layer.tokens, layer.width), layer.dtype, sharding=whole)

    def forward(params, x):
        return nnx.merge(graphdef, params)(x)

    def both(params, x, cotangent):
        y, gradients = jax.vjp(forward, params, x)
        return y, gradients(cotangent)

    function, arrays = (both, (x, x)) if backward else (forward, (x,))
    options = xla_flags.training_options(mesh.devices.flat[0].platform) if backward else {}
    compiled = programs.compile_program(Program(jax.jit(function), mesh), (params, *arrays), options)
    return functools.partial(compiled.executable, weights(params), *inputs(arrays, sizes.model)), compiled


def weights(shapes: Tree) -> Tree:
    """Noise for abstract parameters, with scales (of norms and gates) around one.

    This is like a trained model. At initialisation the head predicts zeros, and multiplying zeros takes less power,
    and on some devices less time, than multiplying other numbers.
    """

    def one(name: str, leaf: jax.ShapeDtypeStruct, noise: jax.Array) -> jax.Array:
        return 0.02 * noise + ("scale" in name)

    return _made(shapes, one)


def inputs(shapes: Tree, model: ModelConfig) -> Tree:
    """Noise for abstract moments, images and features; texts have full length, labels are valid."""

    def one(name: str, leaf: jax.ShapeDtypeStruct, noise: jax.Array) -> jax.Array:
        if name == "text_length":
            return jnp.full(leaf.shape, model.text_length)
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            return (jnp.abs(noise) * (model.num_classes if name == "label" else 128)) // 2
        return noise

    return _made(shapes, one)


def _made(shapes: Tree, one: Callable[[str, jax.ShapeDtypeStruct, jax.Array], jax.Array]) -> Tree:
    """A tree of arrays one(name, abstract array, noise), each created in its sharding."""

    def make():
        paths, structure = jax.tree.flatten_with_path(shapes)
        arrays = []
        for number, (path, leaf) in enumerate(paths):
            name = getattr(path[-1], "key", "") if path else ""
            arrays.append(one(name, leaf, _noise(leaf.shape, number)).astype(leaf.dtype))
        return structure.unflatten(arrays)

    return jax.jit(make, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, shapes))()


def _noise(shape: tuple[int, ...], number: int) -> jax.Array:
    """Uniform noise of mean 0 and variance 1, a hash of indices: for many arrays JAX's RNGs take minutes to compile."""
    bits = jnp.full(shape, number + 1, jnp.uint32)
    for axis in range(len(shape)):
        bits = (bits + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)) * jnp.uint32(0x9E3779B1)
        bits = (bits ^ (bits >> 15)) * jnp.uint32(0x85EBCA77)
    return 3**0.5 * (bits.astype(jnp.float32) * 2.0**-31 - 1)


def _named(name: str, model: ModelConfig) -> Row:
    """The name of a row; it includes the kind of attention unless that is linear."""
    return {"benchmark": name if model.attention == "linear" else f"{name}_{model.attention}"}


def _settings(config: Config, mesh: Mesh) -> Row:
    return timing.machine() | {
        "mesh": {axis: size for axis, size in mesh.shape.items() if size > 1},
        "dtype": config.model.dtype,
        **execution.choices_of(config.model),
        "attention_kernel": _kernel(config.model.attention_kernel),
    }


def _kernel(asked: str) -> str:
    """The kernel that runs: XLA's path on devices without kernels."""
    return asked if tiles.device() else "xla"


def _shapes(model: ModelConfig) -> Row:
    return {
        "text_tokens": model.prompt_tokens,
        "condition_tokens": model.condition_tokens,
        "image_tokens": model.image_tokens,
        "width": model.width,
        "heads": model.heads,
        "blocks": [model.condition_depth, *model.halves],
        "head_width": model.head_width,
        "head_depth": model.head_depth,
    }


def _compiled(compiled: Compiled, devices: int, unknown_trips: float = 1.0) -> Row:
    """Figures of the compiled program: FLOPs over all devices, bytes per device."""
    work = roofline.count(hlo.Module(compiled.text), unknown_trips=unknown_trips)
    return {
        "compiled_flops": devices * work.matmul_flops,
        "compiled_bytes": work.traffic,
        "program_bytes": compiled.total,
        "compile_s": compiled.seconds,
    }


def _mesh_for(config: Config, batch: int) -> Mesh:
    mesh = mesh_lib.build(config.mesh)
    parts = mesh_lib.batch_parts(mesh)
    if batch % parts:
        raise UserError(f"batch {batch} is not divisible by {parts}, the batch shards of the mesh (--batches)")
    return mesh


@contextlib.contextmanager
def _out_of_memory_as_user_error(batch: int) -> Iterator[None]:
    """Raises UserError if a program does not fit into the devices' memory."""
    try:
        yield
    except programs.OutOfMemory as error:
        raise UserError(f"batch {batch} does not fit: {error}") from error
    except jax.errors.JaxRuntimeError as error:
        if not (line := errors.exhausted(error)):
            raise
        raise UserError(f"batch {batch} does not fit: {line}") from error


def _peak(config: Config) -> float:
    return metrics.peak_flops(config) * jax.device_count()
