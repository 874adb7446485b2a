"""The reported speed counts training time only, however often it is reported; metrics.jsonl is valid JSON."""

import json
import types

import jax
import pytest

from lina_jax import metrics
from lina_jax.flops import training_flops


@pytest.fixture
def clock(monkeypatch):
    clock = types.SimpleNamespace(now=1000.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(metrics, "time", clock)
    return clock


def test_speed_is_that_since_it_was_last_told(tiny, clock):
    config = tiny(batch_size=8)
    throughput = metrics.Throughput(config, step=10)
    clock.now += 2
    assert throughput.rates(14) == {
        "images_per_s": pytest.approx(16),
        "model_flops_per_s": pytest.approx(16 * training_flops(config.model, config.loss)),
    }
    clock.now += 0.5
    assert throughput.rates(15)["images_per_s"] == pytest.approx(16)


def test_time_that_is_not_training_does_not_count(tiny, clock):
    throughput = metrics.Throughput(tiny(batch_size=8), step=0)
    clock.now += 1
    with throughput.paused():
        clock.now += 100
    clock.now += 1
    assert throughput.rates(2)["images_per_s"] == pytest.approx(8)
    clock.now += 100
    throughput.restart()
    clock.now += 1
    assert throughput.rates(3)["images_per_s"] == pytest.approx(8)


def test_mfu_is_the_share_of_what_all_devices_could(tiny, clock):
    throughput = metrics.Throughput(tiny(log={"peak_flops": 1e9}), step=0)
    clock.now += 1
    rates = throughput.rates(1)
    assert rates["mfu"] == pytest.approx(rates["model_flops_per_s"] / (1e9 * jax.device_count()))


def test_lines_that_are_no_rows_are_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n5\n{"loss": 3}\n{"step": 2, "lo')
    assert metrics.read_jsonl(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.0}]


def test_what_is_not_finite_is_written_as_null(tmp_path):
    """Python would write NaN, which many JSON parsers refuse."""
    writer = metrics.Writer(tmp_path)
    writer.scalars(3, {"loss": float("nan"), "grad_norm": float("inf"), "learning_rate": 0.5})
    writer.close()

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    (line,) = writer.path.read_text().splitlines()
    row = json.loads(line, parse_constant=refuse)
    assert row == {"step": 3, "loss": None, "grad_norm": None, "learning_rate": 0.5}
