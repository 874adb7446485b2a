"""Time lina_jax beside PyTorch on this CPU: the same model, in the published order of operations (pytorch_lina.py).

python tests/beside_pytorch.py train [--sides=lina_jax:linear,pytorch:linear] [--turns=6] [--calls=3]
python tests/beside_pytorch.py sample
python tests/beside_pytorch.py attention --sides=lina_jax:linear,lina_jax:softmax,pytorch:softmax [--tokens=320]

A side is SYSTEM:ATTENTION. `train` and `sample` run the preset ATTENTION of configs/bench.py; `attention` runs one
layer of width 1536 with 16 heads, forward and backward. PyTorch comes with the extra `convert`.

Each side is a process of its own. Sides take turns in random order; each turn makes one call that does not count, then
--calls that do. The output is one line of JSON per side, with medians over all its turns. `of` (wall time) and `of_cpu`
(CPU time) are medians over turns of the other side's time divided by this side's.
"""

import contextlib
import dataclasses
import functools
import json
import math
import multiprocessing
import os
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # inherited by the sides' processes

import numpy as np
from absl import flags

from lina_jax import benchmark_model, config_file, decoding_schedule, entry, mesh, timing
from lina_jax.benchmark_model import AttentionSizes
from lina_jax.config import Config, freeze
from lina_jax.errors import UserError

ROOT = Path(__file__).parent.parent
IMAGES = 4  # sampled at once
WIDTH, HEADS = 1536, 16  # of `attention`


def config_of(kind: str) -> Config:
    return freeze(config_file.load(f"{ROOT}/configs/bench.py:{kind}"))


class LinaJax:
    """Each method builds a call that returns arrays to wait for."""

    def __init__(self, tokens: int):
        self.sizes = AttentionSizes(tokens, WIDTH, HEADS, "float32")

    def train(self, kind: str) -> Callable[[], Any]:
        config = config_of(kind)
        return benchmark_model.Training(config, mesh.from_config(config))

    def sample(self, kind: str) -> Callable[[], Any]:
        config = config_of(kind)
        return benchmark_model.sampling(config, mesh.from_config(config), IMAGES, autoencoder=False)[0]

    def attention(self, kind: str) -> Callable[[], Any]:
        return benchmark_model.attention_layer(self.sizes, kind, 1, backward=True)[0]


class PyTorch:
    """Each method builds a call; weights are noise, as on the other side."""

    def __init__(self, tokens: int):
        import pytorch_lina
        import torch

        self.sizes = AttentionSizes(tokens, WIDTH, HEADS, "float32")
        self.torch, self.lina = torch, pytorch_lina
        torch.manual_seed(0)

    def train(self, kind: str) -> Callable[[], Any]:
        config, torch, rng = config_of(kind), self.torch, np.random.default_rng(0)
        model, optim = self._noisy(self.lina.Lina(config.model)), config.optim
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(
            trained, optim.learning_rate, (optim.b1, optim.b2), optim.eps, optim.weight_decay, fused=True
        )
        moments = torch.randn(config.batch_size, 2 * config.model.latent_channels, *config.model.image_grid)
        label = torch.randint(config.model.num_classes, (config.batch_size,))

        def call():
            optimizer.zero_grad()
            loss = model.loss(moments, label, config.loss, rng)
            loss.backward()
            optimizer.step()
            if not math.isfinite(loss.item()):
                raise RuntimeError("the loss is not finite")

        return call

    def sample(self, kind: str) -> Callable[[], Any]:
        config, torch = config_of(kind), self.torch
        model = self._noisy(self.lina.Lina(config.model))
        plan = decoding_schedule.make_schedule(config)
        label = torch.randint(config.model.num_classes, (IMAGES,))
        size = IMAGES, config.model.latent_channels, *config.model.image_grid

        def call():
            order = torch.rand(IMAGES, config.model.image_tokens, 1).argsort(dim=1)
            return model.sample(label, plan, order, (torch.randn(size) for _ in plan.predicted))

        return call

    def attention(self, kind: str) -> Callable[[], Any]:
        model = dataclasses.replace(self.sizes.model, attention=kind)
        layer = self._noisy(self.lina.Attention(model, decoder=True))
        x, cotangent = self.torch.randn(2, 1, self.sizes.tokens, WIDTH)
        x.requires_grad_()

        def call():
            layer.zero_grad()
            x.grad = None
            layer(x).backward(cotangent)

        return call

    def _noisy(self, model):
        with self.torch.no_grad():
            for name, parameter in model.named_parameters():
                norm = "norm" in name and name.endswith(".weight") and parameter.ndim == 1
                parameter.copy_(0.02 * self.torch.randn_like(parameter) + ("scale" in name or norm))
        return model


