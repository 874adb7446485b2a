"""Compare the planner's estimates with published measurements.

python -m lina_jax.plan_check [--only=v5e-16B]

Compiles stand-ins for published language models (the same matmuls, remat, optimizer and mesh) for the same slice and
estimates their step time. Prints one JSON line for each, with published and predicted TFLOP/s per chip.
"""

import dataclasses
import json
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax
from absl import flags
from jax.sharding import PartitionSpec as P

from lina_jax import errors, hlo, mesh, programs, roofline, topology
from lina_jax.config import MeshConfig
from lina_jax.errors import UserError
from lina_jax.models.transformer import REMAT_POLICIES
from lina_jax.state import Program


@dataclasses.dataclass(frozen=True)
class Published:
    """A fully sharded, rematerialised transformer with gated MLPs, and its measured speed."""

    topology: str
    layers: int
    width: int
    attention: int  # heads times head width
    hidden: int
    sequences: int  # per chip
    tflops: float  # TFLOP/s per chip
    tensor: int = 1  # devices that heads and hidden units are sharded over
    remat: str = "full"


TOKENS, VOCABULARY = 2048, 32_000

# MaxText, github.com/AI-Hypercomputer/maxtext, MaxText/configs/v5e and v5p: figures from the tables in README.md,
# settings from the scripts beside them, sizes by its global_parameter_scale (base: 16 layers, width 2048, 16 heads of
# 128, hidden 7168).
PUBLISHED = {
    "v5e-16B": Published("v5e:16x16", 32, 4096, 8192, 28_672, 6, 120),
    "v5e-32B": Published("v5e:16x16", 32, 8192, 8192, 28_672, 4, 132),
    # 6 sequences per chip instead of their 7, with which this stand-in exceeds the memory by 1.4 %.
    "v5p-32B": Published("v5p:4x4x4", 32, 8192, 8192, 28_672, 6, 328, tensor=4, remat="dots"),
}


def step_for(case: Published, devices: Sequence[jax.Device]) -> tuple[Program, tuple, jax.sharding.Mesh]:
    """A train step, its abstract arguments and its mesh, without the attention core (their own kernel, not XLA's)."""
    device_mesh = mesh.build(MeshConfig(data=1, fsdp=-1, tensor=case.tensor), list(devices))

    def spec(shape, dtype, *names):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(device_mesh, P(*names)))

    n, d, a, f = case.layers, case.width, case.attention, case.hidden
    params = {
        "layers": {
            **{name: spec((n, d, a), jnp.float32, None, "fsdp", "tensor") for name in ("query", "key", "value")},
            "out": spec((n, a, d), jnp.float32, None, "tensor", "fsdp"),
            **{name: spec((n, d, f), jnp.float32, None, "fsdp", "tensor") for name in ("gate", "up")},
            "down": spec((n, f, d), jnp.float32, None, "tensor", "fsdp"),
            "scale": spec((n, 2, d), jnp.float32),
        },
        "embed": spec((VOCABULARY, d), jnp.float32, "tensor", "fsdp"),
    }
    tx = optax.adamw(1e-4)
    at = dict(jax.tree.leaves_with_path(params))

    def placed(path, leaf):
        return next((at[path[i:]] for i in range(len(path)) if path[i:] in at), spec(leaf.shape, leaf.dtype))

    moments = jax.tree.map_with_path(placed, jax.eval_shape(tx.init, params))
    tokens = spec((case.sequences * len(devices), TOKENS), jnp.int32, "fsdp")

    def norm(x, scale):
        x32 = x.astype(jnp.float32)
        return (x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + 1e-6)).astype(x.dtype) * scale

    def body(x, p):
        p = jax.tree.map(lambda w: w.astype(jnp.bfloat16), p)
        h = norm(x, p["scale"][0])
        x = x + ((h @ p["query"]) * (h @ p["key"]) + h @ p["value"]) @ p["out"]
        h = norm(x, p["scale"][1])
        x = x + (jax.nn.silu(h @ p["gate"]) * (h @ p["up"])) @ p["down"]
        return jax.lax.with_sharding_constraint(x, P("fsdp", None, "tensor")), None

    layer = jax.checkpoint(body, policy=REMAT_POLICIES[case.remat])

    def loss(params, tokens):
        table = params["embed"].astype(jnp.bfloat16)
        x = jax.lax.with_sharding_constraint(jax.nn.one_hot(tokens, VOCABULARY, dtype=table.dtype) @ table, P("fsdp"))
        x, _ = jax.lax.scan(layer, x, params["layers"])
        logits = (x @ table.T).astype(jnp.float32)
        return jnp.mean(jax.nn.logsumexp(logits, -1) - jnp.sum(logits * jax.nn.one_hot(tokens, VOCABULARY), -1))

    def step(params, moments, tokens):
        grads = jax.grad(loss)(params, tokens)
        updates, moments = tx.update(grads, moments, params)
        return optax.apply_updates(params, updates), moments

    shardings = jax.tree.map(lambda leaf: leaf.sharding, (params, moments))
    program = Program(jax.jit(step, donate_argnums=(0, 1), out_shardings=shardings), device_mesh)
    return program, (params, moments, tokens), device_mesh


def compare(name: str) -> dict[str, object]:
    """Published and predicted rates of one model; the predicted one has neither FLOPs nor time of attention cores."""
    case = PUBLISHED[name]
    where = topology.parse(case.topology)
    program, arguments, device_mesh = step_for(case, topology.devices(where))
    compiled = programs.compile_program(program, arguments, topology.compiler_options(where))
    estimate = roofline.estimate(hlo.Module(compiled.text), where.chip, device_mesh)
    weights = case.layers * (4 * case.width * case.attention + 3 * case.width * case.hidden) + VOCABULARY * case.width
    model = 6.0 * weights * TOKENS * case.sequences
    tflops = model / estimate.seconds / 1e12
    return {
        "name": name,
        "published_tflops": case.tflops,
        "predicted_tflops": round(tflops, 1),
        "error": round(tflops / case.tflops - 1, 3),
        "predicted_step_s": round(estimate.seconds, 3),
        "seconds_by_bound": {k: round(v, 3) for k, v in estimate.bound.items()},
        "memory_gib": round(compiled.total / 2**30, 1),
    }


def main(argv: Sequence[str]) -> None:
    del argv
    names = flags.FLAGS.only or list(PUBLISHED)
    if unknown := [name for name in names if name not in PUBLISHED]:
        raise UserError(f"--only={','.join(unknown)}: expected one or more of {', '.join(PUBLISHED)}")
    for name in names:
        print(json.dumps(compare(name)), flush=True)


if __name__ == "__main__":
    flags.DEFINE_list("only", [], f"models to check, of {', '.join(PUBLISHED)}; default: all")
    errors.run(main)
