"""Pictures are functions of (weights, condition, seed, number), however they are computed."""

import collections
import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from lina_jax import decoding_schedule, drawing, generate, hlo, mesh, programs, roofline, state
from lina_jax.config import MeshConfig, SampleConfig

LABELS = np.array([0, 1, 2, 1], np.int32)
NUMBERS = np.arange(4, dtype=np.int32)


@pytest.fixture(scope="module")
def config(tiny):
    return tiny(sample={"temperature": 0.8})  # not 1, so that ignoring it would show


@pytest.fixture(scope="module")
def plan(config, one_device):
    return state.make_blueprint(config, one_device)


@pytest.fixture(scope="module")
def weights(plan, rough):
    run = rough(plan)
    return run.params, run.frozen


@pytest.fixture(scope="module")
def draw(plan, weights):
    """Images of `labels` with the tiny model; keywords are changes to its sample settings."""
    programs = {}

    def images(labels=LABELS, numbers=NUMBERS, seed=0, params=weights[0], **settings):
        key = tuple(sorted(settings.items()))
        if key not in programs:
            programs[key] = generate.make_sampler(plan, dataclasses.replace(plan.config.sample, **settings))
        made = programs[key](params, weights[1], {"label": jnp.asarray(labels)}, jnp.asarray(numbers), jnp.int32(seed))
        return np.asarray(made)

    return images


@pytest.fixture(scope="module")
def images(draw):
    return draw()


def assert_equal_to_rounding(got, want):
    """Float32 rounding (1e-6 of 127 levels) moves few pixels across an integer boundary, and those by one level."""
    difference = np.abs(got.astype(int) - want.astype(int))
    assert difference.max() <= 1
    assert np.mean(difference > 0) < 0.01


def test_pictures_use_the_whole_range(images):
    """Otherwise comparisons of pictures would prove nothing."""
    assert images.shape == (4, 8, 8, 3)
    assert images.dtype == np.uint8
    assert np.mean((images > 0) & (images < 255)) > 0.5
    assert images.std() > 20


def test_an_image_does_not_depend_on_its_company(draw, images):
    """In the same program, the third image is bit-identical among other images and in another position."""
    others = draw(labels=[1, 2, 2, 0], numbers=[7, 2, 9, 11])
    np.testing.assert_array_equal(others[1], images[2])


def test_images_of_one_condition_differ_by_number_and_seed(draw, images):
    again = draw(labels=[1, 1, 1, 1], numbers=[1, 3, 4, 5])
    assert len({image.tobytes() for image in again}) == 4
    assert not np.any(np.all(draw(seed=1) == images, axis=(1, 2, 3)))


def test_an_image_depends_on_its_condition(draw, images):
    other = draw(labels=[2, 1, 2, 1])
    assert np.mean(other[0] != images[0]) > 0.1
    np.testing.assert_array_equal(other[1:], images[1:])


def test_an_image_does_not_depend_on_the_batch_size(draw, images):
    assert_equal_to_rounding(draw(labels=[2], numbers=[2]), images[2:3])


def test_an_image_does_not_depend_on_the_mesh(config, weights, images):
    plan = state.make_blueprint(config, mesh.build(MeshConfig(data=4, fsdp=2)))
    params, frozen = jax.device_put(weights, (plan.shardings.params, plan.shardings.frozen))
    labels, numbers = np.tile(LABELS, 2), np.arange(8, dtype=np.int32)
    batch = jax.device_put(({"label": labels}, numbers), mesh.sharding(plan.mesh, "batch"))
    made = generate.make_sampler(plan, plan.config.sample)(params, frozen, *batch, jnp.int32(0))
    assert_equal_to_rounding(np.asarray(made)[:4], images)


def test_a_sampler_uses_all_devices(config, weights, images):
    plan = state.make_blueprint(config, mesh.build(MeshConfig(data=4, fsdp=2)))
    params, frozen = jax.device_put(weights, (plan.shardings.params, plan.shardings.frozen))
    sampler = drawing.Sampler(plan, plan.config.sample, drawing.batch_for(plan, len(LABELS)))
    assert_equal_to_rounding(sampler(params, frozen, LABELS.tolist(), seed=0), images)
    ((last,),) = (collections.deque(b, maxlen=1) for b in sampler.batches(params, frozen, LABELS.tolist(), seed=0))
    assert len(last.tokens.sharding.device_set) == 8
    assert last.tokens.addressable_shards[0].data.shape[0] == 1


