"""Image quality: FID and related metrics of many images, drawn or read, both during training and offline."""

import dataclasses
import shlex
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from lina_jax import config as config_lib
from lina_jax import config_fields, drawing, featurise, image_metrics, image_sources, pictures
from lina_jax import reference as reference_lib
from lina_jax.config import EvalConfig
from lina_jax.data import Records
from lina_jax.errors import UserError
from lina_jax.featurise import Chunk, ChunkStore, Network
from lina_jax.image_metrics import GROUPS, InceptionScore, RunningCovariance, Value
from lina_jax.image_sources import Source
from lina_jax.reference import Reference, write_npz
from lina_jax.state import Blueprint, Tree

METRICS = ("fid", "sfid", "inception_score", "precision", "recall")
_DIGITS = 4  # decimals reported; standard errors are far larger


@dataclasses.dataclass(frozen=True)
class Quality:
    """The result of a measurement, in process 0."""

    values: Mapping[str, Value]
    not_measured: Mapping[str, str]  # metric: why it was not measured
    count: int
    images: np.ndarray  # the first few (N, H, W, 3) uint8
    reference: Mapping[str, Any] | None  # what identifies the reference

    def as_json(self) -> dict[str, Any]:
        """The result as an object for JSON."""
        values = {
            name: {kind: None if number is None else round(number, _DIGITS) for kind, number in value._asdict().items()}
            for name, value in self.values.items()
        }
        lacking = {"not_measured": dict(self.not_measured)} if self.not_measured else {}
        return {**values, "images": self.count, **lacking, "reference": self.reference}

    def scalars(self) -> dict[str, float]:
        """The same for logs: 'quality/fid' and, if known, 'quality/fid_standard_error'."""
        values = self.as_json()
        scalars = {f"quality/{name}": values[name]["value"] for name in self.values}
        errors = {f"quality/{name}_standard_error": values[name]["standard_error"] for name in self.values}
        return scalars | {name: error for name, error in errors.items() if error is not None}


class Collector:
    """Reduces features as they arrive."""

    def __init__(self, count: int, wanted: Collection[str]):
        self._count, self._wanted = count, wanted
        self._pool: list[RunningCovariance] = []
        self._spatial: list[RunningCovariance] = []
        self._score = InceptionScore()
        self._features: np.ndarray | None = None  # (count, D) as soon as D is known
        self._images: list[np.ndarray] = []

    def add(self, chunk: Chunk) -> None:
        pool, spatial, logits = chunk.features
        if "fid" in self._wanted:
            self._to_groups(self._pool, chunk.start, pool)
        if "sfid" in self._wanted:
            self._to_groups(self._spatial, chunk.start, spatial)
        if "inception_score" in self._wanted:
            self._score.add(logits)
        if {"precision", "recall"} & set(self._wanted):
            if self._features is None:
                self._features = np.empty((self._count, pool.shape[1]), pool.dtype)
            self._features[chunk.start : chunk.start + len(pool)] = pool
        if chunk.start < pictures.SHOWN:
            self._images.append(
                chunk.images[: pictures.SHOWN - chunk.start].copy()
            )  # a view would keep the whole chunk

    def _to_groups(self, groups: list[RunningCovariance], start: int, rows: np.ndarray) -> None:
        """Add rows to their groups: of N images, number i is in group i * GROUPS // N."""
        if not groups:
            groups += [RunningCovariance(rows.shape[1]) for _ in range(GROUPS)]
        group = (start + np.arange(len(rows))) * GROUPS // self._count
        for number in np.unique(group):
            groups[number].add(rows[group == number])

    def images(self) -> np.ndarray:
        return np.concatenate(self._images)

    def values(self, reference: Reference | None) -> tuple[dict[str, Value], dict[str, str]]:
        """(the wanted metrics that could be computed, why the others could not)."""
        values, not_measured = {}, {}
        for name, groups in (("fid", self._pool), ("sfid", self._spatial)):
            if name not in self._wanted:
                continue
            if reference is None or name not in reference.distances:
                not_measured[name] = (
                    "the reference has no statistics of these features" if reference else "no reference"
                )
            else:
                values[name] = image_metrics.jackknife(groups, reference.distances[name])
        if "inception_score" in self._wanted:
            values["inception_score"] = self._score.value()
        if names := [name for name in ("precision", "recall") if name in self._wanted]:
            if reference is None or reference.features is None:
                reason = "the reference has no images (arr_0)" if reference else "no reference"
                not_measured |= dict.fromkeys(names, reason)
            else:
                both = image_metrics.precision_recall(reference.features, self._features)
                values |= {
                    name: value for name, value in zip(("precision", "recall"), both, strict=True) if name in names
                }
        return values, not_measured


