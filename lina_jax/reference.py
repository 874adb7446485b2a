"""Statistics of real images to compare samples with: read from an npz file in ADM's format, or computed once."""

import dataclasses
import functools
import itertools
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lina_jax import featurise, output_files
from lina_jax.errors import UserError
from lina_jax.featurise import ChunkStore, Network
from lina_jax.image_metrics import NEIGHBOURS, Frechet, Gaussian, RunningCovariance
from lina_jax.image_sources import StoredImages, npz_array, open_images
from lina_jax.state import Blueprint

IMAGES = 10_000  # stored with computed statistics, for precision and recall; as many as in ADM's files


@dataclasses.dataclass(frozen=True)
class Reference:
    """Statistics, and `features` (M, 2048) of single images; each is None if absent.

    What is computed from images is None in processes other than 0.
    """

    facts: Mapping[str, Any]
    pool: Gaussian | None = None
    spatial: Gaussian | None = None
    features: np.ndarray | None = None

    @functools.cached_property
    def distances(self) -> dict[str, Frechet]:
        """The distances 'fid' and 'sfid', as far as there are statistics for them."""
        gaussians = {"fid": self.pool, "sfid": self.spatial}
        return {name: Frechet(gaussian) for name, gaussian in gaussians.items() if gaussian}


def is_stored(path: Path) -> bool:
    """Whether the file holds statistics, which then need not be computed. Raises UserError if it is damaged."""
    return path.is_file() and path.suffix == ".npz" and npz_array(path, "mu") is not None


def unavailable(path: Path | None, metrics: Iterable[str]) -> dict[str, str]:
    """Metrics that this reference (None: there is none) has no statistics or images for, and what it lacks."""
    if path and not is_stored(path):
        return {}
    needed = {"fid": ("mu", "sigma"), "sfid": ("mu_s", "sigma_s"), "precision": ("arr_0",), "recall": ("arr_0",)}
    absent = {name: [a for a in needed.get(name, ()) if path is None or npz_array(path, a) is None] for name in metrics}
    return {
        name: f"{path} has no {' and '.join(arrays)}" if path else "no --reference"
        for name, arrays in absent.items()
        if arrays
    }


def check_count(named: str, count: int, path: Path) -> None:
    """Raises UserError if the samples are too few for precision and recall and the reference has images for these."""
    if count <= NEIGHBOURS and (not is_stored(path) or npz_array(path, "arr_0") is not None):
        raise UserError(f"{named}: more than {NEIGHBOURS} are needed for precision and recall ({path} has images)")


def opened(
    path: Path,
    network: Network,
    *,
    per_device: int,
    work: Path | None,
    images: bool,
    split: str = "train",
    count: int = 0,
    out: Path | None = None,
    blueprint: Blueprint | None = None,
) -> Callable[[], Reference]:
    """A function that returns the reference: read from an npz file, or computed from images without statistics.

    Statistics are computed from the first `count` images (0: all) in a fixed random order, and written to `out` if it
    is given; this needs `work`, which keeps finished chunks. `images`: the features of single images are needed. A
    dataset of latents needs the `blueprint` of a run with their autoencoder.

    Raises UserError at once if `path` is not a reference, was made with other weights of Inception, or has too few
    images. The function raises it for images that cannot be read.
    """
    if not is_stored(path):
        # In random order, as the first of them represent all in precision and recall.
        source = open_images(path, network.mesh, split, blueprint, in_order=False)
        if count > source.count:
            raise UserError(f"--reference_number={count}: there are only {source.count} images")
        _check_images(path, count or source.count, images)
        return functools.partial(_computed, source, network, per_device, work, count or source.count, out)
    made_with = npz_array(path, "inception")
    if made_with is not None and str(made_with) != network.digest:
        raise UserError(f"{path} was made with different weights of Inception v3 ({made_with}, here {network.digest})")
    statistics = {name: npz_array(path, name) for name in ("mu", "sigma", "mu_s", "sigma_s")}
    facts = {"file": str(path)}
    if (autoencoder := npz_array(path, "reconstructed_by")) is not None:
        facts["reconstructed_by"] = str(autoencoder)
    pool, spatial = _gaussian(path, statistics, "mu", "sigma"), _gaussian(path, statistics, "mu_s", "sigma_s")
    for gaussian, width, features in ((pool, network.widths.pool, "mu"), (spatial, network.widths.spatial, "mu_s")):
        if gaussian and len(gaussian.mean) != width:
            raise UserError(f"{path}: {features} is of {len(gaussian.mean)} features, these weights have {width}")
    reference = Reference(facts, pool, spatial)
    if not images or npz_array(path, "arr_0") is None:
        return lambda: reference
    source = open_images(path, network.mesh)
    _check_images(path, source.count, images)
    return functools.partial(_with_features, reference, source, network, per_device, work)


