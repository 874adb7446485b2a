"""Start a new run from other weights: the rules of config.init_from say which of their arrays it takes."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding, PartitionSpec

from lina_jax import config as config_lib
from lina_jax import init_rules
from lina_jax.checkpoint import Checkpoints, Flat, Shape
from lina_jax.config import Config, InitFromConfig, ModelConfig
from lina_jax.errors import UserError
from lina_jax.init_rules import Rules
from lina_jax.models.attention import GATE_NAMES
from lina_jax.state import Blueprint, TrainState
from lina_jax.workdir import is_imported, load_config, saved_checkpoints

Shapes = Mapping[tuple[str, ...], Shape]  # by path
Grid = tuple[int, int]  # rows, columns
GATES = {name for names in GATE_NAMES.values() for name in names.values()}
FUNCTION = ("model.", "autoencoder.")  # prefixes of the fields whose differences are reported


@dataclasses.dataclass(frozen=True)
class Decision:
    """What happens to one array; its shapes in the new run and in the other weights, None where it is absent."""

    name: str
    action: str  # loaded | recomputed | restarted | skipped
    here: Shape | None
    there: Shape | None
    reason: str = ""


def is_pending(config: Config, workdir: Path) -> bool:
    """Whether a run still has to start from init_from.path. Raises UserError if its workdir has imported weights."""
    saved = saved_checkpoints(workdir)
    if config.init_from.path and saved and all(is_imported(path) for path in saved):
        raise UserError(
            f"init_from.path={config.init_from.path}: {workdir} holds imported weights, and its runs start from those "
            "(choose another --workdir, or use those, with an empty --config.init_from.path=)"
        )
    return bool(config.init_from.path) and not saved


def initialise(blueprint: Blueprint) -> tuple[TrainState, dict[str, Any]]:
    """(a fresh state whose parameters and EMA have the arrays that the rules take, a report of what became of each).

    Only these arrays are read, directly into the shardings of `blueprint`, whatever mesh they were saved from. Raises
    UserError listing every array that does not fit and every pattern that matches no array.
    """
    settings = blueprint.config.init_from
    shapes = flatten_dict(blueprint.shapes.params) | flatten_dict(blueprint.shapes.frozen)
    donor = Path(settings.path).expanduser()
    theirs = _config_of(donor, settings)
    here = {path: leaf.shape for path, leaf in shapes.items()}
    decisions: dict[tuple[str, ...], Decision] = {}

    def choose(there: Shapes) -> Flat:
        decisions.update(decide(settings, (blueprint.config.model, here), (theirs.model, there)))
        taken = {
            path: jax.ShapeDtypeStruct(
                decision.there, shapes[path].dtype, sharding=_read_sharding(shapes[path], decision)
            )
            for path, decision in decisions.items()
            if decision.action in ("loaded", "recomputed")
        }
        if not taken:
            raise UserError(f"init_from.path={donor}: the rules of init_from select none of its {len(there)} arrays")
        return taken

    checkpoints = Checkpoints(donor, theirs.checkpoint, create=False)
    step = None if settings.checkpoint < 0 else settings.checkpoint
    arrays, step = checkpoints.restore_some(choose, ema=settings.ema, step=step)
    for path in [path for path in arrays if decisions[path].action == "recomputed"]:
        fit = jax.jit(regrid, static_argnums=(1, 2), out_shardings=shapes[path].sharding)
        arrays[path] = fit(arrays[path], _grids(theirs.model), _grids(blueprint.config.model))
    if rest := sorted(shapes.keys() - arrays.keys()):
        arrays |= blueprint.init_arrays(rest)
    parts = (flatten_dict(part) for part in (blueprint.shapes.params, blueprint.shapes.frozen))
    train_state = blueprint.init_from_weights(
        *(unflatten_dict({path: arrays[path] for path in part}) for part in parts)
    )
    differing = config_lib.differences(theirs, blueprint.config)
    report = {
        "path": str(donor),
        "step": step,
        "weights": checkpoints.kind(step, ema=settings.ema),
        "rules": {"name": settings.rules, **dataclasses.asdict(rules_of(settings))},
        "config": [line for line in differing if line.startswith(FUNCTION)],
        "arrays": [dataclasses.asdict(decision) for decision in decisions.values()],
    }
    return train_state, report


def rules_of(settings: InitFromConfig) -> Rules:
    """The named set of rules plus the patterns in the config."""
    own = {field.name: getattr(settings, field.name) for field in dataclasses.fields(Rules)}
    return init_rules.SETS[settings.rules].extended(Rules(**own))


def decide(
    settings: InitFromConfig, ours: tuple[ModelConfig, Shapes], theirs: tuple[ModelConfig, Shapes]
) -> dict[tuple[str, ...], Decision]:
    """A decision for every array of either model, by path.

    Raises UserError listing every array that does not fit and every pattern of the config that matches no array.
    """
    rules, (_, here), (_, there) = rules_of(settings), ours, theirs
    names = {path: "/".join(path) for path in sorted(here.keys() | there.keys())}
    unmatched = [
        f"{kind}: no array name matches {pattern!r}"
        for kind in init_rules.LISTS
        for pattern in getattr(settings, kind)
        if not any(fnmatchcase(name, pattern) for name in names.values())
    ]
    decisions, misfits = {}, []
    for path, name in names.items():
        action, reason = _action_for(rules, name), ""
        if action in ("loaded", "recomputed"):
            reason = _mismatch(path, action, ours, theirs)
            wrong = action == "recomputed" and path[-1] not in GATES
            if reason and (wrong or rules.unfit == "refuse"):
                misfits.append(f"{name}: {reason}")
            action = "skipped" if reason else action
        elif action == "skipped":
            reason = "by the rules"
        elif path not in here:
            action, reason = "skipped", "only in the source"
        if action == "recomputed" and _grids(ours[0]) == _grids(theirs[0]):
            action = "loaded"
        decisions[path] = Decision(name, action, here.get(path), there.get(path), reason)
    if unmatched or misfits:
        hint = " (list such arrays in init_from.exclude, restart or recompute, or set unfit=skip)" if misfits else ""
        raise UserError(f"init_from.path={settings.path}: {'; '.join(unmatched + misfits)}{hint}")
    return decisions


def _action_for(rules: Rules, name: str) -> str:
    def fits(patterns: Sequence[str]) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in patterns)

    if fits(rules.exclude) or (rules.include and not fits(rules.include)):
        return "skipped"
    if fits(rules.restart):
        return "restarted"
    return "recomputed" if fits(rules.recompute) else "loaded"


def _mismatch(
    path: tuple[str, ...], action: str, ours: tuple[ModelConfig, Shapes], theirs: tuple[ModelConfig, Shapes]
) -> str:
    """Why our array cannot be initialised from theirs; "" if it can."""
    (model, here), (other, there) = ours, theirs
    gate = path[-1] in GATES
    if path not in there:
        return "not in the source"
    if path not in here:
        return "only in the source"
    if action == "recomputed" and not gate:
        return "no gate, cannot be recomputed"
    if action == "recomputed":
        fits = (*here[path][:-2], *here[path][-1:]) == (*there[path][:-2], *there[path][-1:])
    else:  # on another grid with as many tokens, gates belong to other positions
        fits = here[path] == there[path] and (not gate or _grids(model) == _grids(other))
    grids = f" (grids {_grids(other)}, here {_grids(model)})" if gate else ""
    return "" if fits else f"{there[path]} in the source, {here[path]} here{grids}"


def _read_sharding(ours: jax.ShapeDtypeStruct, decision: Decision) -> NamedSharding:
    """The sharding into which an array of theirs is read: ours, but gates of another grid are not sharded over rows.

    The mesh may not divide their number of rows.
    """
    place = ours.sharding
    if decision.action == "loaded":
        return place
    layers, _, heads = place.spec
    return NamedSharding(place.mesh, PartitionSpec(layers, None, heads))


def _grids(model: ModelConfig) -> tuple[Grid, Grid]:
    return model.condition_grid, model.image_grid


def regrid(gate: jax.Array, there: tuple[Grid, Grid], here: tuple[Grid, Grid]) -> jax.Array:
    """Gates (layers, tokens, heads) of condition and image tokens, interpolated from the grids `there` to `here`.

    Gates of a grid that does not change are kept as they are.
    """
    parts, start = [], 0
    for old, new in zip(there, here, strict=True):
        part = gate[:, start : start + math.prod(old)]
        start += math.prod(old)
        if old != new:
            image = rearrange(part, "l (r c) h -> l r c h", r=old[0])
            image = jax.image.resize(image, (len(image), *new, image.shape[-1]), "linear")
            part = rearrange(image, "l r c h -> l (r c) h")
        parts.append(part)
    return jnp.concatenate(parts, axis=1)


def _config_of(donor: Path, settings: InitFromConfig) -> Config:
    if not donor.exists():
        raise UserError(
            f"init_from.path={settings.path}: no such directory (an empty init_from.path starts from random weights)"
        )
    if not (donor / "config.json").is_file() or not (donor / "checkpoints").is_dir():
        raise UserError(
            f"init_from.path={settings.path}: not a training directory with checkpoints (python -m lina_jax.convert "
            "--from_torch=DIR --workdir=DIR creates one from released weights)"
        )
    return load_config(donor)


def table(report: Mapping[str, Any]) -> str:
    """The report of `initialise` as text: a summary, config differences, and a line for each array."""
    rows, counts = [], {}
    for array in sorted(report["arrays"], key=lambda array: array["action"]):
        here, there = array["here"], array["there"]
        arrays, numbers = counts.get(array["action"], (0, 0))
        counts[array["action"]] = arrays + 1, numbers + math.prod(here or there)
        shapes = " x ".join(map(str, here)) if here else "-"
        if here != there:
            shapes += f" (source {' x '.join(map(str, there)) if there else '-'})"
        rows.append((array["action"], array["name"], shapes, array["reason"]))
    said = ", ".join(f"{action} {arrays} arrays ({numbers:,} numbers)" for action, (arrays, numbers) in counts.items())
    kind = "EMA" if report["weights"] == "ema" else "parameters"
    lines = [f"init_from {report['path']}, {kind} of step {report['step']}, rules {report['rules']['name']}: {said}"]
    lines += [f"  differs: {line}" for line in report["config"]]
    wide = [max(len(row[i]) for row in rows) for i in range(3)]
    lines += [
        "  " + "  ".join(f"{cell:{size}}" for cell, size in zip(row, (*wide, 0), strict=True)).rstrip() for row in rows
    ]
    return "\n".join(lines)
