"""The state of a run, what is known about it before any array exists, and how it begins."""

import dataclasses
import functools
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding

from lina_jax import execution, optim, xla_flags
from lina_jax import mesh as mesh_lib
from lina_jax.config import Config, ModelConfig
from lina_jax.encoders import Encoders
from lina_jax.mesh import constrain, gathered
from lina_jax.models.draws import root_key
from lina_jax.models.initializers import Keys
from lina_jax.models.layers import Frozen, over_variables
from lina_jax.models.lina import LINA, Condition

Tree = Any
KeyPath = tuple[str, ...]  # the path of an array in a tree
# A global batch of B examples, by name: moments (B, 2C, h, w) float16 or image (B, H, W, 3) uint8; label (B,) int32, or
# text_length (B,) int32 and text: UTF-8 bytes (B, L) uint8, token ids (B, L) int32 or features (B, L, D) float16.
Batch = dict[str, jax.Array]
INITIAL, VALIDATION = np.uint32(2**32 - 2), np.uint32(2**32 - 1)  # keys that no training step has


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
    """The state after `step` batches.

    `step` counts batches consumed: it addresses data and randomness, and names checkpoints. `updates` counts updates
    applied: it drives the learning rate, Adam and the EMA. The difference is `skipped`, the number of skipped steps;
    `skipped_in_a_row` counts those since the last update.
    """

    step: jax.Array  # () int32, like the three other counters
    updates: jax.Array
    skipped: jax.Array
    skipped_in_a_row: jax.Array
    params: Tree  # float32
    frozen: Tree  # float32: arrays of the model that are not trained
    opt_state: Tree  # optax's; moments are sharded like their parameters
    ema: Tree  # like params


@dataclasses.dataclass(frozen=True)
class Blueprint:
    """What is known about a run before any array exists; initialisation, steps and restoring share its shardings."""

    config: Config
    mesh: Mesh
    graphdef: nnx.GraphDef
    inference_graphdef: nnx.GraphDef
    optimizer: optax.GradientTransformation
    shapes: TrainState  # of jax.ShapeDtypeStruct, with shardings
    encoders: Encoders  # frozen ones that the run itself uses, not part of its state

    @property
    def shardings(self) -> TrainState:
        return jax.tree.map(lambda leaf: leaf.sharding, self.shapes)

    def model(self, params: Tree, frozen: Tree) -> LINA:
        return nnx.merge(self.graphdef, params, frozen)

    def inference(self, params: Tree, frozen: Tree) -> LINA:
        """The model, with layers run as suits programs without gradients (`execution.for_inference`)."""
        return nnx.merge(self.inference_graphdef, params, frozen)

    def sampling_params(self, params: Tree, frozen: Tree) -> Tree:
        """The parameters as sampling programs read them, many times over.

        Matrices of stacks are in the model's dtype. Those of the head's stack, which every Euler step reads, are also
        whole along `fsdp`: computing such a step takes less time than gathering them.
        """
        dtype = jnp.dtype(self.config.model.dtype)

        def narrow(path: KeyPath, variable: nnx.Variable) -> jax.Array:
            value, metadata = variable.get_value(), variable.get_metadata()
            if value.ndim == len(metadata["axes"]) or "matrix" not in metadata:
                return value
            axes = None, *metadata["axes"]
            if value.dtype != dtype:  # else no copy: the caller's own array
                value = constrain(value.astype(dtype), *axes)
            return gathered(value, *axes) if path[0] == "head" else value

        variables = nnx.to_flat_state(nnx.state(self.model(params, frozen), nnx.Param))
        return unflatten_dict({path: narrow(path, variable) for path, variable in variables})

    def condition(self, weights: Tree, batch: Batch) -> Condition:
        """What the model is conditioned on; captions given as token ids go through the frozen text encoder."""
        if self.config.model.condition == "class":
            return {"label": batch["label"]}
        text = batch["text"]
        if self.encoders.text and jnp.issubdtype(text.dtype, jnp.integer):
            text = self.encoders.text.features(weights["text"], text)
        return {"text": text, "text_length": batch["text_length"]}

    def init(self) -> TrainState:
        """A fresh state, each array created directly in its shards."""
        make = functools.partial(_initial_state, self.config, self.optimizer)
        return self._once(make, self.shardings, key_of(self.config, INITIAL))

    def init_arrays(self, paths: Collection[KeyPath]) -> dict[KeyPath, jax.Array]:
        """Only these arrays of a fresh state, trained or frozen; the others are not created."""
        shapes = flatten_dict(self.shapes.params) | flatten_dict(self.shapes.frozen)

        def make(key):
            params, frozen = _initial_weights(self.config, key)
            drawn = flatten_dict(params) | flatten_dict(frozen)
            return {path: drawn[path] for path in paths}

        shardings = {path: shapes[path].sharding for path in paths}
        return self._once(make, shardings, key_of(self.config, INITIAL))

    def init_from_weights(self, params: Tree, frozen: Tree) -> TrainState:
        """A fresh state with these weights, which are donated to it."""
        make = functools.partial(fresh_state, optimizer=self.optimizer)
        return self._once(make, self.shardings, params, frozen, donate_argnums=(0, 1))

    def _once(self, make: Callable, shardings: Tree, *args, **options) -> Tree:
        """The result of `make`, compiled as a program that runs once."""
        quickly = xla_flags.init_options(self.mesh.devices.flat[0].platform)
        with jax.set_mesh(self.mesh):
            return jax.jit(make, out_shardings=shardings, compiler_options=quickly, **options)(*args)

    def jit(self, function: Callable, *trailing, **options) -> "Program":
        """`jax.jit` under this run's mesh; the arguments `trailing` are appended to those of each call."""
        return Program(jax.jit(function, **options), self.mesh, trailing)