def test_padded_sizes_of_the_visible_set_do_not_change_the_picture(draw, images, plan):
    assert plan.config.sample.stages == 2
    assert_equal_to_rounding(draw(stages=1), images)


def test_guidance_one_runs_the_conditional_branch_alone(draw, weights):
    """The unconditional embedding is never read, and the picture equals that of guidance close to one."""
    params = jax.tree.map(lambda x: x, weights[0])
    table = params["label_embed"]["table"]
    params["label_embed"]["table"] = table.at[-1].set(jnp.nan)
    alone = draw(guidance=1.0, guidance_min=1.0, params=params)
    assert_equal_to_rounding(alone, draw(guidance=1.0 + 1e-6, guidance_schedule="constant"))


def test_guidance_below_one_is_none(draw, config):
    """As published: a ramp from 0 to 2 guides only in its second half."""
    none = draw(guidance=1.0, guidance_min=1.0)
    np.testing.assert_array_equal(draw(guidance=0.5, guidance_schedule="constant"), none)
    ramp = decoding_schedule.make_schedule(config, SampleConfig(steps=4, guidance=2.0, guidance_min=0.0))
    assert ramp.guided
    np.testing.assert_allclose(ramp.inputs(slice(None)).guidance, [1.0, 1.0, 1.5, 2.0])


def test_guidance_matters(draw, images):
    assert np.mean(draw(guidance=1.0, guidance_min=1.0) != images) > 0.1


def test_temperature_zero_leaves_no_noise(draw):
    """With all tokens predicted at once, order does not matter either, so every seed gives the same picture."""
    still = {"steps": 1, "temperature": 0.0}
    assert_equal_to_rounding(draw(seed=3, numbers=[5, 6, 7, 8], **still), draw(**still))


def test_any_other_temperature_has_noise(draw):
    assert np.mean(draw(seed=3, steps=1) != draw(steps=1)) > 0.1


@pytest.mark.parametrize("steps", [2, 16, 46, 64])
@pytest.mark.parametrize(("most", "least"), [(25, 5), (50, 1), (50, 5), (10, 10)])
def test_linear_annealing_of_euler_steps_is_the_published_rule(steps, most, least):
    """In floating point, as published: over 46 steps from 50 to 5, exact ratios would give the 20th step one more."""
    published = [int((steps - 1 - i) / (steps - 1) * (most - least) + least) for i in range(steps)]
    assert decoding_schedule.annealed_steps("linear", steps, most, least).tolist() == published


@pytest.mark.parametrize("kind", ["linear", "cosine", "two_stage"])
def test_annealing_falls_from_most_to_least(kind):
    steps = decoding_schedule.annealed_steps(kind, 16, 25, 5)
    assert (steps[0], steps[-1]) == (25, 5)
    assert np.all(np.diff(steps) <= 0)


def test_without_annealing_every_step_has_all_euler_steps():
    assert decoding_schedule.annealed_steps("none", 4, 25, 5).tolist() == [25] * 4


@pytest.mark.parametrize("annealing", ["none", "linear", "cosine", "two_stage"])
def test_every_decoding_step_denoises_to_the_end(tiny, annealing):
    settings = {"steps": 8, "euler_steps": 9, "annealing_min": 2, "annealing": annealing}
    plan = decoding_schedule.make_schedule(tiny(model={"image_grid": (8, 8)}, sample=settings))
    for sigmas, count in zip(plan.sigmas, plan.euler_steps, strict=True):
        assert sigmas[0] == 1
        assert np.all(np.diff(sigmas[: count + 1]) < 0)
        assert np.all(sigmas[count:] == 0)


def test_annealing_draws_another_picture(draw, images):
    assert np.mean(draw(annealing="linear", annealing_min=1) != images) > 0.1


@pytest.mark.parametrize(("side", "steps"), [(4, 4), (16, 64), (8, 100)])
def test_a_schedule_makes_every_token_once(tiny, side, steps):
    plan = decoding_schedule.make_schedule(tiny(model={"image_grid": (side, side)}, sample={"steps": steps}))
    assert plan.predicted.sum() == side**2
    assert plan.predicted.min() > 0
    assert plan.visible.tolist() == [0, *np.cumsum(plan.predicted)[:-1]]
    assert [i for part in plan.stages for i in range(part.start, part.stop)] == list(range(len(plan.predicted)))


