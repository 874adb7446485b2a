"""Studies: effects over pairs of runs, power laws with their uncertainty, no comparison of unequal budgets."""

import csv
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lina_jax import flops, study
from lina_jax.errors import UserError
from lina_jax.workdir import write_config

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "launch" / "study.sh"
ABLATION = ROOT / "configs" / "ablation.py"


def printed(*flags):
    command = [SCRIPT, "--dry-run", "--name=s", "--dir=runs/s", *flags, "--", "--config.steps=20"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def widths():
    """(widths that train on a CPU, published widths)."""
    spec = importlib.util.spec_from_file_location("ablation", ABLATION)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SMALL, tuple(width for width in module.WIDTHS if width not in module.SMALL)


@pytest.fixture
def runs_of(tiny, tmp_path):
    """Write evaluated runs, each given as (loss, seed, model fields); `last` changes other fields of the last one."""

    def write(*runs, step=6, **last):
        for number, (loss, seed, model) in enumerate(runs):
            workdir = tmp_path / "study" / f"run{number}"
            others = last if number == len(runs) - 1 else {}
            config = tiny(seed=seed, model={"kv_gate": "none", "depthwise_conv": False} | model, **others)
            write_config(workdir, config)
            rows = [{"step": 3, "images_per_s": 40.0}, {"step": 6, "images_per_s": 60.0}]
            (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            (workdir / "evaluation").mkdir()
            score = {"step": step + number * (step != 6), "validation": {"loss_ema": loss}}
            (workdir / "evaluation" / "score.json").write_text(json.dumps(score))
        return tmp_path / "study"

    return write


def test_effects_are_means_over_pairs_that_differ_in_one_choice(runs_of):
    conv = {"depthwise_conv": True}
    other = {"normalization": "subtraction"}
    directory = runs_of(
        (1.0, 0, {}), (0.8, 0, conv), (1.2, 1, {}), (0.9, 1, conv), (1.1, 0, other), (9.0, 7, other | conv)
    )  # fmt: skip
    found = {(e.choice, e.after): e for e in study.effects(study.read(directory)) if e.measure == "loss"}
    assert set(found) == {("convolution", "conv"), ("normalization", "subtraction")}
    change = found["convolution", "conv"]
    assert change.difference == pytest.approx(-0.25) and change.pairs == 2  # seed 7 has no partner
    assert change.standard_error == pytest.approx(0.05)
    alone = found["normalization", "subtraction"]
    assert alone.difference == pytest.approx(0.1) and alone.pairs == 1 and alone.standard_error is None


def test_softmax_is_compared_with_plain_division(runs_of):
    directory = runs_of((1.0, 0, {}), (0.7, 0, {"attention": "softmax"}))
    (found,) = study.effects(study.read(directory))
    assert (found.choice, found.after, found.pairs) == ("attention", "softmax", 1)


def test_power_laws_are_recovered():
    x = np.array([1e6, 3e6, 1e7, 3e7])
    law = study.power_law(x, 5 * x**-0.07)
    assert (law.scale, law.exponent, law.standard_error) == pytest.approx((5, 0.07, 0), abs=1e-9)
    assert study.power_law([1e6, 1e6, 3e6], [1, 1, 0.9]) is None


def test_the_uncertainty_of_an_exponent_is_its_spread():
    rng, x = np.random.default_rng(0), np.geomspace(1e6, 1e8, 12)
    laws = [study.power_law(x, x**-0.1 * np.exp(0.02 * rng.standard_normal(12))) for _ in range(300)]
    spread = np.std([law.exponent for law in laws])
    assert np.sqrt(np.mean([law.standard_error**2 for law in laws])) == pytest.approx(spread, rel=0.15)


def test_a_study_is_tables_and_a_plot(runs_of, tiny):
    sizes = [(loss, 0, {"width": width, "head_width": width}) for loss, width in ((1.0, 16), (0.9, 32), (0.82, 64))]
    directory = runs_of(*sizes, (0.95, 1, {"width": 32, "head_width": 32}))
    write_config(directory / "begun", tiny())
    told = study.gather(directory)
    assert "4 runs of 48 images" in told and "not finished: begun" in told
    assert "| division, none, none | 32 | 2 | 0.9250 ± 0.0250 | - | - |" in told
    assert "against parameters: exponent 0." in told
    with (directory / "runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    model = tiny(model={"kv_gate": "none", "depthwise_conv": False, "width": 16, "head_width": 16})
    assert float(rows[0]["training_flops"]) == flops.training_flops(model.model, model.loss) * 48
    assert float(rows[0]["images_per_s"]) == 50 and math.isnan(float(rows[0]["fid"]))
    parameters = [int(row["parameters"]) for row in rows]
    assert parameters[0] < parameters[1] == parameters[3] < parameters[2]
    with (directory / "laws.csv").open() as file:
        assert {row["law"] for row in csv.DictReader(file)} == {
            f"division, none, none against {what}" for what in ("parameters", "training FLOPs")
        }
    assert Image.open(directory / "loss.png").width > 800


def test_a_score_that_is_of_no_step_is_named(runs_of):
    """As when images that come from no run were evaluated there."""
    directory = runs_of((1.0, 0, {}))
    (directory / "run0" / "evaluation" / "score.json").write_text('{"quality": {}}')
    with pytest.raises(UserError, match=r"run0/evaluation/score.json has no step"):
        study.read(directory)


def test_a_score_of_another_form_is_named(runs_of):
    directory = runs_of((1.0, 0, {}))
    (directory / "run0" / "evaluation" / "score.json").write_text('{"step": 6, "validation": []}')
    with pytest.raises(UserError, match=r"run0/evaluation/score.json is damaged"):
        study.read(directory)


def test_unequal_budgets_are_refused(runs_of, tmp_path):
    with pytest.raises(UserError, match=r"unequal budgets cannot be compared \(40 images: run0; 48 images: run1"):
        study.gather(runs_of((1.0, 0, {}), (0.9, 1, {}), step=5))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="contains no runs"):
        study.gather(tmp_path / "empty")


@pytest.mark.parametrize(
    ("model", "others", "told"),
    [
        ({}, {"optim": {"learning_rate": 0.5}}, r"optim.learning_rate: \S+ in run0, 0.5 in run1"),
        ({}, {"batch_size": 4}, "budgets"),
        ({}, {"data": {"path": "elsewhere"}}, r"data.path: '' in run0, 'elsewhere' in run1"),
        ({}, {"loss": {"repeat": 3}}, "loss.repeat"),
        ({}, {"ema": {"decay": 0.5}}, "ema.decay"),
        ({}, {"eval": {"examples": 3}}, "eval.examples"),
        ({"head_width": 16}, {}, r"model.head_width: \d+ in run0, 16 in run1"),
        ({"condition_depth": 2}, {}, "model.condition_depth"),
    ],
    ids=str,
)
def test_only_choices_of_a_study_may_differ(model, others, told, runs_of):
    with pytest.raises(UserError, match=told):
        study.read(runs_of((1.0, 0, {}), (0.9, 1, model), **others))


def test_a_variant_counts_once_for_each_seed(runs_of):
    with pytest.raises(UserError, match="run0 and run2 are one variant with one seed"):
        study.read(runs_of((1.0, 0, {}), (0.9, 1, {}), (0.8, 0, {})))


def test_variants_of_all_widths_have_one_budget(widths):
    for group in widths:
        variants = [f"{name}-{w}" for name in ("division-conv-head", "subtraction-none-none", "softmax") for w in group]
        study.check_variants(str(ABLATION), [*variants, f"hybrid-division-conv-none-{group[0]}"], ["--config.steps=20"])


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--config.steps=20"], r"budgets cannot be compared \(640 images: softmax-32; 15360 images: softmax-768\)"),
        (
            ["--config.steps=20", "--config.batch_size=8", "--allow_config_change"],
            r"\(model\.\w+: .* in softmax-32, .* in softmax-768\)",
        ),
        (["--config.stesp=20"], r"softmax-32: .*stesp"),
        (["--config.seed=0"], r"^--config.seed=0: a study sets this for each run"),
        (["--workdir=elsewhere"], r"^--workdir=elsewhere: a study sets this for each run"),
        (["--noconfig.model.depthwise_conv"], r"depthwise_conv: a study sets this for each run"),
    ],
    ids=str,
)
def test_variants_that_cannot_be_compared_are_refused(given, told):
    with pytest.raises(UserError, match=told):
        study.check_variants(str(ABLATION), ["softmax-32", "softmax-768"], given)
    with pytest.raises(UserError, match="unknown width '77' in 'softmax-77'"):
        study.check_variants(str(ABLATION), ["softmax-77"], [])


