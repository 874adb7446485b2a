"""Profiler traces of the requested steps."""

import pytest

from lina_jax import metrics
from lina_jax.errors import UserError
from lina_jax.train import train

pytestmark = pytest.mark.usefixtures("train_on_one_device", "traced_once")


def test_chosen_steps_are_profiled(tiny_text, tmp_path):
    """Even if the run ends before the last of them."""
    train(tiny_text(steps=3, log={"profile_start": 2, "profile_steps": 20}), tmp_path / "run")
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))


def test_steps_to_trace_need_a_first_one(tiny_text, tmp_path):
    with pytest.raises(UserError, match=r"log\.profile_steps=2: set log\.profile_start, too"):
        train(tiny_text(log={"profile_steps": 2}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_trace_is_kept_whatever_ends_the_run(tiny_text, tmp_path, monkeypatch):
    """Here, a step that cannot be logged ends it."""

    def fail(*_):
        raise UserError("no more")

    config = tiny_text(steps=5, log={"profile_start": 2, "profile_steps": 20, "every": 3})
    monkeypatch.setattr(metrics.Writer, "scalars", fail)
    with pytest.raises(UserError, match="no more"):
        train(config, tmp_path / "run")
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))


def test_a_run_resumed_within_profiled_steps_goes_on(tiny_text, tmp_path):
    train(tiny_text(steps=3), tmp_path / "run")
    log = {"profile_start": 2, "profile_steps": 3}
    assert int(train(tiny_text(steps=6, log=log), tmp_path / "run").step) == 6
