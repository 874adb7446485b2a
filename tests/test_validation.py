"""Validation losses do not depend on batching and sharding; scenes are scored by category."""

import dataclasses

import jax
import numpy as np
import pytest

from lina_jax import data, drawing, evaluate, mesh, state, validation
from lina_jax.config import MeshConfig


@pytest.fixture(scope="module")
def validation_losses(text_plan, rough):
    """A function: evaluation batch size -> validation losses, on the mesh of the plan."""
    config, run = text_plan.config, rough(text_plan)
    records = data.open_records(config, "validation")

    def losses(batch_size, plan=text_plan):
        settings = dataclasses.replace(config.eval, examples=6, batch_size=batch_size)
        weights = jax.device_put((run.params, run.frozen), (plan.shardings.params, plan.shardings.frozen))
        plan = dataclasses.replace(plan, config=dataclasses.replace(plan.config, eval=settings))
        return validation.Validation(plan, records).losses(weights[:1], weights[1])[0]

    return losses


@pytest.fixture(scope="module")
def at_once(validation_losses):
    """Losses of six examples in one batch."""
    return validation_losses(6)


def test_validation_does_not_depend_on_the_batch_size(validation_losses, at_once):
    """Six examples at once, or in padded batches of four, agree to the last digit that is reported."""
    assert validation_losses(4) == at_once


def test_validation_does_not_depend_on_the_mesh(validation_losses, at_once, tiny_text):
    eight = state.make_blueprint(tiny_text(), mesh.build(MeshConfig(data=8)))
    assert validation_losses(6, eight) == at_once


def test_validation_does_not_depend_on_how_a_run_draws(validation_losses, at_once, tiny_text, one_device):
    """Runs that repeat the head more often, or share one mask ratio per step, can therefore be compared."""
    drawn = {"repeat": 5, "mask_ratio_per": "step", "condition_dropout": 0.9}
    assert validation_losses(6, state.make_blueprint(tiny_text(loss=drawn), one_device)) == at_once


def test_parameters_and_their_average_have_losses_of_their_own(text_plan, rough):
    run, other = rough(text_plan), rough(text_plan, seed=1)
    measured = validation.Validation(text_plan, data.open_records(text_plan.config, "validation"))
    both = measured.both(run.params, other.params, run.frozen)
    raw, ema = (measured.losses([params], run.frozen)[0] for params in (run.params, other.params))
    assert raw["loss"] != ema["loss"]
    assert both == raw | {f"{name}_ema": value for name, value in ema.items()}


def test_of_a_noise_level_without_tokens_nothing_is_told(text_plan, rough):
    config, run = text_plan.config, rough(text_plan)
    noisy = dataclasses.replace(config, loss=dataclasses.replace(config.loss, shift=1e5))
    plan = state.make_blueprint(noisy, text_plan.mesh)
    (losses,) = validation.Validation(plan, data.open_records(noisy, "validation")).losses([run.params], run.frozen)
    assert [name for name in losses if "sigma" in name] == ["loss_sigma_0.75_1.00"]


def test_the_error_of_a_mean_over_tokens_is_that_over_examples():
    """For examples of equal length, it is that of the mean of their means; for one example it is unknown."""
    means = np.array([1.0, 4.0, 2.0, 3.0, 7.0])
    value, error = validation.mean_loss(10 * means, np.full(5, 10.0))
    assert value == pytest.approx(3.4)
    assert error == pytest.approx(np.std(means, ddof=1) / 5**0.5)
    # If one example has ten times as many tokens, the result is nearer to its mean.
    assert validation.mean_loss(means * [10, 10, 10, 10, 100], np.array([10, 10, 10, 10, 100])).value > 5.5
    assert validation.mean_loss(means[:1], np.ones(1)) == (1.0, None)


def test_scenes_are_scored_by_category(text_plan, rough):
    """The images of an untrained model are arbitrary; test_scene_score checks that the judge is right."""
    run = rough(text_plan)
    sampler = drawing.Sampler(text_plan, text_plan.config.sample, 4)
    scores, images, captions = evaluate.scene_scores(sampler, run.ema, run.frozen, 8, seed=0)
    assert images.shape == (8, 8, 8, 3)
    assert len(captions) == 8
    assert 0 <= scores["overall"] <= 1
    assert "single_object" in scores
