"""A workdir is bound to the config that it was created with."""

import dataclasses
import errno
import os

import pytest

from lina_jax.config import MeshConfig
from lina_jax.errors import UserError
from lina_jax.metrics import read_jsonl
from lina_jax.train import train
from lina_jax.workdir import check_config, load_config, set_aside_logs, write_config

pytestmark = pytest.mark.usefixtures("train_on_one_device")


@pytest.fixture(scope="module")
def config(tiny_text):
    return tiny_text()


def test_a_wrong_workdir_is_noticed_before_records_are_opened(config, tmp_path):
    write_config(tmp_path, config)
    data = dataclasses.replace(config.data, path="no/such/place")
    with pytest.raises(UserError, match="belongs to another config"):
        train(dataclasses.replace(config, seed=9, data=data), tmp_path)


def test_a_place_where_no_checkpoint_could_be_finished_is_refused(config, tmp_path, monkeypatch):
    def rename(before, after):
        raise OSError(errno.EMFILE, "Too many open files")  # what buckets without directories say

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(UserError, match=r"--workdir=.*cannot be renamed there \(Too many open files\)"):
        train(config, tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_workdir_of_another_config_is_refused_by_field(config, tmp_path):
    write_config(tmp_path, config)
    other = dataclasses.replace(config, optim=dataclasses.replace(config.optim, learning_rate=2e-3), seed=9)
    with pytest.raises(UserError, match=r"seed: 1 -> 9; optim.learning_rate: 0.001 -> 0.002 .*--allow_config_change"):
        train(other, tmp_path)
    assert load_config(tmp_path) == config


def test_a_workdir_of_another_config_is_taken_on_request(config, tmp_path):
    write_config(tmp_path, config)
    other = dataclasses.replace(config, seed=9)
    with pytest.raises(UserError, match="seed: 1 -> 9"):
        check_config(tmp_path, other)
    check_config(tmp_path, other, allow_changes=True)


def test_steps_logging_and_mesh_may_change(config, tmp_path):
    write_config(tmp_path, config)
    other = dataclasses.replace(config, steps=60, mesh=MeshConfig(data=1), log=dataclasses.replace(config.log, every=2))
    check_config(tmp_path, other)


def test_what_is_missing_of_an_earlier_run_is_told(config, tmp_path, caplog):
    (tmp_path / "checkpoints" / "20").mkdir(parents=True)
    check_config(tmp_path, config)
    assert "has checkpoints but no config.json" in caplog.text
    write_config(tmp_path, config)
    (tmp_path / "checkpoints" / "20").rmdir()
    (tmp_path / "metrics.jsonl").write_text("{}")
    check_config(tmp_path, config)
    assert "none of its checkpoints: starting over" in caplog.text


def test_logs_of_a_run_without_checkpoints_do_not_mix_with_those_of_the_next(tmp_path):
    for run in range(2):
        set_aside_logs(tmp_path)
        (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1, "loss": {run}}}\n')
        (tmp_path / "previews").mkdir()
    set_aside_logs(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["earlier"]
    rows = [read_jsonl(tmp_path / "earlier" / str(run) / "metrics.jsonl") for run in range(2)]
    assert rows == [[{"step": 1, "loss": run}] for run in range(2)]
    assert (tmp_path / "earlier" / "1" / "previews").is_dir()


def test_a_directory_without_config_is_no_workdir(tmp_path):
    with pytest.raises(UserError, match=r"is not a training directory: it has no config\.json"):
        load_config(tmp_path)
