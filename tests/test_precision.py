"""What a bfloat16 model keeps in bfloat16, and what in float32; programs are traced, not compiled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lina_jax import generate, state, training_step
from lina_jax.models import flow
from lina_jax.models.draws import draw

VARIANTS = {"classes": {}, "text": {"condition": "text"}, "rotary": {"rotary": True, "heads": 1}}


@pytest.fixture(scope="module")
def narrow(tiny, one_device):
    return lambda **model: state.make_blueprint(tiny(model={"dtype": "bfloat16"} | model), one_device)


@pytest.mark.parametrize("variant", VARIANTS)
def test_tokens_stay_narrow_through_all_blocks(variant, narrow, batch_of):
    """Adding a float32 vector to them would double the size of the rest of the stream and of its gradient."""
    plan = narrow(**VARIANTS[variant])
    model = plan.config.model
    tokens = jnp.zeros((8, model.image_tokens, model.token_dim))
    mask = jnp.zeros(tokens.shape[:2], bool)

    def stages(params, frozen, condition):
        lina = plan.model(params, frozen)
        c = lina.encode_condition(condition)
        return {"c": c, "tokens": lina.mask_image(tokens, mask), "z": lina.encode_image(tokens, mask, 8, c)}

    found = jax.eval_shape(stages, plan.shapes.params, plan.shapes.frozen, plan.condition({}, batch_of(plan.config)))
    assert {name: array.dtype for name, array in found.items()} == dict.fromkeys(found, jnp.bfloat16)


def test_the_table_of_times_is_in_float32_and_so_is_its_gradient(narrow, batch_of):
    """Its gradient is a sum over many tokens; in bfloat16, further terms would soon be rounded away."""
    plan = narrow()
    config, sigmas = plan.config, flow.training_sigmas()

    def loss(params, frozen, batch):
        draws = draw(jax.random.key(0), jnp.arange(8), config.model, config.loss)
        tokens, condition = training_step.model_inputs(plan, {}, batch, None)
        return plan.model(params, frozen).loss(tokens, condition, draws, sigmas)

    program = str(jax.make_jaxpr(jax.grad(loss))(plan.shapes.params, plan.shapes.frozen, batch_of(config)))
    assert f"f32[{len(sigmas)},{config.model.head_width}]" in program
    assert f"bf16[{len(sigmas)}," not in program


@pytest.mark.parametrize("make", [generate.make_sampler, generate.make_progress_strips], ids=["sampler", "strips"])
def test_loops_of_sampling_read_matrices_of_blocks_that_are_narrow_already(make, narrow):
    """Otherwise they would be cast, and gathered, in each of many Euler steps."""
    plan = narrow()
    program = make(plan, plan.config.sample, *[3] * (make is generate.make_progress_strips))
    inputs = {"label": np.zeros(4, np.int32)}, np.arange(4, dtype=np.int32), np.int32(0), *program.trailing
    with jax.set_mesh(plan.mesh):
        traced = program.jitted.trace(plan.shapes.params, plan.shapes.frozen, *inputs)
    loops = [each for each in traced.jaxpr.eqns if each.primitive.name == "scan"][: plan.config.sample.stages]
    stacks = {leaf.shape for leaf in jax.tree.leaves(plan.shapes.params) if leaf.shape[0] == 1}  # of one block each
    matrices = {shape for shape in stacks if np.prod(shape) >= plan.config.model.width**2}
    for loop in loops:
        read = [value.aval for value in loop.invars if value.aval.shape in matrices]
        assert {array.shape for array in read} == matrices
        assert {array.dtype for array in read} == {jnp.dtype(jnp.bfloat16)}
