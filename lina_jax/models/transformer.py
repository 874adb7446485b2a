"""Transformer blocks, and stacks of them that are scanned or unrolled."""

import dataclasses
import functools
from itertools import groupby

import jax
import jax.numpy as jnp
from flax import nnx

from lina_jax.config import is_softmax_block
from lina_jax.mesh import RULES, batch_parts, constrain, gathered
from lina_jax.models.attention import CONVOLUTION, Attention, AttentionConfig, Select
from lina_jax.models.initializers import Keys
from lina_jax.models.layers import MLP, LayerNorm, gelu, over_variables
from lina_jax.platforms import loops_gather_late


class Block(nnx.Module):
    """Residual post-norm block: x + LN(attention(x)), then x + LN(mlp(x)); the stream itself is never normalised."""

    def __init__(self, config: AttentionConfig, mlp_ratio: int, *, rngs: nnx.Rngs):
        self.attention = Attention(config, rngs=rngs)
        self.norm1 = LayerNorm(config.width)
        self.mlp = MLP(config.width, mlp_ratio * config.width, config.width, gelu, rngs=rngs, dtype=config.dtype)
        self.norm2 = LayerNorm(config.width)

    def __call__(
        self, x: jax.Array, *,
        valid: jax.Array | None = None, angles: jax.Array | None = None, select: Select | None = None,
    ) -> jax.Array:  # fmt: skip
        """x (B, N, D) -> (B, N, D), or (B, K, D) of the tokens that `select` chooses; arguments as in Attention."""
        change = self.attention(x, valid=valid, angles=angles, select=select)
        tokens = None if select else "tokens"
        x = constrain((select(x) if select else x) + self.norm1(change), "batch", tokens, None)
        return constrain(x + self.norm2(self.mlp(x)), "batch", tokens, None)


REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(CONVOLUTION),
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
}


# Inside overlap_grad_reduction(True), a layer's gradients are reduced between GPU nodes during the backward passes of
# REDUCTION_LAG other layers.
overlap_grad_reduction = jax.make_user_context(default_value=False)
REDUCTION_LAG = 3


def apply_layers(
    body, x: jax.Array, layers: nnx.Module, *, scan: bool, remat: str, ahead: bool | None = None, last=None
) -> jax.Array:
    """Apply stacked `layers` (every array has a leading layer axis) to x one after the other: x = body(x, layer).

    `last` replaces `body` in the last layer; its result may have another shape. A scan compiles many layers in the time
    of one; unrolled, a few run faster where a loop's saved residuals are copied (CPUs). With `ahead`, a scan gathers
    the matrices that read the residual stream an iteration before they are used, and keeps them for the backward pass.
    None means: on TPUs with `fsdp`, unless remat is "full" (which asks for memory, not speed).
    """
    if ahead is None:
        ahead = loops_gather_late() and remat != "full"
    ahead = ahead and scan
    prepared = functools.partial(_prepared, chosen=_written_back if ahead else _is_matrix, remat=remat)
    # A scan needs no barriers against common subexpressions; the last layer runs outside of it.
    step, final = prepared(body, prevent_cse=not scan), last and prepared(last, prevent_cse=True)
    if ahead:
        return _gathering_ahead(step, x, layers, final)
    if scan and final is None:
        return jax.lax.scan(lambda x, layer: (step(x, layer), None), x, layers)[0]
    count = jax.tree.leaves(layers)[0].shape[0]
    steps = count if final is None else count - 1

    def layer(i):
        return jax.tree.map(lambda leaf: leaf[i], layers)

    if scan:  # by index, because slicing the layers would copy them
        x = jax.lax.scan(lambda x, i: (step(x, layer(i)), None), x, jnp.arange(steps))[0]
        return final(x, layer(steps))
    unrolled = [layer(i) for i in range(count)]
    for i in range(steps):
        later = i + REDUCTION_LAG
        if overlap_grad_reduction.value and later < count:
            x, unrolled[later] = _wait_for_reduction(x, unrolled[later])
        x = step(x, unrolled[i])
    return x if final is None else final(x, unrolled[-1])


