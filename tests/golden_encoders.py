"""Checks of the fixtures of the frozen encoders."""

import dataclasses

import jax
import jax.numpy as jnp
from einops import rearrange
from golden_case import Case, module

from lina_jax import torch_layout
from lina_jax.models import vae
from lina_jax.models.text import Phi, PhiConfig


def autoencoder(case: Case) -> None:
    c = case.config
    last = len(c["block_out_channels"]) - 1
    config = vae.VaeConfig(
        block_out_channels=tuple(c["block_out_channels"]),
        layers_per_block=c["layers_per_block"],
        latent_channels=c["latent_channels"],
        scaling_factor=c["scaling_factor"],
        shift_factor=c["shift_factor"] or 0.0,
        last_level_attention=any(name.startswith(f"encoder.down_blocks.{last}.attentions.") for name in case.weights),
    )
    net = module(
        lambda rngs: vae.AutoencoderKL(config, rngs=rngs, dtype=jnp.float32),
        list(torch_layout.autoencoder(config)),
        case.weights,
    )

    def given(name):
        return jnp.asarray(rearrange(case[name], "b c h w -> b h w c"))

    def check(name, got):
        case.check(f"outputs.{name}", rearrange(got, "b h w c -> b c h w"))

    moments = jax.jit(vae.AutoencoderKL.encode)(net, given("image"))
    check("moments", moments)
    latents = vae.draw_latents(moments, given("eps"))
    check("z", latents)
    scaled = vae.scale(config, latents)
    check("scaled", scaled)
    check("unscaled", vae.unscale(config, scaled))
    check("decoded", jax.jit(vae.AutoencoderKL.decode)(net, given("latent")))


def phi(case: Case) -> None:
    config = PhiConfig(**{field.name: case.config[field.name] for field in dataclasses.fields(PhiConfig)})
    net = module(lambda rngs: Phi(config, rngs=rngs, dtype=jnp.float32), list(torch_layout.phi(config)), case.weights)
    ids = jnp.asarray(case["input_ids"])
    first = jax.tree.map(lambda leaf: leaf[0], net.blocks)
    case.check("outputs.layer0", first(net.embed(ids), config.angles(ids.shape[1])))
    case.check("outputs.last_hidden_state", net(ids))
