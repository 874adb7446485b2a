"""Means of checkpoints, and EMAs of other decays, which are as close to the exact ones as reported."""

import dataclasses

import jax
import numpy as np
import pytest

from lina_jax import averaging, convert, export, mesh, state
from lina_jax.averaging import Snapshot
from lina_jax.checkpoint import Checkpoints
from lina_jax.config import EmaConfig
from lina_jax.ema import averaged
from lina_jax.errors import UserError
from lina_jax.workdir import load_config, write_config

average = jax.jit(averaged, static_argnums=0)


def walk(kind: str, updates: int, numbers: int = 64) -> np.ndarray:
    """Parameters (updates + 1, numbers) float32 of a run that drifts, stays around a point or circles."""
    rng = np.random.default_rng(0)
    steps = 0.01 * rng.standard_normal((updates + 1, numbers))
    if kind == "independent":
        return np.cumsum(steps, axis=0).astype(np.float32)
    if kind == "around a point":
        for i in range(1, updates + 1):
            steps[i] += 0.9 * steps[i - 1]
        return steps.astype(np.float32)
    turns = np.arange(updates + 1)[:, None] / 40 + np.arange(numbers)
    return np.sin(turns).astype(np.float32)


def tracked(config: EmaConfig, path: np.ndarray) -> list[np.ndarray]:
    """The EMA after every update, computed by the training code."""
    emas = [path[0]]
    for i in range(1, len(path)):
        emas.append(np.asarray(average(config, emas[-1], path[i], np.int32(i))))
    return emas


OWN = EmaConfig(decay=0.95)


@pytest.mark.parametrize("kind", ["independent", "around a point", "circles"])
@pytest.mark.parametrize(
    ("own", "decay", "share"),
    [(OWN, 0.99, 0.014), (OWN, 0.98, 0.015), (OWN, 0.9, 0.1), (EmaConfig(0.8, 3, False), 0.9, 0.03)],
    ids=str,
)
def test_another_decay_is_as_near_as_is_said(kind, own, decay, share):
    """The bound holds for every number; the expected share is small, and independent updates meet it.

    A root mean square over 64 numbers is known to within 10 %, so 20 % more is allowed. Rounding of the stored arrays
    and of the sum may add 1e-5 of the largest parameter.
    """
    path = walk(kind, 600)
    wanted = dataclasses.replace(own, decay=decay)
    emas, exact = tracked(own, path), tracked(wanted, path)[-1]
    snapshots = [Snapshot(n, n, ema) for n in range(0, 601, 25) for ema in (False, True)]
    fit = averaging.fit(own, wanted, snapshots)
    made = sum(x * (emas if s.ema else path)[s.updates] for x, s in zip(fit.coefficients, snapshots, strict=True))
    rounding = 1e-5 * np.max(np.abs(path))
    assert np.max(np.abs(made - exact)) <= fit.bound * np.max(np.abs(np.diff(path, axis=0))) + rounding
    assert fit.share < share
    if kind == "independent":
        assert np.linalg.norm(made - exact) <= 1.2 * fit.share * np.linalg.norm(exact - path[-1])


def test_stored_emas_are_reproduced_exactly():
    """The run's own decay gives the last EMA; with every update stored, any decay is exact."""
    snapshots = [Snapshot(n, n, ema) for n in (0, 50, 100) for ema in (False, True)]
    fit = averaging.fit(OWN, OWN, snapshots)
    np.testing.assert_allclose(fit.coefficients, [0, 0, 0, 0, 0, 1], atol=1e-5)
    assert fit.bound < 1e-4
    fit = averaging.fit(OWN, EmaConfig(0.5), [Snapshot(n, n, False) for n in range(40)])
    assert fit.share < 1e-3


