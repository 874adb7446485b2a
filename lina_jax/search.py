"""Search for how to run layers, a mesh and a batch size for a topology: ranked by arithmetic, decided by compiling."""

import dataclasses
import itertools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax

from lina_jax import execution, flops, programs, state
from lina_jax import mesh as mesh_lib
from lina_jax.chips import Chip
from lina_jax.config import Config
from lina_jax.config_fields import flatten
from lina_jax.errors import UserError, first_line
from lina_jax.topology import Topology

GIB = 2**30
TILE = 16  # bf16 rows of a TPU tile; for shards that split tiles XLA uses all-reduces, not gathers and scatters
AHEAD = 7 / 12  # share of a block's weights that scans on TPUs gather ahead and keep for both passes (transformer.py)
AXES = ("replica", "fsdp", "sequence", "tensor")  # mesh axes that a candidate sets; `data` takes the other devices


@dataclasses.dataclass(frozen=True)
class Candidate:
    batch_size: int
    remat: str
    scan_layers: bool
    attention_kernel: str
    replica: int
    fsdp: int
    sequence: int
    tensor: int

    def __str__(self) -> str:
        axes = ", ".join(f"{axis} {getattr(self, axis)}" for axis in AXES)
        return f"batch {self.batch_size}, {execution.described(**execution.choices_of(self))}, {axes}"


def search(
    config: Config,
    target: Topology,
    devices: Sequence[jax.Device],
    plan: Callable[[Config], dict[str, Any]],
    *,
    compiles: int,
    fixed_batch: bool,
) -> dict[str, Any]:
    """The report of the fastest config that fits, else of the one that lacks least memory.

    It also has `recommended` and `tried` candidates, and `overrides`, the flags that turn `config` into the
    recommended one. Compiles at most `compiles` programs: those that fit by estimate, most images per second first.

    Raises UserError if no candidate fits by estimate, and the last compiler error if the compiler accepts none.
    """
    candidates = ranked(config, target, devices, fixed_batch=fixed_batch)
    if not candidates:
        raise UserError("--search: no mesh and remat policy fit by estimate; use more chips or fewer images per chip")
    tried, best, refusal = [], None, None
    for number, candidate in enumerate(candidates[:compiles], 1):
        print(f"{number} of {min(compiles, len(candidates))}: {candidate}", file=sys.stderr, flush=True)
        try:
            report = plan(apply(config, dataclasses.asdict(candidate)))
        except (UserError, jax.errors.JaxRuntimeError) as error:  # the compiler cannot compile every candidate
            refusal, reason = error, first_line(error)
            print(f"  refused: {reason}", file=sys.stderr, flush=True)
            tried.append(dataclasses.asdict(candidate) | {"fits": False, "refused": reason})
            continue
        mfu = report.get("predicted_mfu")
        print(
            f"  {'fits' if report['fits'] else 'does not fit'}, {report['memory_bytes']['total'] / GIB:.1f} GiB"
            + (f", MFU {mfu:.1%}" if mfu else ""),
            file=sys.stderr,
            flush=True,
        )
        tried.append(dataclasses.asdict(candidate) | {"fits": report["fits"], "predicted_mfu": mfu})
        report["recommended"] = dataclasses.asdict(candidate)
        report["overrides"] = overrides(config, recommended(config, report["recommended"], devices))
        if best is None or _worth(report) > _worth(best):
            best = report
    if best is None:
        raise refusal
    return best | {"tried": tried}


def _worth(report: dict[str, Any]) -> tuple[bool, float]:
    return report["fits"], report["images_per_s" if report["fits"] else "headroom_bytes"]


def apply(config: Config, chosen: dict[str, Any]) -> Config:
    """The config with a candidate's choices."""
    return dataclasses.replace(
        config,
        batch_size=chosen["batch_size"],
        model=dataclasses.replace(config.model, **{name: chosen[name] for name in execution.FIELDS}),
        mesh=dataclasses.replace(config.mesh, data=-1, **{axis: chosen[axis] for axis in AXES}),
    )