SYSTEMS = {"lina_jax": LinaJax, "pytorch": PyTorch}
SIDES = [f"{system}:{kind}" for system in SYSTEMS for kind in ("linear", "softmax")]
WHAT = ("train", "sample", "attention")


@functools.cache
def call_of(side: str, what: str, tokens: int) -> Callable[[], Any]:
    system, kind = side.split(":")
    return getattr(SYSTEMS[system](tokens), what)(kind)


def timed(*which, count: int) -> list[tuple[float, float]]:
    call = call_of(*which)
    return [timing.timed(call) for _ in range(count)]


def in_turns(sides: Sequence[str], what: str, tokens: int, turns: int, calls: int) -> dict[str, np.ndarray]:
    """For each side, (turns, calls, 2): wall time and CPU time in seconds."""
    with contextlib.ExitStack() as stack:
        spawn = multiprocessing.get_context("spawn")
        workers = {side: stack.enter_context(ProcessPoolExecutor(1, mp_context=spawn)) for side in sides}

        def ask(side: str, count: int) -> list[tuple[float, float]]:
            return workers[side].submit(timed, side, what, tokens, count=count).result()

        for side in sides:
            ask(side, 1)  # compiles
        taken = {side: [] for side in sides}
        for _ in range(turns):
            for side in random.sample(sides, len(sides)):
                taken[side].append(ask(side, 1 + calls)[1:])
        return {side: np.array(rows) for side, rows in taken.items()}


def main(argv: list[str]) -> None:
    values, what = flags.FLAGS, argv[1]
    if unknown := set(values.sides) - set(SIDES):
        raise UserError(f"--sides={','.join(values.sides)}: {min(unknown)} is none of {', '.join(SIDES)}")
    taken = in_turns(values.sides, what, values.tokens, values.turns, values.calls)
    medians = {side: np.median(times, axis=1) for side, times in taken.items()}  # of each turn
    for side, times in taken.items():
        others = {other: theirs / medians[side] for other, theirs in medians.items() if other != side}
        row = {
            "benchmark": what,
            "side": side,
            **({"tokens": values.tokens} if what == "attention" else {}),
            "median_s": np.median(times[..., 0]),
            "min_s": times[..., 0].min(),
            "max_s": times[..., 0].max(),
            "cpu_s": np.median(times[..., 1]),
            "turns": values.turns,
            "calls": values.calls,
            "host_cpus": os.cpu_count(),
            "of": {other: np.median(ratio[:, 0]) for other, ratio in others.items()},
            "of_cpu": {other: np.median(ratio[:, 1]) for other, ratio in others.items()},
        }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    flags.DEFINE_list("sides", ["lina_jax:linear", "pytorch:linear"], "SYSTEM:ATTENTION")
    flags.DEFINE_integer("turns", 6, "of each side", lower_bound=1)
    flags.DEFINE_integer("calls", 3, "of a turn that count", lower_bound=1)
    flags.DEFINE_integer("tokens", 320, "of `attention`")
    entry.run(main, commands=WHAT)
