"""Rows of tables are the same on all platforms, and so are their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lina_jax import mesh
from lina_jax.config import MeshConfig
from lina_jax.models import embeddings


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("axes", [{}, {"data": 2, "sequence": 4}], ids=["one_device", "mesh"])
def test_gradients_of_rows_are_sums_in_float32(dtype, platform, axes, monkeypatch):
    """Of 512 tokens that read one row in two: in bfloat16 a sum of these would be of two digits."""
    monkeypatch.setattr(embeddings, "platform", lambda: platform)
    rng = np.random.default_rng(0)
    table = rng.standard_normal((5, 8)).astype(np.float32)
    ids = np.where(rng.random((4, 128)) < 0.5, 3, rng.integers(0, 5, (4, 128)))
    given = jnp.asarray(1 + rng.standard_normal((4, 128, 8)), dtype)
    devices = mesh.build(MeshConfig(**axes), jax.devices()[:8] if axes else jax.devices()[:1])

    @jax.jit
    def both(table, ids, given):
        rows, pull = jax.vjp(lambda table: embeddings.look_up(table, ids, dtype), table)
        return rows, *pull(given)

    with jax.set_mesh(devices):
        cut = jax.device_put((ids, given), mesh.sharding(devices, "batch", "tokens"))
        rows, gradient = both(table, *cut)
    np.testing.assert_array_equal(rows, table[ids].astype(dtype))
    assert gradient.dtype == jnp.float32
    expected = np.zeros((5, 8))
    np.add.at(expected, ids, np.asarray(given, np.float64))
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-4)
