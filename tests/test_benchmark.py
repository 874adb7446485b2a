"""Every measurement runs and prints what it promises; the figures themselves are not tested."""

import json

import pytest

from lina_jax import benchmark_data


def test_data_from_the_command_line(run_module, tmp_path):
    result = run_module("benchmark", "data", f"--out={tmp_path}", "--parts=memory", "--memory_batches=20")
    assert result.returncode == 0, result.stderr
    (row,) = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(row["mb_by_tenth"]) == 11
    assert (row["name"], row["batches"], row["threads"]) == ("memory", 20, 2)


def test_comparisons_and_startup(tmp_path, monkeypatch):
    for name, value in {"LATENTS": 8, "PICTURES": 8, "MANY": 8 * benchmark_data.PER_SHARD}.items():
        monkeypatch.setattr(benchmark_data, name, value)
    settings = benchmark_data.Settings(seconds=0.05, repeats=1, batch_size=4, threads=2, prefetch=2, memory_batches=20)
    rows = [row for part in ("latents", "jpeg", "startup") for row in benchmark_data.PARTS[part](tmp_path, settings)]
    names = ["latents", "latents_raw", "latents_raw_lists", "jpeg", "jpeg_bare", "startup", "startup"]
    assert [row["name"] for row in rows] == names
    assert all(row["records_per_s"] > 0 for row in rows[:5])
    assert {row["records"] for row in rows[5:]} == {8 * benchmark_data.PER_SHARD}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "the first argument must be one of: data"),
        (("dta",), "the first argument must be one of: data"),
        (("data", "more"), "unexpected argument 'more'"),
        (("data", "--parts=jpg"), "--parts=jpg: allowed are latents, jpeg, startup, memory"),
    ],
)
def test_mistakes_are_one_line(run_module, arguments, message):
    result = run_module("benchmark", *arguments)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert message in result.stderr
