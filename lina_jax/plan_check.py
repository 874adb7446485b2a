"""Compare the planner's estimates with published measurements.

python -m lina_jax.plan_check [--only=v5e-16B]

Compiles stand-ins for published language models (the same matmuls, remat, optimizer and mesh) for the same slice or
node and estimates their step time. Prints one JSON line for each, with published and predicted TFLOP/s per chip.
"""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax
from absl import flags
from jax.sharding import PartitionSpec as P

from lina_jax import entry, hlo, programs, roofline, topology
from lina_jax import mesh as mesh_lib
from lina_jax.config import MeshConfig
from lina_jax.errors import UserError
from lina_jax.models.transformer import REMAT_POLICIES
from lina_jax.state import Program


@dataclasses.dataclass(frozen=True)
class Published:
    """A fully sharded transformer with gated MLPs, and its measured speed."""

    topology: str
    layers: int
    width: int
    attention: int  # heads times head width
    hidden: int
    sequences: int  # per chip and micro-batch
    tflops: float  # TFLOP/s per chip
    tokens: int = 2048  # of a sequence
    keys: int = 0  # key heads times head width; 0: as many as queries
    vocabulary: int = 32_000
    one_hot: bool = True  # embed tokens by a matmul
    tensor: int = 1  # devices that heads and hidden units are sharded over
    remat: str = "full"
    scan: bool = True
    micro_batches: int = 1

    @property
    def weights(self) -> int:
        """Those that multiply each token; embedded tokens are rows of a table."""
        layer = 2 * self.width * (self.attention + (self.keys or self.attention)) + 3 * self.width * self.hidden
        return self.layers * layer + self.vocabulary * self.width

    @property
    def model_flops(self) -> float:
        """Matmul FLOPs of a step on one chip, without attention cores."""
        return 6.0 * self.weights * self.tokens * self.sequences * self.micro_batches


# TPUs: MaxText, github.com/AI-Hypercomputer/maxtext, MaxText/configs/v5e and v5p: figures from the tables in README.md,
# settings from the scripts beside them, sizes by its global_parameter_scale (base: 16 layers, width 2048, 16 heads of
# 128, hidden 7168). Their figures count the FLOPs of attention cores.
# GPUs, from times and sizes, without the FLOPs of attention cores:
# * Llama 2 7B in MaxText on 8 H100: 0.721 s per step (github.com/NVIDIA/JAX-Toolbox, docs/frameworks/maxtext).
# * Llama 3 8B in PyTorch on one H200: 10,471 tokens/s (github.com/KempnerInstitute/KempnerForge,
#   benchmarks/mfu_scaling/mfu_scaling_2026-04-05.md, experiment 1; batch sizes from mfu_bench.sh).
PUBLISHED = {
    "v5e-16B": Published("v5e:16x16", 32, 4096, 8192, 28_672, 6, 120),
    "v5e-32B": Published("v5e:16x16", 32, 8192, 8192, 28_672, 4, 132),
    # 6 sequences per chip instead of their 7, with which this stand-in exceeds the memory by 1.4 %.
    "v5p-32B": Published("v5p:4x4x4", 32, 8192, 8192, 28_672, 6, 328, tensor=4, remat="dots"),
    "h100-7B": Published("h100:8", 32, 4096, 4096, 11_008, 2, 450, tokens=4096, remat="dots", scan=False),
    "h200-8B": Published(
        "h200:1", 32, 4096, 4096, 14_336, 2, 471, tokens=4096, keys=1024, vocabulary=128_256, scan=False,
        one_hot=False, micro_batches=4,
    ),
}  # fmt: skip


