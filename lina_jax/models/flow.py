"""Flow matching: noise levels, interpolation, time grids of the sampler (paper section 3.1).

sigma = 1 is pure noise, sigma = 0 the data; x_sigma = sigma * noise + (1 - sigma) * data; the velocity is noise - data.
"""

import jax
import jax.numpy as jnp
import numpy as np

TRAIN_TIMESTEPS = 1000


def shifted(sigma: np.ndarray, shift: float) -> np.ndarray:
    """Noise levels (any shape, in [0, 1]) moved towards noise by a `shift` above 1; 1 leaves them unchanged."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def training_sigmas(shift: float = 1.0) -> np.ndarray:
    """The table of noise levels (1000,), float32, descending from 1; the head is given 1000 * sigma."""
    return shifted(np.arange(TRAIN_TIMESTEPS, 0, -1) / TRAIN_TIMESTEPS, shift).astype(np.float32)


def timestep_index(gaussian: jax.Array) -> jax.Array:
    """Logit-normal indices into the table of noise levels, from N(0, 1) values (...)."""
    return jnp.minimum(jnp.floor(TRAIN_TIMESTEPS * jax.nn.sigmoid(gaussian)).astype(jnp.int32), TRAIN_TIMESTEPS - 1)


def interpolate(data: jax.Array, noise: jax.Array, sigma: jax.Array) -> jax.Array:
    """x_sigma, from sigma (...) and data and noise (..., C)."""
    return sigma[..., None] * noise + (1 - sigma[..., None]) * data


def euler_sigmas(steps: int, shift: float = 1.0) -> np.ndarray:
    """The sampler's noise levels (steps + 1,), float32, from 1 to 0.

    The grid ends at the already shifted last table entry and is then shifted as a whole, as in the published code.
    """
    last = shifted(np.asarray(1 / TRAIN_TIMESTEPS), shift)
    return np.append(shifted(np.linspace(1.0, last, steps), shift), 0.0).astype(np.float32)


def euler_step(x: jax.Array, velocity: jax.Array, sigma: jax.Array, next_sigma: jax.Array) -> jax.Array:
    """x at `next_sigma`, from x at `sigma` along the velocity there; x and velocity have one shape."""
    return x + (next_sigma - sigma) * velocity
