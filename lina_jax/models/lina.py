"""LINA: condition encoder, encoder half over visible tokens, decoder half over all, diffusion head (paper section 3).

Images enter as patchified tokens (B, N, p*p*C). A condition is a dict: {"label": (B,)}, or {"text": (B, L) bytes or
(B, L, D_text) features, "text_length": (B,)}.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from lina_jax.config import ModelConfig
from lina_jax.mesh import constrain
from lina_jax.models import chunks, flow, sequence
from lina_jax.models.attention import AttentionConfig
from lina_jax.models.draws import Draws
from lina_jax.models.embeddings import ByteEncoder, LabelEmbed, TextEmbed, TimeEmbed, look_up
from lina_jax.models.head import DiffusionHead
from lina_jax.models.initializers import normal
from lina_jax.models.layers import (
    Frozen,
    LayerNorm,
    Linear,
    broadcast_f32_grad,
    grid_positions,
    position_table,
    rotary_angles,
)
from lina_jax.models.transformer import Transformer
from lina_jax.platforms import one_cpu

Condition = dict[str, jax.Array]


class LINA(nnx.Module):
    """The whole network: `loss` trains, `token_losses` validates; `encode_condition`, `encode_image`, `head` sample."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        dtype = self.dtype = jnp.dtype(c.dtype)
        plain = AttentionConfig(
            width=c.width,
            heads=c.heads,
            kind="softmax" if c.attention == "softmax" else "linear",
            kernel=c.attention_kernel,
            normalization=c.normalization,
            condition_tokens=c.condition_tokens,
            grid=c.image_grid,
            dtype=dtype,
        )
        gated = plain
        if c.attention != "softmax":
            gated = dataclasses.replace(plain, conv_kernel=c.conv_kernel if c.depthwise_conv else 0, gate=c.kv_gate)

        def stack(kind, depth, first=0):
            return Transformer(
                kind,
                depth,
                c.mlp_ratio,
                first=first,
                softmax_period=c.hybrid_period,
                remat=c.remat,
                scan=c.scan_layers,
                rngs=rngs,
            )

        if c.condition == "class":
            self.label_embed = LabelEmbed(c.num_classes, c.width, rngs=rngs)
        else:
            learned = c.text_encoder == "bytes"
            self.text_embed = TextEmbed(c.text_dim, c.width, rngs=rngs, dtype=dtype, learned=learned)
            if learned:
                self.byte_encoder = ByteEncoder(c.text_words, c.text_dim, c.byte_layers, rngs=rngs, dtype=dtype)
        self.bos_token = nnx.Param(normal()(rngs.params(), (c.width,)), axes=(None,))
        self.mask_token = nnx.Param(normal()(rngs.params(), (c.width,)), axes=(None,))
        if not c.rotary:
            self.time_embed = TimeEmbed(c.width, rngs=rngs)
        # Published checkpoints carry the video model's patch embedding; still images never use it.
        self.video_patch_embed = Linear(4 * c.token_dim, c.width, (None, "embed"), rngs=rngs, dtype=dtype, kind=Frozen)
        self.condition_encoder = stack(plain, c.condition_depth)
        self.condition_norm = LayerNorm(c.width)
        self.patch_embed = Linear(c.token_dim, c.width, (None, "embed"), rngs=rngs, dtype=dtype, between_features=False)
        encoders, decoders = c.halves
        self.encoder = stack(plain, encoders)
        self.decoder = stack(gated, decoders, first=encoders)
        self.image_norm = LayerNorm(c.width)
        self.head = DiffusionHead(
            c.token_dim,
            c.width,
            c.head_width,
            c.head_depth,
            rngs=rngs,
            dtype=dtype,
            remat=c.remat,
            scan=c.scan_layers,
        )

    def embed_condition(self, condition: Condition) -> tuple[jax.Array, jax.Array | None]:
        """Condition tokens (B, L, D) and which of them are attended to (B, L), None for all."""
        if self.config.condition == "class":
            return self.label_embed(condition["label"]).astype(self.dtype), None
        text, lengths = condition["text"], condition["text_length"]
        if self.config.text_encoder == "bytes":
            text, lengths = self.byte_encoder(text, lengths)
        valid = jnp.arange(text.shape[1])[None] < lengths[:, None] if self.config.mask_text_padding else None
        return self.text_embed(text, lengths), valid

    def encode_condition(self, condition: Condition) -> jax.Array:
        """The condition tokens that the image blocks read, (B, Nc, D)."""
        embedded, valid = self.embed_condition(condition)
        embedded, valid = sequence.padded(embedded, valid)
        batch, length = embedded.shape[:2]
        grid, num_conditions = self.config.condition_grid, self.config.condition_tokens
        queries = self.bos_token[...][None]
        angles = None
        if self.config.rotary:
            angles = sequence.join_tokens(
                self._angles(np.zeros((1, length, 3), int)), self._angles(grid_positions(grid)[None])
            )
        else:
            queries = queries + self.time_embed() + position_table(grid, self.config.width)
        queries = broadcast_f32_grad(
            queries, jax.ShapeDtypeStruct((batch, num_conditions, self.config.width), self.dtype)
        )
        if valid is not None:
            valid = sequence.join_tokens(valid, jnp.ones((batch, num_conditions), bool))
        x = constrain(sequence.join_tokens(embedded, queries), "batch", "tokens", None)
        _, cond = sequence.split_tokens(self.condition_encoder(x, valid=valid, angles=angles), length)
        return self.condition_norm(cond)

    def mask_image(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        """Embedded tokens (B, N, D), with the mask token where `mask` (B, N) is True."""
        embedded = self.patch_embed(tokens)
        return jnp.where(mask[..., None], broadcast_f32_grad(self.mask_token[...], embedded), embedded)

    def encode_image(
        self, tokens: jax.Array, mask: jax.Array, visible: int, cond: jax.Array, token_ids: jax.Array | None = None
    ) -> jax.Array:
        """z (B, N, D), the head's condition for every token, or (B, K, D) for the K tokens in `token_ids`.

        tokens (B, N, p*p*C); mask (B, N), True where content is hidden, False for at most `visible` tokens of each
        image; cond (B, Nc, D); token_ids (B, K), raster indices, None for all.
        """
        num_conditions = cond.shape[1]
        x = constrain(self.mask_image(tokens, mask), "batch", "tokens", None)
        angles = None
        if self.config.rotary:
            angles = self._angles(grid_positions(self.config.image_grid)[None])
            origin = jnp.zeros_like(angles, shape=(1, num_conditions, angles.shape[-1]))
        else:
            x = x + position_table(self.config.image_grid, self.config.width).astype(self.dtype)

        def encode_visible(chosen: sequence.Visible) -> tuple[jax.Array, jax.Array]:
            batch = chosen.ids.shape[0]
            valid = sequence.join_tokens(jnp.ones((batch, num_conditions), bool), chosen.exists)
            chosen_angles = None
            if angles is not None:
                all_angles, all_origins = (jnp.broadcast_to(a, (batch, *a.shape[1:])) for a in (angles, origin))
                chosen_angles = sequence.join_tokens(all_origins, sequence.pick(all_angles, chosen))
            h = self.encoder(sequence.join_tokens(cond, sequence.pick(x, chosen)), valid=valid, angles=chosen_angles)
            cond_encoded, h = sequence.split_tokens(h, num_conditions)
            return cond_encoded, sequence.put_back(x, h, chosen)

        encoded = sequence.join_tokens(*sequence.on_visible(encode_visible, mask, max(visible, 1)))
        if angles is not None:
            angles = sequence.join_tokens(origin, angles)

        def select(x):
            image = sequence.split_tokens(x, num_conditions)[1]
            return image if token_ids is None else sequence.take(image, token_ids)

        if token_ids is not None or (one_cpu() and not self.config.scan_layers):
            z = self.decoder(encoded, angles=angles, select=select)
        else:  # a scan needs equal blocks, kernels need all tokens; other cases were not tried
            z = select(self.decoder(encoded, angles=angles))
        return self.image_norm(z)

    def velocities(self, tokens: jax.Array, condition: Condition, draws: Draws, sigmas: np.ndarray) -> jax.Array:
        """Predicted velocities (R, B, N, p*p*C) at the drawn noise levels.

        tokens (B, N, p*p*C) float32; sigmas (1000,) the table that draws.timestep (R, B, N) indexes.
        """
        z = self._encode(tokens, condition, draws)
        return _velocities(self.head, self._times(sigmas), z, tokens, draws.noise, draws.timestep, sigmas)

    def token_losses(self, tokens: jax.Array, condition: Condition, draws: Draws, sigmas: np.ndarray) -> jax.Array:
        """Squared velocity error of every token, mean over channels, (R, B, N) float32; only masked ones count."""
        return _squared_errors(self.velocities(tokens, condition, draws, sigmas), tokens, draws.noise)

    def loss(self, tokens: jax.Array, condition: Condition, draws: Draws, sigmas: np.ndarray) -> jax.Array:
        """The sum of `token_losses` over masked tokens, () float32; on one CPU the head sees only these, in chunks."""
        if not one_cpu():
            return jnp.sum(self.token_losses(tokens, condition, draws, sigmas) * draws.mask)
        z = rearrange(self._encode(tokens, condition, draws), "b n d -> (b n) d")
        tokens = rearrange(tokens, "b n c -> 1 (b n) c")
        noise = rearrange(draws.noise, "r b n c -> r 1 (b n) c")
        timestep = rearrange(draws.timestep, "r b n -> r 1 (b n)")
        graph, weights = nnx.split(self.head)

        def losses(shared, z, ids):
            weights, times = shared
            data = tokens[:, ids], noise[:, :, ids]
            velocity = _velocities(nnx.merge(graph, weights), times, z[None], *data, timestep[:, :, ids], sigmas)
            return jnp.sum(_squared_errors(velocity, *data), axis=(0, 1))

        return chunks.total(losses, (weights, self._times(sigmas)), z, draws.mask.reshape(-1))

    def _encode(self, tokens: jax.Array, condition: Condition, draws: Draws) -> jax.Array:
        return self.encode_image(tokens, draws.mask, draws.max_visible, self.encode_condition(condition))

    def _times(self, sigmas: np.ndarray) -> jax.Array:
        """The head's embedding of each entry of the table, float32."""
        return self.head.embed.time(flow.TRAIN_TIMESTEPS * jnp.asarray(sigmas))

    def _angles(self, positions: np.ndarray) -> jax.Array:
        """Rotary angles (1, N, d/2) of positions (1, N, 3)."""
        return rotary_angles(jnp.asarray(positions), self.config.width // self.config.heads)


def _velocities(
    head: DiffusionHead, times: jax.Array, z: jax.Array,
    tokens: jax.Array, noise: jax.Array, timestep: jax.Array, sigmas: np.ndarray,
) -> jax.Array:  # fmt: skip
    """Velocities (R, B, N, p*p*C), from `times` and z, which the repeats share.

    `times` (1000, r) is the head's embedding of `sigmas` (1000,); z (B, N, D); tokens (B, N, p*p*C);
    noise (R, B, N, p*p*C); timestep (R, B, N).
    """
    noisy = flow.interpolate(tokens, noise, jnp.asarray(sigmas)[timestep])
    return head(noisy, look_up(times, timestep, head.dtype), head.embed.condition(z))


def _squared_errors(velocity: jax.Array, tokens: jax.Array, noise: jax.Array) -> jax.Array:
    """Mean over channels: velocity and noise (R, B, N, p*p*C), tokens (B, N, p*p*C) -> (R, B, N) float32."""
    return jnp.mean(jnp.square(velocity.astype(jnp.float32) - (noise - tokens)), axis=-1)


def unconditional(config: ModelConfig, like: Condition) -> Condition:
    """The unconditional input for guidance, of one image (leading axis 1): class `num_classes`, or no text."""
    if config.condition == "class":
        return {"label": jnp.full((1,), config.num_classes, jnp.int32)}
    return {"text": jnp.zeros_like(like["text"][:1]), "text_length": jnp.zeros((1,), jnp.int32)}


def drop_conditions(config: ModelConfig, condition: Condition, drop: jax.Array) -> Condition:
    """Replace conditions by the unconditional one where `drop` (B,) is True."""
    if config.condition == "class":
        return {"label": jnp.where(drop, config.num_classes, condition["label"])}
    return {**condition, "text_length": jnp.where(drop, 0, condition["text_length"])}