def _prepared(body, *, chosen, remat: str, prevent_cse: bool):
    """`body` that gathers the `chosen` variables of a layer, rematerialised as `remat` says."""
    body = _gathering(body, chosen)
    if remat == "none":
        return body
    return jax.checkpoint(body, policy=REMAT_POLICIES[remat], prevent_cse=prevent_cse)


def _wait_for_reduction(x: jax.Array, layer: nnx.Module) -> tuple[jax.Array, nnx.Module]:
    """x and a later `layer`, unchanged; the gradient of x waits for the sum of the layer's gradients.

    XLA:GPU would leave all sums between nodes to the end of the backward pass, where no computation hides them.
    """
    graph, matrices, rest = nnx.split(layer, _is_matrix, ...)

    @jax.custom_vjp
    def together(x, matrices):
        return x, matrices

    together.defvjp(lambda *both: (both, None), lambda _, gradients: jax.lax.optimization_barrier(gradients))
    x, matrices = together(x, matrices)
    return x, nnx.merge(graph, matrices, rest)


def _gathering(body, chosen):
    """`body` that first gathers the `chosen` variables of a layer.

    Left to choose, XLA's partitioner exchanges tokens instead where an image has few (c2i's condition encoder). That is
    slow, and on meshes of batch x fsdp x tensor it gave wrong gradients (jax 0.10 and 0.12; tests/test_mesh.py).
    """

    def step(x, layer):
        graph, matrices, rest = nnx.split(layer, chosen, ...)
        return body(x, nnx.merge(graph, _gathered(matrices, x.dtype), rest))

    return step


def _is_matrix(_, variable: nnx.Variable) -> bool:
    return "matrix" in variable.get_metadata()


def _reads_the_stream(_, variable: nnx.Variable) -> bool:
    return _is_matrix(_, variable) and variable.get_metadata("axes")[0] == "embed"


def _written_back(_, variable: nnx.Variable) -> bool:
    return _is_matrix(_, variable) and not _reads_the_stream(_, variable)


def _gathered(matrices: nnx.State, dtype: jnp.dtype) -> nnx.State:
    """Matrices of a layer, gathered over `fsdp`, in the stream's `dtype` if that is narrower than theirs."""

    def whole(variable: nnx.Variable) -> nnx.Variable:
        value = variable[...]
        if value.dtype.itemsize > jnp.dtype(dtype).itemsize:
            value = value.astype(dtype)
        return variable.replace(gathered(value, *variable.get_metadata("axes")))

    return over_variables(whole, matrices)


def _gathering_ahead(step, x: jax.Array, layers: nnx.Module, last) -> jax.Array:
    """The scan of `step`, where each iteration gathers the next one's matrices that read the residual stream.

    A layer would have to wait for these; gathers of its other matrices overlap with its matmuls. Gathering all of them
    ahead is slower and keeps more (docs/experiments.md). Without a separate `last` layer, the last iteration gathers
    the first layer's matrices again, for nothing.
    """
    graph, first_used, rest = nnx.split(layers, _reads_the_stream, ...)

    def iteration(carried, layer):
        x, weights = carried
        following, rest = layer
        return (step(x, nnx.merge(graph, weights, rest)), _gathered(following, x.dtype)), None

    start = _gathered(jax.tree.map(lambda leaf: leaf[0], first_used), x.dtype)
    if last is None:
        following = jax.tree.map(lambda leaf: jnp.roll(leaf, -1, axis=0), first_used)
        return jax.lax.scan(iteration, (x, start), (following, rest))[0][0]
    others = jax.tree.map(lambda leaf: leaf[1:], first_used), jax.tree.map(lambda leaf: leaf[:-1], rest)
    (x, weights), _ = jax.lax.scan(iteration, (x, start), others)
    return last(x, nnx.merge(graph, weights, jax.tree.map(lambda leaf: leaf[-1], rest)))


def gather_unstacked(model: nnx.Module) -> nnx.Module:
    """The model with the variables outside its stacks gathered over `fsdp`.

    In stacks, layers gather matrices where they use them, and `copy_per_image` gathers all other variables.
    """
    graph, state = nnx.split(model)

    def gather(variable: nnx.Variable) -> nnx.Variable:
        value, names = variable.get_value(), variable.get_metadata("axes")
        return variable if _is_stacked(variable) else variable.replace(gathered(value, *names))

    return nnx.merge(graph, over_variables(gather, state))