def measure(
    source: Source,
    network: Network | None,
    reference: Reference | None,
    mesh: Mesh,
    *,
    count: int,
    per_device: int,
    wanted: Collection[str] = METRICS,
    work: Path | None = None,
    npz: Path | None = None,
    labels: np.ndarray | None = None,
) -> Quality | None:
    """Measure the first `count` images of a source; returns None in processes other than 0.

    `work` keeps finished chunks, from which a later call resumes. The images are written to `npz` in ADM's format, with
    `labels` (N,) if given; this needs `work`. Without a network nothing is measured.

    Raises UserError if the images are not of one size, or a kept chunk is damaged.
    """
    facts = {"count": count, "inception": network and network.digest, "npz": bool(npz), **source.facts}
    store = ChunkStore(work, facts)
    collector = Collector(count, wanted if network else ())
    kept = count if npz else pictures.SHOWN
    for chunk in featurise.chunks(source, network, mesh, per_device, store, count=count, kept=kept, name="images"):
        collector.add(chunk)
    if jax.process_index() != 0:
        return None
    values, not_measured = collector.values(reference)
    images = collector.images()
    if npz:
        arrays = {} if labels is None else {"arr_1": labels}
        write_npz(npz, arrays, {"arr_0": ((count, *images.shape[1:]), (chunk.images for chunk in store))})
    if network is None:
        not_measured = dict.fromkeys(METRICS, "no weights of Inception v3 (--inception)")
    return Quality(values, not_measured, count, images, dict(reference.facts) if reference else None)


class DrawnQuality:
    """Image metrics of pictures that a run's weights draw, with the same numbers and conditions every time."""

    def __init__(self, blueprint: Blueprint, records: Records | None):
        """The settings are those of `config.eval`. Raises UserError if something cannot be read or drawn."""
        config = blueprint.config.eval
        if missing := drawing.missing_encoder(blueprint.config):
            raise UserError(f"eval.images={config.images}: {missing}")
        self._blueprint, self._config = blueprint, config
        path = Path(config.reference).expanduser()
        if config.reference:
            _check_stored(path, config)
            reference_lib.check_count(f"eval.images={config.images}", config.images, path)
        self._network = Network(Path(config.inception).expanduser(), blueprint.mesh)
        self._reference = None
        if config.reference:
            self._reference = reference_lib.load(
                path, self._network, per_device=config.per_device, work=None, images=True
            )
        # What the weights of a step depend on, and how they are sharded; the source adds how it draws.
        fields = config_fields.flatten(blueprint.config).items()
        trained = {name: value for name, value in fields if not config_lib.free_on_resume(name)}
        facts = {"config": trained, "mesh": dict(blueprint.mesh.shape)}
        self._source = image_sources.generated_images(
            blueprint, blueprint.config.sample, records, config.images, seed=0, facts=facts
        )

    def measure(self, params: Tree, frozen: Tree, *, step: int, work: Path | None = None) -> Quality | None:
        """The quality of the weights after `step`; None in processes other than 0. `work` keeps finished chunks."""
        self._source.weights, self._source.facts["step"] = (params, frozen), step
        return measure(
            self._source,
            self._network,
            self._reference,
            self._blueprint.mesh,
            count=self._config.images,
            per_device=self._config.per_device,
            work=work,
        )


def _check_stored(path: Path, config: EvalConfig) -> None:
    """Raises UserError unless the reference has statistics: each start of a run would have to compute them again."""
    if not path.exists():
        raise UserError(f"eval.reference={config.reference}: no such file")
    if reference_lib.is_stored(path):
        return
    flags_given = {"samples_from": path, "number": 10, "inception": config.inception, "reference": path, "out": "DIR"}
    command = ["python", "-m", "lina_jax.evaluate", *(f"--{name}={value}" for name, value in flags_given.items())]
    raise UserError(
        f"eval.reference={config.reference}: training needs an .npz file with mu and sigma; "
        f"to create DIR/reference.npz, run {shlex.join(command)}"
    )


def check_metrics(names: Collection[str]) -> None:
    if unknown := [name for name in names if name not in METRICS]:
        raise UserError(f"--metrics={','.join(names)}: {unknown[0]} is unknown, expected some of {', '.join(METRICS)}")