@pytest.mark.parametrize("options", [[], ["--index=0"]], ids=["study", "index"])
def test_a_study_that_could_not_be_gathered_is_not_begun(options, tmp_path):
    words = ["--name=s", f"--dir={tmp_path}/runs", "--widths=128,768", *options, "--", "--config.steps=20"]
    env = os.environ | {"PYTHON": sys.executable}
    result = subprocess.run([SCRIPT, *words], capture_output=True, text=True, env=env)
    assert (result.returncode, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and "unequal budgets" in line
    assert not (tmp_path / "runs").exists()


def test_how_a_run_was_made_does_not_matter(runs_of):
    others = {"checkpoint": {"every": 9}, "log": {"every": 9}, "data": {"threads": 9}, "mesh": {"data": 1}}
    width = {"width": 32, "heads": 4, "head_width": 32}
    assert len(study.read(runs_of((1.0, 0, {}), (0.9, 1, width), **others))) == 2


def test_the_launcher_makes_each_variant_of_each_seed_once():
    lines = printed("--gates=none,head", "--others=softmax-128", "--seeds=0,1", "--evaluate=--scenes=3").splitlines()
    trained = [line for line in lines if "lina_jax.train" in line]
    assert len(trained) == len(set(trained)) == 2 * (2 * 2 * 2 + 1)
    assert all(line.endswith("--config.steps=20") for line in trained)
    assert sum("softmax-128 --workdir=runs/s/softmax-128-seed1 --config.seed=1" in line for line in trained) == 1
    assert sum("lina_jax.evaluate --workdir" in line and "--scenes=3" in line for line in lines) == 18
    assert lines[-1].endswith("lina_jax.evaluate --study=runs/s")


def test_an_index_is_one_run():
    alone = printed("--seeds=0,1,2", "--index=11").splitlines()
    check, train, evaluate = alone
    assert "lina_jax.study" in check and "--flag=--config.steps=20" in check
    assert "subtraction-conv-none-128-seed2" in train and "subtraction-conv-none-128-seed2" in evaluate


STUB = """#!/usr/bin/env bash
# In place of python: trains what is no subtraction, and tells what it was asked.
case "$*" in
  -c* | *lina_jax.study*) exit 0 ;;
  *lina_jax.train*subtraction*)
    if [ "$CODE" != wait ]; then exit "$CODE"; fi
    tail -f /dev/null &
    trap 'kill $!; exit 75' TERM
    echo waiting
    wait ;;
  *lina_jax.evaluate*--study=*) ls -d "${3#--study=}"/*/evaluation || exit ;;
  *lina_jax.evaluate*--workdir=*) d=${3#--workdir=} && mkdir -p "$d/evaluation" && touch "$d/evaluation/score.json" ;;
esac
echo "ran $2 $3"
"""


@pytest.fixture
def study_of(tmp_path):
    """A study whose first run ends with `code`; if that is "wait", it waits for SIGTERM."""
    stub = tmp_path / "python"
    stub.write_text(STUB)
    stub.chmod(0o755)
    words = [SCRIPT, "--name=s", f"--dir={tmp_path}/runs", "--normalizations=subtraction,division"]
    words += ["--convolutions=none"]

    def start(code, *options, steps=20):
        env = os.environ | {"PYTHON": str(stub), "CODE": str(code)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen([*words, *options, "--", f"--config.steps={steps}"], **pipes, text=True, env=env)

    return start


@pytest.fixture
def ended(study_of):
    def run(*words, **options):
        with study_of(*words, **options) as study:
            out, lines = study.communicate(timeout=30)
        return subprocess.CompletedProcess(study.args, study.returncode, out, lines)

    return run


def test_a_run_that_fails_does_not_end_a_study(ended):
    result = ended(3)
    assert result.returncode == 1 and "failed: subtraction-none-none-128, seed 0: exit code 3" in result.stderr
    assert "ran lina_jax.evaluate --workdir" in result.stdout and "ran lina_jax.evaluate --study" in result.stdout


def test_runs_that_failed_are_named_where_nothing_can_be_gathered(ended):
    result = ended(3, "--normalizations=subtraction")
    assert result.returncode == 1 and result.stderr.endswith("seed 0: exit code 3\nfailed: gathering: exit code 2\n")


def test_what_is_complete_with_the_same_flags_is_skipped(ended, tmp_path):
    skipped = "division-none-none-128, seed 0: complete, skipped"
    assert skipped not in ended(3).stdout and skipped in ended(3).stdout
    for other in ({"steps": 40}, {"steps": 40, "options": ["--evaluate=--scenes=3"]}):
        options = other.pop("options", [])
        again = ended(3, *options, **other).stdout
        assert "ran lina_jax.train" in again and "ran lina_jax.evaluate --workdir" in again
        assert skipped in ended(3, *options, **other).stdout
    (record,) = tmp_path.glob("runs/*/evaluation/complete.txt")
    record.unlink()  # as an earlier version of the launcher leaves it
    assert skipped not in ended(3, *options, **other).stdout


@pytest.mark.parametrize("code", [130, 143])
def test_a_run_that_somebody_stops_ends_the_study(code, ended):
    stopped = ended(code)
    assert stopped.returncode == code and "ran" not in stopped.stdout


def test_an_index_ends_with_the_code_of_its_run(ended):
    """It does not restart the run: its job does."""
    alone = ended(75, "--index=0")
    assert (alone.returncode, alone.stdout, alone.stderr) == (75, "subtraction-none-none-128, seed 0\n", "")


@pytest.mark.parametrize("options", [[], ["--index=0"]], ids=["study", "index"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_study_that_is_told_to_stop_has_its_run_save_and_ends(options, number, code, study_of):
    with study_of("wait", *options) as study:
        assert [study.stdout.readline() for _ in range(2)][1] == "waiting\n"
        study.send_signal(number)
        told, _ = study.communicate(timeout=30)
    assert study.returncode == code and "ran" not in told and "waiting" not in told