def ranked(config: Config, target: Topology, devices: Sequence[jax.Device], *, fixed_batch: bool) -> list[Candidate]:
    """Candidates that the mesh allows and that fit by estimate, most images per second first.

    The estimated time does not depend on the way to run layers, so that ways alternate after the stable sort: kernels
    have not run on a device yet, and a plan without them is needed, too.

    Raises UserError if the mesh allows none, with the reason for the least sharded one.
    """
    sizes = {config.batch_size}
    if not fixed_batch:  # from one image per chip up; also fewer, for images that are sharded over `sequence`
        sizes |= {target.chips * images for images in _powers(64)}
        sizes |= {target.chips // parts for parts in _powers(target.chips)}
    replica = target.slices if config.mesh.replica in (1, -1) else config.mesh.replica
    widths = [n for n in _powers(len(devices)) if config.model.width % n == 0]
    policies = execution.policies(config.model)
    ways = execution.scan_and_kernel_options(config.model, "tpu" if target.chip.torus else "gpu", target.chip)
    held, found, refusals = {}, [], []
    rows = _powers(config.model.image_grid[0])
    for sequence, tensor, fsdp in itertools.product(rows, (1, 2, 4), widths):
        cut = dict(zip(AXES, (replica, fsdp, sequence, tensor), strict=True))
        try:
            mesh = mesh_lib.build(dataclasses.replace(config.mesh, data=-1, **cut), devices)
        except UserError as refusal:
            refusals.append(refusal)
            continue
        for batch, remat, way in itertools.product(sorted(sizes), policies, ways):
            candidate = Candidate(batch, remat, **way, **cut)
            trial = apply(config, dataclasses.asdict(candidate))
            try:
                mesh_lib.check(trial, mesh)
            except UserError as refusal:
                refusals.append(refusal)
                continue
            if (fsdp, tensor) not in held:
                held[fsdp, tensor] = sum(programs.state_bytes(state.make_blueprint(trial, mesh)).values())
            size, images = held[fsdp, tensor], trial.batch_size / len(devices)
            kept = _gathered_at_once(candidate, target.chip) / tensor
            if size + execution.step_bytes(trial, images, fsdp * tensor, kept) < execution.FULL * target.chip.memory:
                found.append((_seconds_an_image(trial, candidate, target, images, size), candidate))
    if not held:
        raise UserError(f"--search: no mesh is possible: {refusals[0]}")
    return [candidate for _, candidate in sorted(found, key=lambda pair: pair[0])]


def recommended(config: Config, chosen: dict[str, Any], devices: Sequence[jax.Device]) -> Config:
    """`apply`, but fields that would resolve to the same choices stay open, so that sampling can resolve its own."""
    made = apply(config, chosen)
    left = dataclasses.replace(made, model=config.model)
    resolved = execution.resolve(left, mesh_lib.from_config(left, devices))
    return left if execution.choices_of(resolved.model) == execution.choices_of(made.model) else made


def overrides(config: Config, recommendation: Config) -> list[str]:
    """The flags that turn the config into the recommendation; always with the batch (--batch_per_chip may set it)."""
    given, made = flatten(config), flatten(recommendation)
    return [f"--config.{name}={made[name]}" for name in made if name == "batch_size" or made[name] != given[name]]


def _gathered_at_once(candidate: Candidate, chip: Chip) -> float:
    """The share of the blocks' matrices that a device holds gathered at the same time."""
    if not chip.torus or candidate.remat == "none":
        return 1.0
    return AHEAD if candidate.fsdp > 1 and candidate.scan_layers and candidate.remat == "dots" else 0.0


def _seconds_an_image(config: Config, candidate: Candidate, target: Topology, images: float, held: float) -> float:
    """Rough seconds per image on a device with so many images: compute, its update, and half of its communication."""
    model, layers, chip = config.model, config.model.condition_depth + config.model.image_depth, target.chip
    again = execution.RECOMPUTED[candidate.remat]
    work = flops.training_flops(model, config.loss) * (1 + again) / (0.7 * chip.peak_flops)
    weights = execution.gathered_bytes(model) / candidate.tensor
    nodes = target.slices if chip.torus else target.shape[0]
    near = chip.torus or candidate.fsdp * candidate.sequence * candidate.tensor <= target.shape[1]
    links = (chip.link if near else chip.slow_link) * (2 if chip.torus else 1)
    # Weights gathered in both passes and gradients scattered (3 passes over the links), or gradients all-reduced (2).
    kept = _gathered_at_once(candidate, chip) if chip.torus else 0.0
    gathered = weights / links * (2 if candidate.fsdp == 1 else 3 - kept) * config.optim.accumulate
    if chip.torus and model.width // candidate.fsdp % TILE:
        gathered *= 2
    if nodes > 1 and near:  # float32 gradients are summed over slices or nodes
        gathered += 4 * weights / candidate.fsdp / chip.slow_link
    tokens = model.condition_tokens + model.image_tokens
    summed = 8 * tokens * model.width * 2 * layers / links * (candidate.tensor - 1)
    states = 4 * candidate.sequence * (model.width // model.heads + 1) * model.width * 4 * layers / links
    moved = gathered / images + summed + (candidate.sequence > 1) * states
    update = 2 * held / chip.memory_bandwidth / images  # read and written
    return work + update + 0.5 * moved


def _powers(most: int) -> list[int]:
    return [n for n in (2**k for k in range(most.bit_length())) if n <= most and most % n == 0]
