"""Table lookups, and embeddings of conditions: labels, text features, bytes, the published constant frame time."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lina_jax.config import TIME_FEATURES
from lina_jax.config_checks import PADDING_ROWS
from lina_jax.models.initializers import normal
from lina_jax.models.layers import MLP, Frozen, LayerNorm, Linear
from lina_jax.platforms import platform

WORD_LENGTH = 16  # bytes; a longer word is read as several
WORD_TAPS = 5  # of the convolutions over words


def look_up(table: jax.Array, ids: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Rows of a table (T, D), narrowed to `dtype`: ids (...) -> (..., D). Gradients are summed in float32.

    On accelerators the gradient is a matmul with a one-hot matrix. With JAX's own gradient, GPUs add rows in random
    order, so that no two runs are alike, and TPUs add them one after the other.
    """
    return _rows(table, ids, dtype) if platform() == "cpu" else _multiplied_rows(table, ids, dtype)


def _rows(table: jax.Array, ids: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return table[ids].astype(dtype)


_multiplied_rows = jax.custom_vjp(_rows, nondiff_argnums=(2,))


def _rows_gradient(dtype: jnp.dtype, kept: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, None]:
    table, ids = kept
    ones, axes = jax.nn.one_hot(ids.astype(jnp.int32), len(table), dtype=dtype), tuple(range(ids.ndim))
    exact = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    summed = jnp.tensordot(ones, gradient, (axes, axes), precision=exact, preferred_element_type=jnp.float32)
    return summed.astype(table.dtype), None


_multiplied_rows.defvjp(lambda table, ids, dtype: (_rows(table, ids, dtype), (table, ids)), _rows_gradient)


class TimeEmbed(nnx.Module):
    """The constant vector that published models add to every condition token (frame 0 of the video table); frozen."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        # Evaluated once per step on one row: float32 whatever the activations are.
        self.mlp = MLP(TIME_FEATURES, width, width, jax.nn.silu, rngs=rngs, dtype=jnp.float32, kind=Frozen)
        self.norm = LayerNorm(width, kind=Frozen)

    def __call__(self, frames: int = 1) -> jax.Array:
        """(frames, D); only tests of the published weights ask for more than one frame."""
        count = TIME_FEATURES // 2
        frequencies = 10_000.0 ** (-np.arange(count) / count)
        angles = np.outer(np.arange(frames), frequencies)
        features = jnp.asarray(np.concatenate([np.sin(angles), np.cos(angles)], axis=1), jnp.float32)
        with jax.default_matmul_precision("float32"):
            return self.norm(self.mlp(features))


class LabelEmbed(nnx.Module):
    """Class ids (B,) -> (B, 1, D). Row `num_classes` is the unconditional class."""

    def __init__(self, num_classes: int, width: int, *, rngs: nnx.Rngs):
        self.table = nnx.Param(normal()(rngs.params(), (num_classes + 1, width)), axes=(None, "embed"))
        self.norm = LayerNorm(width, kind=Frozen)

    def __call__(self, labels: jax.Array) -> jax.Array:
        return self.norm(look_up(self.table[...], labels, jnp.float32))[:, None]


class TextEmbed(nnx.Module):
    """Text features (B, L, D_text) and their lengths (B,) -> (B, L, D); rows past the length come from a fixed table.

    Length 0 is the unconditional prompt. The table is saved with the model and never trained. `learned` says that the
    features are learned with the model.
    """

    def __init__(self, text_dim: int, width: int, *, rngs: nnx.Rngs, dtype: jnp.dtype, learned: bool = False):
        self.padding = Frozen(normal()(rngs.params(), (PADDING_ROWS, text_dim)), axes=(None, None))
        self.proj = Linear(text_dim, width, (None, "embed"), rngs=rngs, dtype=dtype, between_features=learned)
        self.norm = LayerNorm(width, kind=Frozen)
        self.dtype = dtype

    def pad(self, features: jax.Array, lengths: jax.Array) -> jax.Array:
        """features (B, L, D_text), lengths (B,) -> (B, L, D_text), with the table's rows from each length on."""
        length = features.shape[1]
        present = jnp.arange(length)[None, :, None] < lengths[:, None, None]
        return jnp.where(present, features.astype(self.dtype), self.padding[:length].astype(self.dtype))

    def __call__(self, features: jax.Array, lengths: jax.Array) -> jax.Array:
        return self.norm(self.proj(self.pad(features, lengths)))


class ByteEncoder(nnx.Module):
    """Learned text features for runs without a pretrained encoder, one per word, for at most W words.

    Bytes (B, L) and lengths (B,) -> features (B, W, D_text) and their number (B,). Words end at spaces, or after
    WORD_LENGTH bytes. Bytes beyond W words are added to the last word.

    The blocks that read the features are blind to order, so the features contain it: a letter is its embedding times
    one of its place in the word, and a word is the scaled sum of its letters plus an embedding of its place in the
    text. Residual gated depthwise convolutions mix neighbouring words. Blocks normalise after each sum, so what differs
    between two captions must not drown in what they share. Therefore position embeddings are small, and gates replace
    one-sided activations, whose mean would be the same for all text.
    """

    def __init__(self, words: int, width: int, layers: int, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        def param(shape, std, **metadata):
            return nnx.Param(normal(std)(rngs.params(), shape), axes=(None,) * len(shape), **metadata)

        self.bytes = param((256, width), 1.0)
        self.places = param((WORD_LENGTH, width), 1.0)
        self.positions = param((words, width), 0.1)
        self.taps = param((layers, 2, WORD_TAPS, width), WORD_TAPS**-0.5)
        self.mix = param((layers, width, width), width**-0.5, matrix=((1,), (2,)), between_features=True)
        self.dtype = dtype

    def __call__(self, text: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
        words = len(self.positions[...])
        member, place = _spelling(text, lengths, words)
        letters = look_up(self.bytes[...], text, jnp.float32) * look_up(self.places[...], place, jnp.float32)
        letters = letters.astype(self.dtype)
        member = member.astype(self.dtype)
        # The square root gives long and short words the same scale.
        loudness = jax.lax.rsqrt(jnp.maximum(jnp.sum(member, axis=1), 1.0))[..., None]
        count = jnp.sum(jnp.any(member > 0, axis=1), axis=1, dtype=lengths.dtype)
        present = (jnp.arange(words)[None] < count[:, None])[..., None].astype(self.dtype)
        x = jnp.einsum("blw,bld->bwd", member, letters) * loudness + self.positions[...].astype(self.dtype)
        x = x * present
        for (signal, gate), mix in zip(
            self.taps[...].astype(self.dtype), self.mix[...].astype(self.dtype), strict=True
        ):
            x = (x + (_windowed(x, signal) * jax.nn.sigmoid(_windowed(x, gate))) @ mix) * present
        return x, count


def _spelling(text: jax.Array, lengths: jax.Array, words: int) -> tuple[jax.Array, jax.Array]:
    """Which word each byte belongs to, (B, L, W) bool, and its place in that word, (B, L) int32; text (B, L)."""
    index = jnp.arange(text.shape[1])
    letter = (text != ord(" ")) & (index < lengths[:, None])
    after_blank = letter & ~jnp.pad(letter, ((0, 0), (1, 0)))[:, :-1]
    place = (index - jax.lax.cummax(jnp.where(after_blank, index, 0), axis=1)) % WORD_LENGTH
    word = jnp.minimum(jnp.cumsum(letter & (place == 0), axis=1) - 1, words - 1)
    return letter[..., None] & (word[..., None] == jnp.arange(words)), place


def _windowed(x: jax.Array, taps: jax.Array) -> jax.Array:
    """Depthwise convolution of x (B, L, D) with taps (T, D), zero padding."""
    padded = jnp.pad(x, ((0, 0), (len(taps) // 2, len(taps) // 2), (0, 0)))
    return sum(padded[:, i : i + x.shape[1]] * tap for i, tap in enumerate(taps))
