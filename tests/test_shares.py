"""Processes that prepare one dataset know their share, use one GPU each, and notice if no directory is shared."""

import jax
import pytest

from lina_jax import hosts, work_units
from lina_jax.errors import UserError
from lina_jax.prepare import Settings, Share, prepare
from lina_jax.shares import resolve_share, take_gpu

SMALL = Settings(resolution=8, train=8, validation=2)


def array(**values) -> dict[str, str]:
    return {f"SLURM_ARRAY_TASK_{name.upper()}": str(value) for name, value in values.items()}


@pytest.mark.parametrize(
    ("environment", "share"),
    [
        ({}, Share(0, 1)),
        ({"SLURM_PROCID": "2", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "8"}, Share(2, 8)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, Share(0, 1)),  # a batch script, or a shell
        (array(id=5, min=3, max=6, count=4), Share(2, 4)),
        (array(id=20, min=0, max=30, count=4, step=10), Share(2, 4)),
        (array(id=1, min=0, max=3, count=4) | {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}, Share(3, 8)),
    ],
)
def test_a_process_finds_its_share(monkeypatch, environment, share):
    monkeypatch.setattr("os.environ", environment)
    assert resolve_share(None, None) == share
    assert resolve_share(1, 3) == Share(1, 3)
    with pytest.raises(UserError, match="--process_index=3 --process_count=3"):
        resolve_share(3, 3)


def test_a_slurm_array_with_holes_is_refused(monkeypatch):
    monkeypatch.setattr("os.environ", array(id=5, min=5, max=9, count=2))
    with pytest.raises(UserError, match="array of 2 tasks from 5 to 9 has gaps"):
        resolve_share(None, None)


TASKS = {"SLURM_LOCALID": "3", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "2"}


@pytest.mark.parametrize(
    ("environment", "gpu"),
    [
        ({}, None),
        (TASKS, "3"),
        (TASKS | {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, "3"),
        (TASKS | {"CUDA_VISIBLE_DEVICES": "3"}, None),  # bound by SLURM
        (TASKS | {"SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "2"}, None),  # one task per node
        ({"SLURM_LOCALID": "0"}, None),  # a batch script
    ],
)
def test_tasks_of_one_node_take_a_gpu_each(monkeypatch, environment, gpu):
    """Otherwise, each would allocate the memory of all GPUs of the node."""
    taken = {}
    monkeypatch.setattr(jax.config, "update", taken.__setitem__)
    take_gpu(environment)
    assert taken.get("jax_cuda_visible_devices") == taken.get("jax_rocm_visible_devices") == gpu


@pytest.fixture
def joined(monkeypatch):
    """Pretends to be one of several processes, of which the others do nothing; returns the points where it waited."""
    met = []
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(hosts, "check_shared", lambda what, look: met.append((what, look())))
    monkeypatch.setattr(hosts, "barrier", met.append)
    return met


def test_process_0_begins_the_directory_that_others_look_for(tmp_path, joined):
    assert prepare(tmp_path / "other", SMALL, share=Share(1, 2)) is None
    assert joined == [("--out", "absent"), "units are made"]
    joined.clear()
    prepare(tmp_path / "first", SMALL)
    prepare(tmp_path / "first", SMALL)
    assert joined == [("--out", "begun"), "units are made", ("--out", "finished")]


def test_directories_that_are_not_shared_are_refused_before_work(tmp_path, joined, monkeypatch):
    def refuse(*_):
        raise UserError("process 1 sees --out absent")

    monkeypatch.setattr(hosts, "check_shared", refuse)
    with pytest.raises(UserError, match="process 1 sees"):
        prepare(tmp_path / "out", SMALL, share=Share(1, 2))
    assert list(tmp_path.iterdir()) == []


def test_units_that_do_not_appear_are_an_error(tmp_path, joined):
    """As if each process had a directory of its own, left by an earlier try with the same settings."""
    with pytest.raises(UserError, match=r"1 of 2 units are not in .*out.partial: all processes must work in one"):
        prepare(tmp_path / "out", SMALL, share=Share(0, 2))


def test_process_0_alone_assembles(tmp_path, joined, monkeypatch):
    assert prepare(tmp_path / "out", SMALL, share=Share(0, 1))
    monkeypatch.setattr(work_units.WorkDirectory, "assemble", lambda *_: pytest.fail("another one assembled"))
    assert prepare(tmp_path / "other", SMALL, share=Share(1, 1)) is None