def test_many_updates_are_taken_in_parts(monkeypatch):
    snapshots = [Snapshot(n, n, ema) for n in (0, 30, 60, 90) for ema in (False, True)]
    whole = averaging.fit(OWN, EmaConfig(0.97), snapshots)
    monkeypatch.setattr(averaging, "CHUNK", 7)
    parts = averaging.fit(OWN, EmaConfig(0.97), snapshots)
    np.testing.assert_allclose(parts.coefficients, whole.coefficients, atol=1e-9)
    np.testing.assert_allclose((parts.bound, parts.share), (whole.bound, whole.share), rtol=1e-9)


@pytest.fixture(scope="module")
def run(tiny, rough, tmp_path_factory):
    """(workdir, exact EMA of decay 0.9) of a run with decay 0.8, 40 updates in 42 steps, stored every 14 steps."""
    config = tiny(ema={"decay": 0.8}, checkpoint={"keep_last": 20})
    plan = state.make_blueprint(config, mesh.mesh_for_weights(config.model))
    workdir = tmp_path_factory.mktemp("average") / "run"
    write_config(workdir, config)
    checkpoints = Checkpoints(workdir, config.checkpoint)
    start, towards = rough(plan), jax.device_get(rough(plan, seed=1).params)
    params = own = exact = jax.device_get(start.params)
    wanted = dataclasses.replace(config.ema, decay=0.9)
    for step in range(43):
        updates = np.int32(max(step - 2, 0))  # two were skipped
        if updates:
            params = jax.tree.map(lambda p, t: p + np.float32(0.05) * (t - p), params, towards)
            own, exact = (average(c, e, params, updates) for c, e in ((config.ema, own), (wanted, exact)))
        if step % 14 == 0:
            stored = jax.device_put((params, own), (plan.shardings.params, plan.shardings.ema))
            counts = {"step": start.step + step, "updates": start.updates + updates}
            checkpoints.save(dataclasses.replace(start, **counts, params=stored[0], ema=stored[1]))
    checkpoints.close()
    return workdir, export.flatten_dict(jax.device_get(exact))


def test_an_ema_of_another_decay_becomes_a_workdir(run, tmp_path):
    workdir, exact = run
    steps, fit = convert.reconstruct_ema(workdir, tmp_path / "ema", 0.9)
    assert steps == [0, 14, 28, 42]
    made, raw = export.load(tmp_path / "ema"), export.load(workdir, ema=False).arrays
    assert (made.step, made.kind) == (0, "raw")
    assert all(np.array_equal(array, raw[path]) for path, array in made.arrays.items() if path not in exact)
    error = max(np.max(np.abs(made.arrays[path] - array)) for path, array in exact.items())
    distance = max(np.max(np.abs(raw[path] - array)) for path, array in exact.items())
    assert fit.share < 0.1 and error < 0.1 * distance


def test_the_last_checkpoints_are_averaged(run, tmp_path):
    assert convert.average(run[0], tmp_path / "mean", 2) == [28, 42]
    parts = [export.load(run[0], ema=False, step=step).arrays for step in (28, 42)]
    for path, array in export.load(tmp_path / "mean").arrays.items():
        np.testing.assert_allclose(array, (np.asarray(parts[0][path]) + np.asarray(parts[1][path])) / 2, rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda run, out: convert.average(run, out, 9), r"--average=9: expected 1 to 4, the checkpoints in"),
        (lambda run, out: convert.reconstruct_ema(run, out, 1.0), r"--ema_decay=1\.0: must be between 0 and 1"),
        (
            lambda run, out: convert.reconstruct_ema(run, out, 0.9, 7),
            r"no checkpoint of step 7 in .*: its steps are \[0, 14,",
        ),
        (lambda run, out: convert.reconstruct_ema(run, out, 0.9, 0), r"has no updates to average"),
    ],
)
def test_what_cannot_be_averaged_is_refused(run, tmp_path, make, message):
    with pytest.raises(UserError, match=message):
        make(run[0], tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_a_run_without_checkpoints_has_no_mean(run, tmp_path):
    write_config(tmp_path, load_config(run[0]))
    with pytest.raises(UserError, match="--average=2: no checkpoint in"):
        averaging.mean(tmp_path, 2)