def step_for(case: Published, devices: Sequence[jax.Device]) -> tuple[Program, tuple, jax.sharding.Mesh]:
    """A train step, its abstract arguments and its mesh, without the attention core (their own kernel, not XLA's)."""
    mesh = mesh_lib.build(MeshConfig(data=1, fsdp=-1, tensor=case.tensor), list(devices))

    def spec(shape, dtype, *names):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, P(*names)))

    n, d, a, k, f = case.layers, case.width, case.attention, case.keys or case.attention, case.hidden
    params = {
        "layers": {
            "query": spec((n, d, a), jnp.float32, None, "fsdp", "tensor"),
            **{name: spec((n, d, k), jnp.float32, None, "fsdp", "tensor") for name in ("key", "value")},
            "out": spec((n, a, d), jnp.float32, None, "tensor", "fsdp"),
            **{name: spec((n, d, f), jnp.float32, None, "fsdp", "tensor") for name in ("gate", "up")},
            "down": spec((n, f, d), jnp.float32, None, "tensor", "fsdp"),
            "scale": spec((n, 2, d), jnp.float32),
        },
        "embed": spec((case.vocabulary, d), jnp.float32, "tensor", "fsdp"),
    }
    tx = optax.adamw(1e-4)
    at = dict(jax.tree.leaves_with_path(params))

    def placed(path, leaf):
        return next((at[path[i:]] for i in range(len(path)) if path[i:] in at), spec(leaf.shape, leaf.dtype))

    moments = jax.tree.map_with_path(placed, jax.eval_shape(tx.init, params))
    tokens = spec((case.micro_batches, case.sequences * len(devices), case.tokens), jnp.int32, None, "fsdp")

    def norm(x, scale):
        x32 = x.astype(jnp.float32)
        return (x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + 1e-6)).astype(x.dtype) * scale

    def spread(x):  # keys and values of a group of queries
        return jnp.tile(x, a // k)

    def body(x, p):
        p = jax.tree.map(lambda w: w.astype(jnp.bfloat16), p)
        h = norm(x, p["scale"][0])
        x = x + ((h @ p["query"]) * spread(h @ p["key"]) + spread(h @ p["value"])) @ p["out"]
        h = norm(x, p["scale"][1])
        x = x + (jax.nn.silu(h @ p["gate"]) * (h @ p["up"])) @ p["down"]
        return jax.lax.with_sharding_constraint(x, P("fsdp", None, "tensor")), None

    layer = jax.checkpoint(body, policy=REMAT_POLICIES[case.remat])

    def loss(params, tokens):
        table = params["embed"].astype(jnp.bfloat16)
        if case.one_hot:
            embedded = jax.nn.one_hot(tokens, case.vocabulary, dtype=table.dtype) @ table
        else:
            embedded = table[tokens]
        x = jax.lax.with_sharding_constraint(embedded, P("fsdp"))
        x, _ = jax.lax.scan(layer, x, params["layers"], unroll=1 if case.scan else n)
        logits = (x @ table.T).astype(jnp.float32)
        return jnp.mean(jax.nn.logsumexp(logits, -1) - jnp.sum(logits * jax.nn.one_hot(tokens, case.vocabulary), -1))

    def step(params, moments, tokens):
        grads = jax.grad(loss)(params, tokens[0])
        if case.micro_batches > 1:
            grads, _ = jax.lax.scan(
                lambda g, t: (jax.tree.map(jnp.add, g, jax.grad(loss)(params, t)), None), grads, tokens[1:]
            )
        updates, moments = tx.update(grads, moments, params)
        return optax.apply_updates(params, updates), moments

    shardings = jax.tree.map(lambda leaf: leaf.sharding, (params, moments))
    program = Program(jax.jit(step, donate_argnums=(0, 1), out_shardings=shardings), mesh)
    return program, (params, moments, tokens), mesh


def compare(name: str) -> dict[str, object]:
    """Published and predicted rates of one model; the predicted one has neither FLOPs nor time of attention cores."""
    case = PUBLISHED[name]
    target = topology.parse(case.topology)
    program, arguments, mesh = step_for(case, topology.devices(target))
    compiled = programs.compile_program(program, arguments, topology.compiler_options(target))
    estimate = roofline.estimate(hlo.Module(compiled.text), target.chip, mesh)
    tflops = case.model_flops / estimate.seconds / 1e12
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
    if len(names) > 1:  # XLA reads its flags for GPUs once per process
        for name in names:
            if code := subprocess.run([sys.executable, "-m", "lina_jax.plan_check", f"--only={name}"]).returncode:
                sys.exit(code if code > 0 else 128 - code)
        return
    print(json.dumps(compare(names[0])), flush=True)


if __name__ == "__main__":
    flags.DEFINE_list("only", [], f"models to check, of {', '.join(PUBLISHED)}; default: all")
    entry.run(main)
