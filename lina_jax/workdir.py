"""What a training directory says of itself: its config, and which checkpoints are there."""

import dataclasses
import json
from pathlib import Path

import jax
from absl import logging

from lina_jax import config as config_lib
from lina_jax import integrity, places
from lina_jax.config import Config
from lina_jax.errors import UserError


def is_imported(checkpoint: Path) -> bool:
    """Whether a checkpoint holds weights alone."""
    return checkpoint.is_dir() and not {"ema", "progress"} & integrity.saved_items(checkpoint)


def saved_checkpoints(workdir: Path) -> list[Path]:
    """The folders of a workdir's checkpoints, whole or damaged, which is not looked at."""
    return [path for path in (workdir / "checkpoints").glob("[0-9]*") if path.name.isdigit()]


def saved_steps(workdir: Path) -> list[int]:
    """The steps of a workdir's checkpoints, whole or damaged, in order."""
    return sorted(int(path.name) for path in saved_checkpoints(workdir))


def check_config(workdir: Path, config: Config, *, allow_changes: bool = False) -> None:
    """Check that a workdir may go on with a config.

    Raises UserError naming each field that changes the function, the optimiser or the data order, unless told
    otherwise. Imported weights, before they are trained, have a function only. What is missing of an earlier run is
    told.
    """
    saved = saved_checkpoints(workdir)
    if not (workdir / "config.json").exists():
        if saved and jax.process_index() == 0:
            logging.warning("%s has checkpoints but no config.json: are they of this config?", workdir)
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


def write_config(workdir: Path, config: Config) -> None:
    """Bind a workdir to a config."""
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        places.write_json(workdir / "config.json", dataclasses.asdict(config))


def load_config(workdir: Path) -> Config:
    """The config that a workdir was trained with. Raises UserError when there is none, or none that is valid."""
    path = workdir / "config.json"
    if not path.is_file():
        raise UserError(f"{workdir} is not a training directory: it has no config.json")
    try:
        return config_lib.freeze(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:  # no JSON, no text
        raise UserError(f"{path} is corrupt: {error}") from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