def test_orders_are_permutations_of_their_own(tiny):
    orders, noise = generate.image_draws(jnp.int32(0), jnp.arange(16), tiny().model)
    assert np.all(np.sort(orders, axis=1) == np.arange(16))
    assert len({order.tobytes() for order in np.asarray(orders)}) == 16
    assert len(np.unique(noise.reshape(-1, noise.shape[-1]), axis=0)) == 16 * 16


def test_many_images_are_drawn_in_batches_of_one_size(plan, weights, draw):
    """Six images through a program with a batch size of four are the same as each drawn by its number."""
    made = drawing.Sampler(plan, plan.config.sample, 4)(*weights, [0, 1, 2, 1, 0, 2], seed=0)
    assert made.shape == (6, 8, 8, 3)
    np.testing.assert_array_equal(made[4:], draw(labels=[0, 2, 0, 0], numbers=[4, 5, 6, 7])[:2])


def test_one_program_or_one_a_step_draw_the_same(plan, weights, images):
    """Rounding can depend on the compiler; here, on CPUs, no bit differed."""
    stepper = generate.Stepper(plan)
    steps = stepper.schedule(plan.config.sample)
    *_, last = stepper(*weights, {"label": LABELS}, NUMBERS, 0, steps)
    assert_equal_to_rounding(np.asarray(stepper.pixels(last)), images)


def test_programs_of_single_steps_read_narrow_matrices_and_a_head_that_is_whole(tiny, rough):
    plan = state.make_blueprint(tiny(model={"dtype": "bfloat16"}), mesh.build(MeshConfig(data=2, fsdp=2, tensor=2)))
    run = rough(plan)
    read = flatten_dict(plan.jit(plan.sampling_params)(run.params, run.frozen))
    wide = flatten_dict(run.params)
    assert read.keys() == wide.keys()
    matrices = {path for path, array in read.items() if array.dtype == jnp.bfloat16}
    assert 2 * sum(read[path].nbytes for path in matrices) > 0.7 * sum(array.nbytes for array in wide.values())
    of_head = {path for path in matrices if path[0] == "head"}
    assert of_head
    assert all("fsdp" in str(wide[path].sharding.spec) for path in of_head)
    assert all("fsdp" not in str(read[path].sharding.spec) for path in of_head)
    assert all(
        read[path].sharding.is_equivalent_to(wide[path].sharding, wide[path].ndim) for path in read.keys() - of_head
    )
    stepper = generate.Stepper(plan)
    labels, numbers = {"label": np.tile(LABELS, 2)}, np.arange(8, dtype=np.int32)
    *_, last = stepper(run.params, run.frozen, labels, numbers, 0, stepper.schedule(plan.config.sample))
    whole = generate.make_sampler(plan, plan.config.sample)(run.params, run.frozen, labels, numbers, np.int32(0))
    assert_equal_to_rounding(np.asarray(stepper.pixels(last)), np.asarray(whole))


def test_devices_draw_without_each_other(config):
    """Each device computes the unconditional image itself, and places the new tokens that it predicted."""
    plan = state.make_blueprint(config, mesh.build(MeshConfig(data=4), jax.devices()[:4]))
    sampler = generate.make_sampler(plan, config.sample)
    arguments = {"label": LABELS}, NUMBERS, np.int32(0)
    place = mesh.sharding(plan.mesh, "batch")
    arguments = jax.tree.map(lambda x: jax.device_put(x, place) if x.ndim else x, arguments)
    program = sampler.lower(plan.shapes.params, plan.shapes.frozen, *arguments).compile().as_text()
    assert not re.search(r" (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(-start)?\(", program)


def test_a_picture_does_not_depend_on_the_generator_that_jax_has_by_default(draw, config, one_device, weights):
    with jax.default_prng_impl("rbg"):
        plan = state.make_blueprint(config, one_device)
        sampler = generate.make_sampler(plan, config.sample)
        images = sampler(*weights, {"label": jnp.asarray(LABELS)}, jnp.asarray(NUMBERS), jnp.int32(0))
    np.testing.assert_array_equal(images, draw())


@pytest.mark.parametrize(("annealing", "known"), [("none", True), ("linear", False)])
def test_a_program_knows_how_many_euler_steps_it_takes(tiny, one_device, annealing, known):
    """GPUs ask their host before each trip of a loop whose number of trips the program does not know."""
    config = tiny(sample={"annealing": annealing, "annealing_min": 1, "stages": 1})
    compiled = programs.compile_program(*programs.sampling_step(config, one_device, 2, autoencoder=False), {})
    work = roofline.count(hlo.Module(compiled.text), unknown_trips=math.nan)
    assert math.isfinite(work.matmul_flops) == known
