"""The training step: accumulation, skipped updates, averages, draws, variants of the model that share one result."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lina_jax import mesh, platforms, state, training_step
from lina_jax.config import EmaConfig, LossConfig, MeshConfig, ModelConfig
from lina_jax.ema import averaged
from lina_jax.models import flow
from lina_jax.models.draws import draw, latent_noise, max_visible, visible_count
from lina_jax.models.transformer import layer_runs


@pytest.fixture(scope="module")
def plan_of(tiny, one_device):
    return lambda **changes: state.make_blueprint(tiny(**changes), one_device)


@pytest.fixture(scope="module")
def plan(plan_of):
    return plan_of(optim={"b1": 0.0})


@pytest.fixture(scope="module")
def train_step(plan):
    return training_step.make_train_step(plan)


def test_accumulation_changes_nothing(plan, plan_of, train_step, rough, batch_of, moment, error_between):
    batch = batch_of(plan.config)
    whole, metrics = train_step(rough(plan), batch)
    parts = plan_of(optim={"b1": 0.0, "accumulate": 4})
    run, metrics_of_parts = training_step.make_train_step(parts)(rough(parts), batch)
    # Another order of summation: measured 1e-7 (loss) and 2.3e-7 (gradient).
    np.testing.assert_allclose(metrics_of_parts["loss"], metrics["loss"], rtol=1e-6)
    assert error_between(moment(run), moment(whole)) < 3e-6
    assert int(run.updates) == 1


@pytest.mark.parametrize(
    ("changes", "barriers"), [({}, 2), ({"scan_layers": True}, 0), ({"attention": "hybrid", "softmax_period": 4}, 0)]
)
def test_sums_between_nodes_end_in_time_where_layers_are_unrolled(changes, barriers, plan_of, batch_of, monkeypatch):
    monkeypatch.setattr(mesh, "sums_cross_nodes", lambda _: True)
    plan = plan_of(model={"image_depth": 8, "condition_depth": 1, "scan_layers": False, "remat": "none"} | changes)
    program = training_step.make_train_step(plan).lower(plan.shapes, batch_of(plan.config)).as_text()
    assert program.count("optimization_barrier") == barriers  # each half has four layers


@pytest.fixture(scope="module")
def poisoned(plan, rough):
    """A state with a loss, or only a gradient norm, that is not finite."""

    def make(bias=jnp.inf, scale=1.0):
        run = rough(plan)
        out = run.params["head"]["out"]
        out |= {"bias": jnp.full_like(out["bias"], bias), "kernel": scale * out["kernel"]}
        return run

    return make


@pytest.mark.parametrize(
    ("poison", "loss_is_finite"),
    [({}, False), ({"bias": 1e17, "scale": 1e3}, True)],  # a loss of 1e34: squares of its gradient overflow
    ids=["loss", "gradient alone"],
)
def test_a_non_finite_step_changes_nothing_but_counters(
    poison, loss_is_finite, plan, train_step, poisoned, batch_of, identical
):
    before = jax.device_get(poisoned(**poison))
    after, metrics = train_step(poisoned(**poison), batch_of(plan.config))
    assert np.isfinite(metrics["loss"]) == loss_is_finite
    assert not np.isfinite(metrics["grad_norm"])
    for name in ("params", "frozen", "opt_state", "ema"):
        assert identical(getattr(after, name), getattr(before, name)), name
    assert [int(n) for n in (after.step, after.updates, after.skipped, after.skipped_in_a_row)] == [1, 0, 1, 1]


def test_gpus_skip_a_step_without_a_branch(plan, poisoned, batch_of, identical, monkeypatch):
    """The host would wait for one. (The program is traced for a GPU, and runs on a CPU.)"""
    monkeypatch.setattr(platforms, "platform", lambda: "gpu")
    step, batch = training_step.make_train_step(plan), batch_of(plan.config)
    assert "stablehlo.case" not in step.lower(plan.shapes, batch).as_text()
    before = jax.device_get(poisoned())
    after, _ = step(poisoned(), batch)
    for name in ("params", "opt_state", "ema"):
        assert identical(getattr(after, name), getattr(before, name)), name
    assert [int(n) for n in (after.step, after.updates, after.skipped)] == [1, 0, 1]


def test_skipped_steps_are_counted_until_a_finite_one(plan, train_step, poisoned, rough, batch_of):
    batch = batch_of(plan.config)
    run, _ = train_step(poisoned(), batch)
    run, _ = train_step(run, batch)
    assert (int(run.skipped), int(run.skipped_in_a_row)) == (2, 2)
    run, metrics = train_step(dataclasses.replace(run, params=rough(plan).params), batch)
    assert [int(n) for n in (run.step, run.updates, run.skipped, run.skipped_in_a_row)] == [3, 1, 2, 0]
    assert int(metrics["skipped"]) == 2


def test_the_learning_rate_follows_updates_not_steps(plan, train_step, poisoned, batch_of):
    run, first = train_step(poisoned(), batch_of(plan.config))
    _, second = train_step(run, batch_of(plan.config))
    assert float(first["learning_rate"]) == float(second["learning_rate"])


def test_steps_draw_anew(plan, train_step, rough, batch_of):
    batch = batch_of(plan.config)
    later = rough(plan)
    later.step = jax.device_put(jnp.int32(5), plan.shardings.step)
    assert float(train_step(rough(plan), batch)[1]["loss"]) != float(train_step(later, batch)[1]["loss"])


def test_average_with_warmup():
    config = EmaConfig(decay=0.5, every=1, warmup=True)
    # (1 + n) / (10 + n) after n updates: 2/11, 3/12, ..., and never more than 0.5.
    for n, decay in ((1, 2 / 11), (2, 3 / 12), (7, 8 / 17), (8, 0.5), (1000, 0.5)):
        assert averaged(config, jnp.float32(1.0), jnp.float32(0.0), jnp.int32(n)) == pytest.approx(decay)


def test_average_as_published():
    config = EmaConfig(decay=0.99, every=100, warmup=False)
    for n, kept in ((1, 1.0), (99, 1.0), (100, 0.99), (101, 1.0), (200, 0.99)):
        assert averaged(config, jnp.float32(1.0), jnp.float32(0.0), jnp.int32(n)) == pytest.approx(kept)


def test_draws_of_an_example_do_not_depend_on_its_company(tiny, identical):
    model, loss = tiny().model, LossConfig(repeat=2)
    key = jax.random.key(7)
    together, apart = (
        jax.jit(lambda ids: draw(key, ids, model, loss))(ids) for ids in (jnp.arange(8), jnp.array([5, 2]))
    )
    for name, axis in (("drop", 0), ("mask", 0), ("timestep", 1), ("noise", 1)):
        few, all_ = getattr(apart, name), getattr(together, name)
        assert identical(few, jnp.take(all_, jnp.array([5, 2]), axis)), name


def test_noise_of_latents_follows_from_step_and_example(identical):
    function = jax.jit(lambda step, ids: latent_noise(jax.random.fold_in(jax.random.key(7), step), ids, (2, 3)))
    one, next_one = (np.asarray(function(step, jnp.arange(8))) for step in (0, 1))
    assert len(np.unique([*one, *next_one], axis=0)) == 16
    assert identical(function(0, jnp.array([5, 2])), one[[5, 2]])


@pytest.fixture(scope="module")
def many_draws(tiny):
    """The draws for 4096 examples in each of two steps."""
    model, loss = tiny().model, LossConfig(repeat=1)
    function = jax.jit(lambda key: draw(key, jnp.arange(4096), model, loss))
    return [function(jax.random.fold_in(jax.random.key(0), step)) for step in (0, 1)]


def test_draws_differ_between_steps(many_draws):
    one, other = many_draws
    assert not np.any(np.asarray(one.noise) == np.asarray(other.noise))
    one, other = np.asarray(one.mask), np.asarray(other.mask)
    # With three or more of 16 tokens visible there are at least 560 masks; with fewer, equal masks are likely.
    alike = np.all(one == other, axis=1) & (np.sum(~one, axis=1) >= 3)
    assert np.mean(alike) < 0.01


def test_draws_differ_between_examples(many_draws):
    noise = np.asarray(many_draws[0].noise)[0]
    assert len(np.unique(noise, axis=0)) == len(noise)


def test_conditions_are_dropped_as_often_as_is_set(many_draws):
    """One in ten; for 4096 examples the standard error is 0.005."""
    assert np.mean(many_draws[0].drop) == pytest.approx(LossConfig().condition_dropout, abs=0.03)


def test_every_token_is_masked_equally_often(many_draws):
    """In 4096 draws, counts differ by chance only: by 6 standard deviations at most."""
    visible = np.sum(~np.asarray(many_draws[0].mask), axis=0)
    assert np.max(np.abs(visible - np.mean(visible))) < 6 * np.sqrt(np.mean(visible))


def test_the_mean_mask_ratio_is_the_published_one(tiny):
    """N(1, 0.25) truncated to [0.7, 1] has a mean of 0.867; the mean of 16384 draws has a standard error of 0.0007."""
    model = dataclasses.replace(tiny().model, image_grid=(16, 16))
    count = jax.vmap(lambda key: visible_count(key, LossConfig(), model.image_tokens))(
        jax.random.split(jax.random.key(0), 16_384)
    )
    assert np.mean(1 - np.asarray(count) / 256) == pytest.approx(0.867, abs=0.003)


def test_one_mask_ratio_per_step_is_one_count_for_all(tiny):
    model, counts = tiny().model, set()
    function = jax.jit(lambda key: draw(key, jnp.arange(16), model, LossConfig(mask_ratio_per="step")))
    for step in range(8):
        (count,) = set(np.sum(~np.asarray(function(jax.random.key(step)).mask), axis=1).tolist())
        counts.add(count)
    assert len(counts) > 1


def test_no_image_has_more_visible_tokens_than_the_bound(many_draws, tiny):
    most = max_visible(LossConfig(), tiny().model.image_tokens)
    assert many_draws[0].max_visible == most
    assert int(jnp.max(jnp.sum(~many_draws[0].mask, axis=1))) == most


def test_a_ratio_that_rounds_up_has_no_more_than_the_bound(tiny):
    """(1 - 0.9) 25 is 2.5, which float32 would round to 3 for ratios just above their minimum."""
    config = LossConfig(mask_ratio_mean=0.9, mask_ratio_std=1e-5, mask_ratio_min=0.9)
    count = jax.vmap(lambda key: visible_count(key, config, 25))(jax.random.split(jax.random.key(0), 16_384))
    assert int(jnp.max(count)) == max_visible(config, 25) == 2


def loss_and_gradient(plan, batch):
    """A jitted function for the training objective: ((loss, velocity), gradient), without the optimizer."""
    config = plan.config
    tokens, condition = training_step.model_inputs(plan, {}, batch, None)
    draws = draw(jax.random.key(0), jnp.arange(config.batch_size), config.model, config.loss)
    sigmas = flow.training_sigmas()

    def loss(params, frozen):
        velocity = plan.model(params, frozen).velocities(tokens, condition, draws, sigmas).astype(jnp.float32)
        error = jnp.mean(jnp.square(velocity - (draws.noise - tokens)), axis=-1)
        return jnp.sum(error * draws.mask) / (jnp.sum(draws.mask) * config.loss.repeat), velocity

    return plan.jit(jax.value_and_grad(loss, has_aux=True))


DEEP = {"condition_depth": 2, "image_depth": 4, "head_depth": 2}


@pytest.fixture(scope="module")
def unrolled(plan_of, rough, batch_of):
    """((loss, velocity), gradient) with unrolled layers and nothing recomputed."""
    plan = plan_of(model=DEEP)
    run = rough(plan)
    return loss_and_gradient(plan, batch_of(plan.config))(run.params, run.frozen)


@pytest.mark.parametrize(("scan", "remat"), [(True, "none"), (True, "full"), (True, "dots")])
def test_how_layers_run_does_not_change_the_result(scan, remat, unrolled, plan_of, rough, batch_of, error_between):
    plan = plan_of(model=DEEP | {"scan_layers": scan, "remat": remat})
    run = rough(plan)
    (loss, _), grads = loss_and_gradient(plan, batch_of(plan.config))(run.params, run.frozen)
    (want_loss, _), want_grads = unrolled
    # Fusions differ, and so does rounding: measured 2.4e-7 (loss) and 2.2e-7 (gradient).
    np.testing.assert_allclose(loss, want_loss, rtol=1e-6)
    assert error_between(grads, want_grads) < 3e-6


def test_bfloat16_stays_close_to_float32(unrolled, plan_of, rough, batch_of, error_between):
    plan = plan_of(model=DEEP | {"dtype": "bfloat16"})
    run = rough(plan)
    (loss, velocity), grads = loss_and_gradient(plan, batch_of(plan.config))(run.params, run.frozen)
    (want_loss, want_velocity), want_grads = unrolled
    # bfloat16 keeps 8 bits (0.4 %), and every layer rounds again. Measured: velocity 1.0 %, gradient 1.1 %, loss
    # 0.11 %. An error below that of one rounding would mean that it computes in float32.
    assert 0.004 < error_between(velocity, want_velocity) < 0.03
    assert 0.004 < error_between(grads, want_grads) < 0.035
    assert abs(loss / want_loss - 1) < 0.004


@pytest.mark.parametrize("normalization", ["division", "subtraction"])
@pytest.mark.parametrize("gate", ["none", "head", "shared", "key", "value", "decoupled", "dynamic"])
def test_every_gate_learns_under_both_normalisations(gate, normalization, plan_of, rough):
    """Through the decoder half, which has the gates: every parameter gets a finite gradient that is not all zero."""
    plan = plan_of(model={"kv_gate": gate, "normalization": normalization})
    model, run = plan.config.model, rough(plan)
    shape = (2, model.condition_tokens + model.image_tokens, model.width)
    x, wanted = np.random.default_rng(0).standard_normal((2, *shape), np.float32)

    def loss(decoder):
        return jnp.sum(plan.model(run.params | {"decoder": decoder}, run.frozen).decoder(x) * wanted)

    grads = jax.jit(jax.grad(loss))(run.params["decoder"])
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        assert np.all(np.isfinite(grad)), jax.tree_util.keystr(path)
        assert np.any(grad != 0), jax.tree_util.keystr(path)


@pytest.mark.parametrize(
    ("depth", "period", "softmax"),
    [(32, 8, [7, 15, 23, 31]), (4, 2, [1, 3]), (5, 2, [1, 3]), (4, 3, [2]), (2, 8, []), (2, 1, [0, 1])],
)
def test_hybrid_layers_are_counted_through_both_halves(depth, period, softmax):
    encoders, decoders = ModelConfig(image_depth=depth).halves
    halves = [*layer_runs(0, encoders, period), *layer_runs(encoders, decoders, period)]
    assert [i for _, is_softmax, layers in halves if is_softmax for i in layers] == softmax
    assert [i for _, _, layers in halves for i in layers] == list(range(depth))


def test_softmax_layers_of_a_hybrid_have_neither_convolution_nor_gate(plan_of):
    plan = plan_of(model={"attention": "hybrid", "softmax_period": 2, "image_depth": 4})
    decoder = plan.shapes.params["decoder"]["runs"]
    assert set(decoder["from_02"]["attention"]) == {
        "qkv",
        "proj",
        "conv_kernel",
        "conv_bias",
        "key_scale",
        "value_scale",
    }
    assert set(decoder["from_03"]["attention"]) == {"qkv", "proj"}


def test_a_hybrid_learns_in_every_stack(plan_of, rough, batch_of):
    plan = plan_of(model={"attention": "hybrid", "softmax_period": 1})
    run = rough(plan)
    (loss, _), grads = loss_and_gradient(plan, batch_of(plan.config))(run.params, run.frozen)
    assert np.isfinite(loss)
    for stack in ("condition_encoder", "encoder", "decoder"):
        kernel = grads[stack]["runs"]["from_01" if stack == "decoder" else "from_00"]["attention"]["qkv"]["kernel"]
        assert np.all(np.isfinite(kernel)) and np.any(kernel != 0), stack


def test_a_save_compiles_nothing(tiny, rough, save_run, tmp_path, caplog):
    """Not for replicated arrays either: each device could write a slice, but each slice would need its own program."""
    plan = state.make_blueprint(tiny(), mesh.build(MeshConfig()))
    run = rough(plan)
    with jax.log_compiles():
        save_run(tmp_path / "run", plan, run)
    assert not [line for line in caplog.messages if "XLA compilation" in line]
