"""Random weights of Inception v3 under the names of the published file."""

import math

import numpy as np
from safetensors.numpy import save_file

from lina_jax.models import inception


def random_weights(thin: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Weights of a network with its widths divided by `thin`; activations keep their scale from layer to layer."""
    rng, tensors = np.random.default_rng(seed), {}
    for name, layer in inception.layers(thin).items():
        fan_in = layer.inputs * math.prod(layer.size)
        shape = layer.outputs, layer.inputs, *layer.size
        tensors[f"{name}.conv.weight"] = rng.standard_normal(shape) * math.sqrt(2 / fan_in)
        tensors[f"{name}.bn.weight"] = rng.uniform(0.5, 1.5, layer.outputs)
        tensors[f"{name}.bn.bias"] = 0.1 * rng.standard_normal(layer.outputs)
        tensors[f"{name}.bn.running_mean"] = 0.1 * rng.standard_normal(layer.outputs)
        tensors[f"{name}.bn.running_var"] = rng.uniform(0.5, 1.5, layer.outputs)
    tensors["fc.weight"] = rng.standard_normal((inception.CLASSES, 2048 // thin)) * math.sqrt(thin / 2048)
    tensors["fc.bias"] = rng.standard_normal(inception.CLASSES)
    return {name: tensor.astype(np.float32) for name, tensor in tensors.items()}


def write(path, thin: int = 32, seed: int = 0):
    """Write a safetensors file that `inception_weights.load` reads; returns its path."""
    save_file(random_weights(thin, seed), path)
    return path
