"""The config of a training directory, and a list of its checkpoints."""

import dataclasses
import itertools
import json
from pathlib import Path

import jax
from absl import logging

from lina_jax import config as config_lib
from lina_jax import integrity, output_files
from lina_jax.config import Config
from lina_jax.errors import UserError
from lina_jax.metrics import rows_as_written

_DATA = "data.json"


def is_imported(checkpoint: Path) -> bool:
    """Whether a checkpoint holds only weights."""
    return checkpoint.is_dir() and not {"ema", "progress"} & integrity.saved_items(checkpoint)


def kind_of_weights(checkpoint: Path, *, ema: bool) -> str:
    """ema | raw: which weights `Checkpoints.restore_weights` returns; imported weights have no EMA."""
    return "ema" if ema and not is_imported(checkpoint) else "raw"


def saved_checkpoints(workdir: Path) -> list[Path]:
    """The folders of a workdir's checkpoints, without a check for damage."""
    return [path for path in (workdir / "checkpoints").glob("[0-9]*") if path.name.isdigit()]


def saved_steps(workdir: Path) -> list[int]:
    """The steps of a workdir's checkpoints in order, without a check for damage."""
    return sorted(int(path.name) for path in saved_checkpoints(workdir))


def check_config(workdir: Path, config: Config, *, allow_changes: bool = False) -> None:
    """Check that a run with this config may resume in a workdir.

    Unless `allow_changes`, raises UserError that names each field that changes the function, the optimizer or the data
    order (for imported weights that are not trained yet: only the function). Warns if parts of an earlier run are
    missing.
    """
    saved = saved_checkpoints(workdir)
    if not (workdir / "config.json").exists():
        if saved and jax.process_index() == 0:
            logging.warning("%s has checkpoints but no config.json: do they belong to this config?", workdir)
        return
    if not saved and (workdir / "metrics.jsonl").exists() and jax.process_index() == 0:
        logging.warning("%s has metrics.jsonl of an earlier run, but none of its checkpoints: starting over", workdir)
    changed = config_lib.differences(load_config(workdir), config)
    if saved and all(is_imported(path) for path in saved):
        changed = [field for field in changed if field.startswith(("model.", "autoencoder."))]
    if changed and not allow_changes:
        raise UserError(
            f"{workdir} belongs to another config: {'; '.join(changed)} "
            "(choose another --workdir, or pass --allow_config_change)"
        )


def check_data(workdir: Path, manifest: str, *, allow_changes: bool = False) -> None:
    """Check that a run in a workdir resumes on the records that it began with.

    `manifest` has digests of the metadata of the training data, in order (`data.Records`). Raises UserError if it has
    changed, unless `allow_changes`.
    """
    path = workdir / _DATA
    if allow_changes or not saved_checkpoints(workdir) or not path.exists():
        return
    if json.loads(path.read_text())["train"] != manifest:
        raise UserError(
            f"data.path holds other records than those that {workdir} was trained on, or the same in another order "
            "(choose another --workdir, or pass --allow_config_change)"
        )


def set_aside_logs(workdir: Path) -> None:
    """Move logs and previews of an earlier run, of which no checkpoint is left, to WORKDIR/earlier/0, 1, ..."""
    if jax.process_index() == 0 and any(rows_as_written(workdir / "metrics.jsonl")):
        place = next(path for i in itertools.count() if not (path := workdir / "earlier" / str(i)).exists())
        place.mkdir(parents=True)
        for name in ("previews", "events", "metrics.jsonl"):  # the last one is the sign that there is something to move
            if (workdir / name).exists():
                (workdir / name).rename(place / name)


def write_data(workdir: Path, manifest: str) -> None:
    """Write what identifies the training records of a workdir, which later runs must match."""
    if jax.process_index() == 0:
        output_files.write_json(workdir / _DATA, {"train": manifest})


def write_config(workdir: Path, config: Config) -> None:
    """Write the config of a workdir, which later runs must match."""
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        output_files.write_json(workdir / "config.json", dataclasses.asdict(config))


def load_config(workdir: Path) -> Config:
    """The config that a workdir was trained with. Raises UserError if there is no valid one."""
    path = workdir / "config.json"
    if not path.is_file():
        raise UserError(f"{workdir} is not a training directory: it has no config.json")
    try:
        return config_lib.freeze(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:  # not JSON, or not UTF-8
        raise UserError(f"{path} is corrupt: {error}") from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