def load(path: Path, network: Network, **options) -> Reference:
    """Read or compute the reference at once; the options are those of `opened`."""
    return opened(path, network, **options)()


def _with_features(
    reference: Reference, source: StoredImages, network: Network, per_device: int, work: Path | None
) -> Reference:
    store = ChunkStore(work, {"inception": network.digest, **source.facts})
    found = [
        chunk.features.pool
        for chunk in featurise.chunks(
            source, network, network.mesh, per_device, store, count=source.count, kept=0, name="reference"
        )
    ]
    return dataclasses.replace(reference, features=np.concatenate(found) if found else None)


def _check_images(path: Path, count: int, images: bool) -> None:
    """Raises UserError if a reference has too few images."""
    least = NEIGHBOURS + 1 if images else 2
    if count < least:
        raise UserError(f"{path}: {count} images; a reference needs at least {least}")


def _gaussian(path: Path, arrays: Mapping[str, np.ndarray | None], mean: str, covariance: str) -> Gaussian | None:
    if arrays[mean] is None or arrays[covariance] is None:
        return None
    gaussian = Gaussian(np.asarray(arrays[mean], np.float64), np.asarray(arrays[covariance], np.float64))
    shapes = gaussian.mean.shape, gaussian.covariance.shape
    if len(shapes[0]) != 1 or shapes[1] != shapes[0] * 2:
        raise UserError(f"{path}: {mean} is {shapes[0]} and {covariance} {shapes[1]}, expected (D,) and (D, D)")
    if not (np.isfinite(gaussian.mean).all() and np.isfinite(gaussian.covariance).all()):
        raise UserError(f"{path}: {mean} or {covariance} has values that are not finite")
    return gaussian


def _computed(
    source: StoredImages, network: Network, per_device: int, work: Path | None, count: int, out: Path | None
) -> Reference:
    facts = {"images": count, "inception": network.digest, **source.facts}
    kept = min(count, IMAGES) if out else 0
    store = ChunkStore(work, {**facts, "kept": kept})
    moments, features = None, []
    for chunk in featurise.chunks(
        source, network, network.mesh, per_device, store, count=count, kept=kept, name="reference"
    ):
        moments = moments or [RunningCovariance(part.shape[1]) for part in chunk.features[:2]]
        for sums, part in zip(moments, chunk.features, strict=False):
            sums.add(part)
        if chunk.start < IMAGES:
            features.append(chunk.features.pool)
    if moments is None:
        return Reference(facts)
    pool, spatial = (sums.gaussian() for sums in moments)
    if out:
        size = next(iter(store)).images.shape[1:]
        portions = (chunk.images for chunk in itertools.takewhile(lambda chunk: chunk.start < kept, store))
        statistics = {"mu": pool.mean, "sigma": pool.covariance, "mu_s": spatial.mean, "sigma_s": spatial.covariance}
        statistics |= {name: np.array(facts[name]) for name in ("inception", "reconstructed_by") if name in facts}
        write_npz(out, statistics, {"arr_0": ((kept, *size), portions)})
    return Reference(facts, pool, spatial, np.concatenate(features)[:IMAGES])


def write_npz(
    path: Path, arrays: Mapping[str, np.ndarray], images: Mapping[str, tuple[tuple[int, ...], Iterable[np.ndarray]]]
) -> None:
    """Write an npz file of arrays, and of uint8 images given as (shape, portions), which are never all in memory."""
    with (
        output_files.new_file(path) as partial,
        zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED, allowZip64=True) as archive,
    ):
        for name, (shape, portions) in images.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
                for portion in portions:
                    file.write(np.ascontiguousarray(portion, np.uint8).tobytes())
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.asarray(array), allow_pickle=False)
