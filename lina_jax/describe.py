"""Describe and compare everything with weights that this package reads or writes.

That is: workdirs and single checkpoints of them, published pipelines and their parts, files of weights, and exported
programs.
"""

import collections
import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lina_jax import config as config_lib
from lina_jax import config_fields, export, export_program, published, torch_layout
from lina_jax.checkpoint import Checkpoints
from lina_jax.config import Config
from lina_jax.errors import UserError
from lina_jax.pipeline import open_pipeline
from lina_jax.torch_files import FLOATS, OWN_NAMES, Tensors, open_file, read_json
from lina_jax.workdir import load_config

SHOWN = 20  # differing tensors that are listed, largest differences first


@dataclasses.dataclass(frozen=True)
class Content:
    """The weights at a path; `read` returns one tensor by name."""

    kind: str
    config: Config | None
    unknown: str  # why there is no config
    step: int | None
    published: bool  # names and layouts are the published ones, not ours
    tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]]
    read: Callable[[str], np.ndarray]
    notes: tuple[str, ...] = ()


def open_content(path: Path) -> Content:
    """The content of a path. Raises UserError if it is in none of the formats."""
    if (path / "checkpoints").is_dir() or _is_run(path):
        return _workdir(path, None)
    if path.name == "checkpoints" and _is_run(path.parent):
        return _workdir(path.parent, None)
    if path.name.isdigit() and path.parent.name == "checkpoints" and _is_run(path.parent.parent):
        return _workdir(path.parent.parent, int(path.name))
    exported = path.parent if path.name in (export_program.PROGRAM, export_program.WEIGHTS) else path
    if (exported / export_program.PROGRAM).is_file():
        return _program(exported)
    if path.is_file() and path.suffix == ".safetensors":
        tensors = open_file(path)
        if tensors.metadata.get("format") == OWN_NAMES:
            return _plain_file(path, tensors)
    return _published(path)


def _published(path: Path) -> Content:
    """A pipeline, its transformer, autoencoder or text encoder, or a single file of weights of any of them."""
    pipeline = open_pipeline(path)
    unknown, step = "", pipeline.tensors.metadata.get("step") if pipeline.metadata else None
    try:
        config, assumed = published.config_of(pipeline, None)
    except UserError as error:
        config, unknown, assumed = None, str(error), []
    kind = "published PyTorch layout" + (", exported from here" if pipeline.metadata else "")
    if not any(name.startswith("image_encoder.") for name in pipeline.tensors):
        raw = pipeline.transformer
        names = [raw.get("_class_name"), *(raw.get("architectures") or [])]
        kind = f"PyTorch weights of another model, {next(filter(None, names), 'unnamed')}"
    parts = {"vae/": pipeline.vae, "text_encoder/": pipeline.text_encoder}
    notes = [f"beside it: {name}" for name, there in parts.items() if there]
    notes += [f"scheduler: {json.dumps(pipeline.scheduler)}"] if pipeline.scheduler else []
    notes += [f"assumed, as no file states it: {assumption}" for assumption in assumed]
    tensors = pipeline.tensors
    return Content(kind, config, unknown, step and int(step), True, _listed(tensors), tensors.__getitem__, tuple(notes))


def _listed(tensors) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    return {name: (shape, FLOATS[tensors.dtypes[name]]) for name, shape in tensors.shapes.items()}


def _is_run(path: Path) -> bool:
    """Whether a directory has the config of a run; published models have a config.json of another form."""
    try:
        return "checkpoint" in read_json(path / "config.json")
    except UserError:
        return False


def _workdir(path: Path, step: int | None) -> Content:
    config = load_config(path)
    checkpoints = Checkpoints(path, config.checkpoint, create=False)
    if not checkpoints.steps():
        raise UserError(f"{path}: a training directory without a checkpoint")
    steps = ", ".join(map(str, checkpoints.steps()))
    if step not in (None, *checkpoints.steps()):
        raise UserError(f"{path}: no checkpoint {step}; there are {steps}")
    which = "the last" if step is None else "this one"
    step = checkpoints.steps()[-1] if step is None else step
    more = "weights only" if checkpoints.imported(step) else "parameters, EMA (listed here), optimizer state"

    @functools.cache
    def arrays() -> dict[str, Any]:
        return {"/".join(name): array for name, array in export.load(path, step=step).arrays.items()}

    return Content(
        f"training directory, steps {steps}; {which} has {more}",
        config,
        "",
        step,
        False,
        checkpoints.describe_weights(step),
        lambda name: np.asarray(arrays()[name]),
    )


def _plain_file(path: Path, tensors: Tensors) -> Content:
    config, step = _config_and_step(path, tensors)
    read = functools.lru_cache(maxsize=1)(tensors.__getitem__)  # a stack is requested once for each of its layers
    kind = f"safetensors file with lina_jax's own names, weights: {tensors.metadata.get('weights')}"
    return Content(kind, config, "", step, False, _listed(tensors), read)


def _program(path: Path) -> Content:
    """An exported program: the model's arrays under the names that they have here, those of encoders in encoders/."""
    tensors = open_file(path / export_program.WEIGHTS)
    config, step = _config_and_step(path, tensors)
    arguments = read_json(path / export_program.ARGUMENTS)
    tensors = tensors.renamed(lambda name: name.removeprefix("params/").removeprefix("frozen/"))
    read = functools.lru_cache(maxsize=1)(tensors.__getitem__)
    program = (path / export_program.PROGRAM).read_bytes()
    digest = hashlib.sha256(program).hexdigest()[:16]
    notes = (f"{export_program.PROGRAM}: {len(program):,} bytes, SHA-256 {digest}...",)
    notes += tuple(f"{name}: {json.dumps(value)}" for name, value in arguments.items())
    kind = f"sampling program and its weights: {tensors.metadata.get('weights')}"
    return Content(kind, config, "", step, False, _listed(tensors), read, notes)


