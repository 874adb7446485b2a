"""LINA in PyTorch, in the published order of operations: the baseline for the speeds in beside_pytorch.py.

It has class conditions, tokens of one latent each, and softmax attention or linear attention with division, convolution
and head-wise gates. Parameters have their published names. test_beside_pytorch.py checks it against the recorded
fixtures.
"""

import math
from collections.abc import Iterable
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lina_jax.config import LossConfig, ModelConfig
from lina_jax.decoding_schedule import Schedule

EPS = 1e-6


class Attention(nn.Module):
    def __init__(self, c: ModelConfig, decoder: bool):
        super().__init__()
        self.heads, self.softmax, self.decoder = c.heads, c.attention == "softmax", decoder and c.attention == "linear"
        self.grid, tokens = c.image_grid, c.condition_tokens + c.image_tokens
        self.qkv, self.proj = nn.Linear(c.width, 3 * c.width), nn.Linear(c.width, c.width)
        if self.decoder:
            self.dw_conv = nn.Conv2d(c.width, c.width, c.conv_kernel, padding=c.conv_kernel // 2, groups=c.width)
            self.key_scale = nn.Parameter(torch.ones(1, c.heads, tokens, 1))
            self.value_scale = nn.Parameter(torch.ones(1, c.heads, tokens, 1))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if self.softmax:
            return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        q, k = F.relu(q) + EPS, F.relu(k) + EPS
        if self.decoder:
            k, v = k * self.key_scale, v * self.value_scale
        normalizer = q @ k.mean(dim=2, keepdim=True).transpose(-2, -1) + EPS
        out = q @ ((k.transpose(-2, -1) @ v) / k.shape[2]) / normalizer
        out = out.transpose(1, 2).flatten(2)
        if self.decoder:
            conditions = x.shape[1] - self.grid[0] * self.grid[1]
            image = raster(self.dw_conv(x[:, conditions:].transpose(1, 2).unflatten(2, self.grid)))
            out = out + torch.cat([torch.zeros_like(out[:, :conditions]), image], dim=1)
        return self.proj(out)


class MLP(nn.Module):
    def __init__(self, given: int, hidden: int, made: int, activation):
        super().__init__()
        self.fc1, self.fc2, self.activation = nn.Linear(given, hidden), nn.Linear(hidden, made), activation

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, c: ModelConfig, decoder: bool):
        super().__init__()
        self.attn, self.norm1 = Attention(c, decoder), nn.LayerNorm(c.width)
        self.mlp, self.norm2 = MLP(c.width, c.mlp_ratio * c.width, c.width, F.gelu), nn.LayerNorm(c.width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.norm1(self.attn(x))
        return x + self.norm2(self.mlp(x))


class PatchEmbed(nn.Module):
    def __init__(self, channels: int, patch: int, width: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, h, w) -> (B, N, D)
        return raster(self.proj(x))


class Encoder(nn.Module):
    def __init__(self, c: ModelConfig, depth: int, patch: int, decoders: int = 0):
        super().__init__()
        self.patch_embed, self.norm = PatchEmbed(c.latent_channels, patch, c.width), nn.LayerNorm(c.width)
        self.blocks = nn.ModuleList(Block(c, decoder=i >= depth - decoders) for i in range(depth))


class TimeConditionEmbed(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.timestep_proj = MLP(256, c.head_width, c.head_width, F.silu)
        self.condition_proj = MLP(c.width, c.head_width, c.head_width, F.silu)

    def forward(self, timestep: Tensor, z: Tensor) -> Tensor:
        return self.condition_proj(z) + self.timestep_proj(waves(timestep, sines_first=False))


class AdaptiveNorm(nn.Module):
    def __init__(self, width: int, parts: int):
        super().__init__()
        self.parts, self.proj = parts, nn.Linear(width, parts * width)

    def forward(self, x: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        scale, shift, *gates = self.proj(F.silu(g)).chunk(self.parts, dim=-1)
        return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift, *gates


class DiffusionBlock(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm1, self.proj, self.norm2 = (
            AdaptiveNorm(width, 3),
            MLP(width, width, width, F.silu),
            nn.LayerNorm(width),
        )

    def forward(self, x: Tensor, g: Tensor) -> Tensor:
        h, gate = self.norm1(x, g)
        return x + gate * self.norm2(self.proj(h))


class DiffusionMLP(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.patch_embed = PatchEmbed(c.latent_channels, c.patch_size, c.head_width)
        self.time_cond_embed = TimeConditionEmbed(c)
        self.blocks = nn.ModuleList(DiffusionBlock(c.head_width) for _ in range(c.head_depth))
        self.norm, self.head = AdaptiveNorm(c.head_width, 2), nn.Linear(c.head_width, c.token_dim)

    def forward(self, noisy: Tensor, timestep: Tensor, z: Tensor, chosen: Tensor | None = None) -> Tensor:
        """Velocities of all tokens, or of those at the indices `chosen` (B, K, 1); noisy (B, C, h, w)."""
        x = self.patch_embed(noisy)
        if chosen is not None:
            x, z = pick(x, chosen), pick(z, chosen)
        g = self.time_cond_embed(timestep, z)
        for block in self.blocks:
            x = block(x, g)
        return self.head(self.norm(x, g)[0])


class Lina(nn.Module):
    """The whole model; beside_pytorch.py times `loss` and `sample`."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.config = c
        self.label_embed = nn.Module()
        self.label_embed.weight = nn.Parameter(0.02 * torch.randn(c.num_classes + 1, c.width))
        self.label_embed.norm = nn.LayerNorm(c.width).requires_grad_(False)
        self.video_pos_embed = nn.Module()
        self.video_pos_embed.time_proj = nn.Sequential(nn.Linear(256, c.width), nn.SiLU(), nn.Linear(c.width, c.width))
        self.video_pos_embed.norm = nn.LayerNorm(c.width)
        self.video_pos_embed.requires_grad_(False)
        self.mask_embed = nn.Module()
        self.mask_embed.bos_token = nn.Parameter(0.02 * torch.randn(1, c.width))
        self.mask_embed.mask_token = nn.Parameter(0.02 * torch.randn(1, c.width))
        self.video_encoder = Encoder(c, c.condition_depth, 2 * c.patch_size)
        self.video_encoder.patch_embed.requires_grad_(False)
        self.image_encoder = Encoder(c, c.image_depth, c.patch_size, decoders=c.halves[1])
        self.image_decoder = DiffusionMLP(c)
        self.register_buffer("image_positions", positions(c.image_grid, c.width), persistent=False)
        self.register_buffer("condition_positions", positions(c.condition_grid, c.width), persistent=False)

    def encode_condition(self, label: Tensor) -> Tensor:
        embedded = self.label_embed.norm(self.label_embed.weight[label])[:, None]
        time = self.video_pos_embed.norm(self.video_pos_embed.time_proj(waves(torch.zeros(1, 1), sines_first=True)))
        queries = self.mask_embed.bos_token + time + self.condition_positions
        x = torch.cat([embedded, queries.expand(len(label), -1, -1)], dim=1)
        for block in self.video_encoder.blocks:
            x = block(x)
        return self.video_encoder.norm(x[:, embedded.shape[1] :])

    def encode_image(self, image: Tensor, mask: Tensor, visible: Tensor, c: Tensor) -> Tensor:
        """z of all tokens; mask (B, N, 1) is 1 at hidden tokens, visible (B, V, 1) has the indices of the others."""
        tokens = self.image_encoder.patch_embed(image)
        x = tokens * (1 - mask) + self.mask_embed.mask_token * mask + self.image_positions
        half, blocks = len(self.image_encoder.blocks) // 2, self.image_encoder.blocks
        h = torch.cat([c, pick(x, visible)], dim=1)
        for block in blocks[:half]:
            h = block(h)
        c, seen = h.split([c.shape[1], visible.shape[1]], dim=1)
        h = torch.cat([c, x.scatter(1, visible.expand(-1, -1, x.shape[-1]), seen)], dim=1)
        for block in blocks[half:]:
            h = block(h)
        return self.image_encoder.norm(h[:, c.shape[1] :])

    def errors(self, image: Tensor, label: Tensor, mask: Tensor, visible: Tensor, noise: Tensor, index: Tensor):
        """Errors (R B, N, 1) for images (B, C, h, w), each with R noises (R B, C, h, w) at levels (R B, N) of 1,000."""
        z = self.encode_image(image, mask, visible, self.encode_condition(label))
        repeats, sigma = len(noise) // len(image), (1000 - index) / 1000
        image, level = image.repeat(repeats, 1, 1, 1), sigma.unflatten(1, self.config.image_grid)[:, None]
        noisy = level * noise + (1 - level) * image
        velocity = self.image_decoder(noisy, 1000 * sigma, z.repeat(repeats, 1, 1))
        return (velocity - raster(noise - image)).square().mean(-1, keepdim=True)

    def loss(self, moments: Tensor, label: Tensor, settings: LossConfig, rng: np.random.Generator) -> Tensor:
        """The loss of moments (B, 2 C, h, w), with random draws as published: one mask ratio per batch."""
        c, batch, tokens = self.config, len(moments), self.config.image_tokens
        mean, logvar = moments.chunk(2, dim=1)
        image = mean + torch.exp(0.5 * logvar.clamp(-30, 20)) * torch.randn_like(mean)
        label = torch.where(torch.rand(batch) > settings.condition_dropout, label, c.num_classes)
        ratio = 2.0
        while not settings.mask_ratio_min <= ratio <= 1:
            ratio = rng.normal(settings.mask_ratio_mean, settings.mask_ratio_std)
        visible = torch.rand(batch, tokens, 1).argsort(dim=1)[:, : round((1 - ratio) * tokens)]
        mask = torch.ones(batch, tokens, 1).scatter(1, visible, 0.0)
        index = (1000 * torch.sigmoid(torch.randn(settings.repeat * batch, tokens))).long()
        noise = torch.randn(settings.repeat * batch, *image.shape[1:])
        return masked_mean(self.errors(image, label, mask, visible, noise, index), mask)

    @torch.no_grad()
    def sample(self, label: Tensor, plan: Schedule, order: Tensor, noises: Iterable[Tensor]) -> Tensor:
        """Latents (B, C, h, w), sampled with guidance; order (B, N, 1); noises (B, C, h, w), one per step."""
        c, batch = self.config, len(label)
        encoded = self.encode_condition(torch.cat([label, torch.full_like(label, c.num_classes)]))
        image, mask = torch.zeros(batch, c.image_tokens, c.token_dim), torch.ones(batch, c.image_tokens, 1)
        for step, noise in enumerate(noises):
            visible, chosen = order.split([plan.visible[step], len(order[0]) - plan.visible[step]], dim=1)
            chosen, noisy = chosen[:, : plan.predicted[step]], raster(noise)
            twice = [t.repeat(2, 1, 1) for t in (mask, visible, chosen)]
            z = self.encode_image(self.grid(image).repeat(2, 1, 1, 1), *twice[:2], encoded)
            places = chosen.expand(-1, -1, c.token_dim)
            for now, after in pairwise(plan.sigmas[step].tolist()):
                timestep = torch.full((2 * batch, 1), 1000 * now)
                velocity = self.image_decoder(self.grid(noisy).repeat(2, 1, 1, 1), timestep, z, twice[2])
                conditional, without = velocity.chunk(2)
                velocity = without + float(plan.guidance[step]) * (conditional - without)
                noisy = noisy.scatter_add(1, places, (after - now) * velocity)
            image, mask = image.scatter(1, places, noisy.gather(1, places)), mask.scatter(1, chosen, 0.0)
        return self.grid(image)

    def grid(self, tokens: Tensor) -> Tensor:
        """(B, N, C) -> (B, C, h, w)."""
        return tokens.transpose(1, 2).unflatten(2, self.config.image_grid)


def pick(x: Tensor, ids: Tensor) -> Tensor:
    return x.gather(1, ids.expand(-1, -1, x.shape[-1]))


def raster(x: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, N, C)."""
    return x.flatten(2).transpose(1, 2)


def masked_mean(errors: Tensor, mask: Tensor) -> Tensor:
    mask = mask.repeat(len(errors) // len(mask), 1, 1)
    return (errors * mask).sum() / (mask.sum() + 1e-5)


def waves(timestep: Tensor, *, sines_first: bool) -> Tensor:
    """(...,) -> (..., 256)."""
    angles = timestep[..., None] * torch.exp(-math.log(1e4) / 128 * torch.arange(128))
    parts = angles.cos(), angles.sin()
    return torch.cat(parts[::-1] if sines_first else parts, dim=-1)


def positions(grid: tuple[int, int], width: int) -> Tensor:
    """(N, D): sines and cosines of the column, then of the row."""
    frequencies = 10000 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    angles = [place.flatten()[:, None] * frequencies for place in (columns, rows)]
    return torch.cat([wave for a in angles for wave in (a.sin(), a.cos())], dim=-1).float()