@dataclasses.dataclass(frozen=True)
class Program:
    """A jitted function that is called, or lowered for abstract arguments, under a mesh."""

    jitted: Callable
    mesh: Mesh
    trailing: tuple = ()  # arguments appended to those of each call

    def __call__(self, *args):
        with jax.set_mesh(self.mesh):
            return self.jitted(*args, *self.trailing)

    def compile(self, *args) -> None:
        """Compile for these arguments, so that a call with them runs at once."""
        self.lower(*args).compile()

    def lower(self, *args) -> jax.stages.Lowered:
        with jax.set_mesh(self.mesh):
            return self.jitted.lower(*args, *self.trailing)


def make_blueprint(config: Config, mesh: Mesh, encoders: Encoders | None = None) -> Blueprint:
    """The blueprint of a run; its config says how layers run (`execution.resolve`).

    `encoders` are the frozen autoencoder and text encoder, of runs that train on pixels or captions, or draw images.
    """
    encoders = encoders or Encoders()
    inference = execution.for_inference(config, mesh)
    config = execution.resolve(config, mesh, mesh_lib.device_bytes(encoders.weights))
    graphdef, params, frozen = _abstract(config.model)
    inference_graphdef = graphdef if inference.model == config.model else _abstract(inference.model)[0]

    def with_sharding(variable):
        shape = variable.get_value().shape
        axes = variable.get_metadata("axes")
        axes = (None,) * (len(shape) - len(axes)) + tuple(axes)  # stacked layers have a leading axis, never sharded
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=mesh_lib.sharding(mesh, *axes))

    def tree_of(function, state):
        return nnx.to_pure_dict(over_variables(function, state))

    decayed = tree_of(lambda v: v.get_metadata().get("decay", True), params)
    axes = tree_of(_matrix_axes, params)
    matrices = dict(jax.tree.leaves_with_path(axes, is_leaf=lambda leaf: isinstance(leaf, tuple)))
    optimizer = optim.optimizer(config.optim, config.steps, decayed, matrices)
    params, frozen = tree_of(with_sharding, params), tree_of(with_sharding, frozen)
    shapes = _state_shapes(optimizer, params, frozen, mesh)
    return Blueprint(config, mesh, graphdef, inference_graphdef, optimizer, shapes, encoders)


def _abstract(model: ModelConfig) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    return nnx.split(nnx.eval_shape(lambda: LINA(model, rngs=nnx.Rngs(0))), nnx.Param, Frozen)


def _matrix_axes(variable: nnx.Variable) -> tuple | None:
    """(contracted axes, output axes) of a map between features, stacked or not; None for any other array."""
    metadata = variable.get_metadata()
    if not metadata.get("between_features"):
        return None
    stacked = len(variable.get_value().shape) - len(metadata["axes"])
    return tuple(tuple(axis + stacked for axis in axes) for axes in metadata["matrix"])


def _state_shapes(optimizer, params: Tree, frozen: Tree, mesh: Mesh) -> TrainState:
    replicated = NamedSharding(mesh, jax.sharding.PartitionSpec())
    count = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated)
    at = {path: leaf.sharding for path, leaf in jax.tree.leaves_with_path(params)}

    def placed(path, leaf):
        # Moments are sharded like their parameters, whose paths are the ends of theirs.
        sharding = next((at[path[i:]] for i in range(len(path)) if path[i:] in at), replicated)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    opt_state = jax.tree.map_with_path(placed, jax.eval_shape(optimizer.init, params))
    return TrainState(count, count, count, count, params, frozen, opt_state, params)


def key_of(config: Config, purpose: jax.Array | np.uint32) -> jax.Array:
    """The random key of a run for a training step, or for one of the purposes INITIAL and VALIDATION."""
    return jax.random.fold_in(root_key(config.seed), purpose)


def _initial_weights(config: Config, key: jax.Array) -> tuple[Tree, Tree]:
    _, params, frozen = nnx.split(LINA(config.model, rngs=Keys(key)), nnx.Param, Frozen)
    return nnx.to_pure_dict(params), nnx.to_pure_dict(frozen)


def _initial_state(config: Config, optimizer, key: jax.Array) -> TrainState:
    return fresh_state(*_initial_weights(config, key), optimizer)


def fresh_state(params: Tree, frozen: Tree, optimizer: optax.GradientTransformation) -> TrainState:
    """The state of a run that starts from these weights."""
    zero = functools.partial(jnp.zeros, (), jnp.int32)
    return TrainState(
        zero(), zero(), zero(), zero(), params, frozen, optimizer.init(params), jax.tree.map(jnp.copy, params)
    )