def _config_and_step(path: Path, tensors: Tensors) -> tuple[Config, int]:
    try:
        return config_lib.freeze(json.loads(tensors.metadata["config"])), int(tensors.metadata["step"])
    except (KeyError, ValueError) as error:
        raise UserError(f"{path}: its metadata lacks config or step ({error})") from error
    except UserError as error:
        raise UserError(f"{path}: the config in its metadata: {error}") from error


def describe(path: Path) -> str:
    """The kind, step and config of what is at a path, a table of its tensors, and their total size."""
    content = open_content(path)
    lines = [f"{path}: {content.kind}"]
    lines += [f"step: {content.step}"] if content.step is not None else []
    lines += content.notes
    if content.config:
        lines += [f"config.{name} = {value!r}" for name, value in _shown_fields(content.config).items()]
    else:
        lines.append(f"config: {content.unknown}")
    wide = max(map(len, content.tensors), default=0)
    for name, (shape, dtype) in content.tensors.items():
        lines.append(f"{name:{wide}}  {dtype!s:8}  {' x '.join(map(str, shape))}")
    counts = {}
    for shape, dtype in content.tensors.values():
        counts[dtype] = counts.get(dtype, 0) + int(np.prod(shape))
    sizes = ", ".join(
        f"{count:,} of {dtype} ({count * dtype.itemsize / 1e9:.3f} GB)" for dtype, count in counts.items()
    )
    lines.append(f"{len(content.tensors)} tensors, {sizes}")
    return "\n".join(lines)


def _shown_fields(config: Config) -> dict[str, Any]:
    """Fields that define the function that the model computes, without those of training."""
    flat = config_fields.flatten(config)
    return {name: value for name, value in flat.items() if name.startswith(("model.", "autoencoder."))}


def difference(path: Path, other: Path) -> str:
    """How two paths differ: config, step, notes, names (published ones if either has them), shapes, dtypes, values."""
    a, b = open_content(path), open_content(other)
    lines = []
    if a.config and b.config:
        fields, others = _shown_fields(a.config), _shown_fields(b.config)
        lines += [f"config.{n}: {v!r} | {others[n]!r}" for n, v in fields.items() if v != others[n]]
    if a.step != b.step:
        lines.append(f"step: {a.step} | {b.step}")
    if a.notes and b.notes:
        lines += [f"only in {place}: {note}" for place, note in _unshared((path, a.notes), (other, b.notes))]
    if a.published != b.published:
        a, b = (c if c.published else _as_published(c) for c in (a, b))
    lines += [f"only in {place}: {name}" for place, name in _unshared((path, a.tensors), (other, b.tensors))]
    common, equal, differing = [name for name in a.tensors if name in b.tensors], 0, []
    recast = collections.defaultdict(list)
    for name in common:
        (shape, dtype), (other_shape, other_dtype) = a.tensors[name], b.tensors[name]
        if shape != other_shape:
            lines.append(f"{name}: {shape} | {other_shape}")
            continue
        if dtype != other_dtype:
            recast[f"{dtype} | {other_dtype}"].append(name)
        x, y = (np.asarray(content.read(name), np.float32) for content in (a, b))
        unequal = (x != y) & ~(np.isnan(x) & np.isnan(y))
        if unequal.any():
            # A NaN on one side counts as the largest difference.
            most = np.max(np.nan_to_num(np.abs(x[unequal] - y[unequal]), nan=np.inf, posinf=np.inf))
            differing.append((float(most), name))
        else:
            equal += 1
    lines += [f"{len(names)} tensors, first {names[0]}: {said}" for said, names in recast.items()]
    differing.sort(reverse=True)
    lines += [f"{name}: values differ by up to {most:.3g}" for most, name in differing[:SHOWN]]
    if len(differing) > SHOWN:
        lines.append(f"and {len(differing) - SHOWN} more tensors with different values")
    lines.append(f"{len(common)} tensors in both, {equal} with equal values")
    return "\n".join(lines)


def _unshared(*held: tuple[Path, Collection[str]]) -> Iterator[tuple[Path, str]]:
    """(place, name) of everything that only one of two places has."""
    for (place, ours), (_, theirs) in (held, held[::-1]):
        yield from ((place, name) for name in ours if name not in theirs)


def _as_published(content: Content) -> Content:
    """The same weights under their published names; arrays without one keep ours."""
    table = {entry.key: entry for entry in torch_layout.entries(content.config.model)}
    tensors, paths = {}, {"/".join(entry.path) for entry in table.values()}
    for key, entry in table.items():
        shape, dtype = content.tensors["/".join(entry.path)]
        tensors[key] = entry.published_shape(shape), dtype
    tensors |= {name: said for name, said in content.tensors.items() if name not in paths}

    def read(name: str) -> np.ndarray:
        entry = table.get(name)
        return entry.to_torch(content.read("/".join(entry.path))) if entry else content.read(name)

    return dataclasses.replace(content, published=True, tensors=tensors, read=read)