def copy_per_image(model: nnx.Module, images: int) -> nnx.Module:
    """The model with a copy per image of the variables in its stacks, except matrices: (L, ...) -> (L, B, 1, ...).

    Layers then see biases, norms, learned gates and convolutions with leading axes (B, 1), which broadcast over tokens.
    Each device sums the gradients of its copies over the tokens of its own images. The sum over images, the transpose
    of copying, comes once for all layers, and in float32. Without copies, each layer waits for a small all-reduce (as
    it still does over the shards of a sequence). If batches are not sharded, the model stays as it is.
    """
    if batch_parts(jax.sharding.get_abstract_mesh()) == 1:
        return model
    graph, state = nnx.split(model)

    def copy(variable: nnx.Variable) -> nnx.Variable:
        if not _is_stacked(variable) or _is_matrix((), variable):
            return variable
        names = variable.get_metadata("axes")
        value = gathered(variable.get_value(), None, *names)
        value = jnp.broadcast_to(value[:, None, None], (len(value), images, 1, *value.shape[1:]))
        whole = (None if "fsdp" in RULES.get(name, ()) else name for name in names)
        return variable.replace(constrain(value, None, "batch", None, *whole))

    return nnx.merge(graph, over_variables(copy, state))


def _is_stacked(variable: nnx.Variable) -> bool:
    return variable.get_value().ndim > len(variable.get_metadata("axes"))


def stacked(make, count: int, rngs: nnx.Rngs) -> nnx.Module:
    """`count` modules from make(keys) as one whose arrays have a leading layer axis; `rngs` may be Keys, too."""

    @nnx.vmap(in_axes=0, out_axes=0)
    def build(key):
        return make(Keys(key))

    return build(jax.random.split(rngs.params(), count))


def layer_runs(first: int, depth: int, softmax_period: int) -> list[tuple[str, bool, range]]:
    """Runs of blocks of one kind: (name, whether they are a hybrid's softmax blocks, their indices)."""
    runs = []
    for softmax, members in groupby(range(first, first + depth), lambda i: is_softmax_block(i, softmax_period)):
        layers = list(members)
        runs.append((f"from_{layers[0]:02d}", softmax, range(layers[0], layers[-1] + 1)))
    return runs


class Transformer(nnx.Module):
    """Blocks `first` .. `first + depth - 1` of a stack; runs of one kind are stacked, then scanned or unrolled.

    With `softmax_period` > 0, plain softmax blocks are among them (hybrid attention, `is_softmax_block`).
    """

    def __init__(
        self,
        config: AttentionConfig,
        depth: int,
        mlp_ratio: int,
        *,
        first: int = 0,
        softmax_period: int = 0,
        remat: str = "none",
        scan: bool = True,
        rngs: nnx.Rngs,
    ):
        softmax = dataclasses.replace(config, kind="softmax", conv_kernel=0, gate="none")

        def make(is_softmax):
            return lambda rngs: Block(softmax if is_softmax else config, mlp_ratio, rngs=rngs)

        runs = {
            name: stacked(make(is_softmax), len(layers), rngs)
            for name, is_softmax, layers in layer_runs(first, depth, softmax_period)
        }
        self.names = tuple(runs)  # in order; nnx sorts names as texts, where 100 comes before 98
        self.runs = nnx.Dict(runs)
        self.scan, self.remat = scan, remat

    def __call__(
        self, x: jax.Array, *,
        valid: jax.Array | None = None, angles: jax.Array | None = None, select: Select | None = None,
    ) -> jax.Array:  # fmt: skip
        """x (B, N, D) -> (B, N, D); `valid` and `angles` as in Attention.

        With `select`, the result is (B, K, D), the tokens that it chooses; the last block computes no others.
        """

        def body(x, block):
            return block(x, valid=valid, angles=angles)

        def last(x, block):
            return block(x, valid=valid, angles=angles, select=select)

        for name in self.names:
            final = last if select and name == self.names[-1] else None
            x = apply_layers(body, x, self.runs[name], scan=self.scan, remat=self.remat, last=final)
        return x
