"""Checks of the fixtures of whole models: loss and gradients, sampling runs, the AdamW and EMA trajectory."""

import dataclasses
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from golden_case import Case, by_published_names, tokens_of

from lina_jax import decoding_schedule, generate, mesh, optim, published_names, state, torch_layout, training_step
from lina_jax.checkpoint import Checkpoints
from lina_jax.config import Config, EmaConfig, LossConfig, MeshConfig, ModelConfig, OptimConfig, SampleConfig
from lina_jax.models import flow, layers
from lina_jax.models.draws import Draws
from lina_jax.models.lina import LINA, unconditional
from lina_jax.workdir import load_config


def model_config(c: dict) -> ModelConfig:
    text = c.get("text_token_dim") is not None
    module = published_names.MODULE + ("" if c["variant"] == "softmax" else f"_{c['variant']}")
    variant = published_names.variant_of(module)
    assert variant, f"unknown variant {c['variant']}"
    return ModelConfig(
        condition="text" if text else "class",
        num_classes=1000,
        text_length=c.get("text_token_len", 256),
        text_dim=c.get("text_token_dim") or 2560,
        latent_channels=c["image_dim"],
        patch_size=c["patch_size"],
        image_grid=tuple(c["image_grid"]),
        condition_grid=tuple(c["cond_grid"]),
        width=c["dim"],
        heads=c["num_heads"],
        condition_depth=c["video_depth"],
        image_depth=c["image_depth"],
        mlp_ratio=c["mlp_ratio"],
        head_width=c["decoder_dim"],
        head_depth=c["decoder_depth"],
        rotary=c["rotary_pos_embed"],
        dtype="float32",
        **variant,
    )


def config_of(case: Case) -> ModelConfig:
    config = model_config(case.config)
    if config.condition == "class":
        config = ModelConfig(**{**vars(config), "num_classes": case.weights["label_embed.weight"].shape[0] - 1})
    return config


class Imported(NamedTuple):
    """A model as users get it: imported from a published pipeline directory and restored from the checkpoint."""

    config: ModelConfig
    table: list[torch_layout.Entry]
    graphdef: nnx.GraphDef
    trained: dict
    frozen: dict


def load(workdir: Path, **changes) -> Imported:
    """The model of a workdir; `changes` are fields of its config that do not affect the arrays."""
    config = load_config(workdir)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, **changes))
    plan = state.make_blueprint(config, mesh.mesh_for_weights(config.model))
    weights = Checkpoints(workdir, config.checkpoint, create=False).restore_weights(plan)[:2]
    trained, frozen = jax.device_put(weights, jax.devices()[0])
    return Imported(config.model, list(torch_layout.entries(config.model)), plan.graphdef, trained, frozen)


def condition_of(case: Case, config: ModelConfig, batch: int, prefix: str = "") -> dict[str, jax.Array]:
    if config.condition == "class":
        return {"label": jnp.asarray(case[f"{prefix}label_ids"])[:batch]}
    features = np.zeros((batch, config.text_length, config.text_dim), np.float32)
    lengths = np.zeros(batch, np.int32)
    for i in range(batch):  # prompts of length 0 are recorded as absent
        if f"inputs.{prefix}prompt{i}" in case:
            prompt = case[f"{prefix}prompt{i}"]
            features[i, : len(prompt)], lengths[i] = prompt, len(prompt)
    return {"text": jnp.asarray(features), "text_length": jnp.asarray(lengths)}


def latents_of(tokens: jax.Array, config: ModelConfig) -> np.ndarray:
    return rearrange(np.asarray(layers.unpatchify(tokens, config.image_grid, config.patch_size)), "b h w c -> b c h w")


def draws_of(case: Case, repeat: int, prefix: str = "") -> Draws:
    ids, mask = case[f"{prefix}prev_ids"][..., 0], case[f"{prefix}mask"][..., 0] > 0
    assert not np.any(np.take_along_axis(mask, ids, axis=1))
    return Draws(
        drop=jnp.zeros(len(ids), bool),
        mask=jnp.asarray(mask),
        timestep=jnp.asarray(rearrange(case[f"{prefix}timestep_idx"], "(r b) n -> r b n", r=repeat)),
        noise=jnp.asarray(rearrange(case[f"{prefix}noise"], "(r b) n c -> r b n c", r=repeat)),
        max_visible=ids.shape[1],
    )


def sigmas_of(case: Case) -> np.ndarray:
    return flow.training_sigmas(case.config.get("shift", 1.0))


def loss_of(model: LINA, tokens, condition, draws: Draws, sigmas: np.ndarray):
    total = model.loss(tokens, condition, draws, sigmas)
    return total / (draws.timestep.shape[0] * jnp.sum(draws.mask) + 1e-5)


def transformer(case: Case, given: Imported) -> None:
    config, table, graphdef, trained, frozen = given
    repeat, batch = case.config["loss_repeat"], case.config["batch"]
    tokens, condition = tokens_of(case["x"], config.patch_size), condition_of(case, config, batch)
    draws, sigmas = draws_of(case, repeat), sigmas_of(case)

    @jax.jit
    def forward(trained, frozen):
        model = nnx.merge(graphdef, trained, frozen)
        c = model.encode_condition(condition)
        return {
            "outputs.cond_tokens": model.embed_condition(condition)[0],
            "outputs.c": c,
            "outputs.masked": model.mask_image(tokens, draws.mask),
            "outputs.z": model.encode_image(tokens, draws.mask, draws.max_visible, c),
            "outputs.model_pred": rearrange(model.velocities(tokens, condition, draws, sigmas), "r b n c -> (r b) n c"),
            "outputs.per_token_loss": rearrange(
                model.token_losses(tokens, condition, draws, sigmas), "r b n -> (r b) n 1"
            ),
        }

    @jax.jit
    def loss_and_grads(trained, frozen):
        return jax.value_and_grad(
            lambda t, f: loss_of(nnx.merge(graphdef, t, f), tokens, condition, draws, sigmas), (0, 1)
        )(trained, frozen)

    for name, value in forward(trained, frozen).items():
        if name in case:
            case.check(name, value)
    loss, (trained_grads, frozen_grads) = loss_and_grads(trained, frozen)
    case.check("outputs.loss", loss[None])
    flat = flatten_dict(trained_grads) | flatten_dict(frozen_grads)
    grads = unflatten_dict(flat)
    case.check_grads(table, grads)
    named = by_published_names(table, grads)
    case.check("outputs.all_grad_norms", [np.linalg.norm(named[key]) for key in case.manifest["param_order"]])


def sample(case: Case, given: Imported) -> None:
    config, _, graphdef, trained, frozen = given
    c, batch = case.config, case.config["batch"]
    low = c["guidance_scale"] if c["min_guidance_scale"] is None else c["min_guidance_scale"]
    settings = SampleConfig(
        steps=c["num_inference_steps"],
        euler_steps=c["num_diffusion_steps"],
        guidance=c["guidance_scale"],
        guidance_min=low,
        stages=2,
    )
    plan = decoding_schedule.make_schedule(Config(model=config, loss=LossConfig(shift=c["shift"]), sample=settings))
    case.check("outputs.num_preds", plan.predicted)
    case.check("outputs.guidance", plan.guidance)
    model = nnx.merge(graphdef, trained, frozen)
    condition, order = condition_of(case, config, batch), jnp.asarray(case["pred_order"][..., 0])
    # Each token is predicted once, so of the noise drawn at every step only that of its own step matters.
    noise_steps = jnp.stack([tokens_of(noise, config.patch_size) for noise in case["noise"]])
    rank = np.argsort(order, axis=1)
    step_of = np.searchsorted(np.cumsum(plan.predicted), rank, side="right")
    noise = jnp.take_along_axis(noise_steps, jnp.asarray(step_of)[None, ..., None], axis=0)[0]
    tokens = jax.jit(lambda *args: generate.decode(model, *args, plan))(condition, order, noise)

    def after(step):
        return jnp.where((rank < plan.visible[step] + plan.predicted[step])[..., None], tokens, 0.0)

    case.check("outputs.x_steps", np.stack([latents_of(after(i), config) for i in range(len(plan.predicted))]))
    case.check("outputs.latents", latents_of(tokens, config)[:, :, None])
    if plan.guided:
        other = jax.tree.map(lambda x: jnp.repeat(x, batch, axis=0), unconditional(config, condition))
        condition = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), condition, other)
    encoded = jax.jit(model.encode_condition)(condition)
    case.check("outputs.c", encoded)
    encode_image = jax.jit(model.encode_image, static_argnums=2)
    for i in range(len(plan.predicted)):
        if f"outputs.z_step{i}" not in case:
            continue
        copies = 2 if plan.guidance[i] > 1 else 1  # published steps without guidance run no second branch
        count, before = plan.visible[i], jnp.tile(after(i - 1) if i else jnp.zeros_like(tokens), (copies, 1, 1))
        hidden, c = np.tile(rank, (copies, 1)) >= count, encoded[: copies * batch]
        case.check(f"outputs.z_step{i}", encode_image(before, hidden, int(count), c))


def train_steps(case: Case, given: Imported) -> None:
    config, table, graphdef, trained, frozen = given
    c = case.config
    settings = OptimConfig(
        learning_rate=c["lr"], warmup_steps=c["warmup_steps"], warmup_factor=c["warmup_factor"], eps=c["adam_eps"],
        weight_decay=c["weight_decay"], b1=c["betas"][0], b2=c["betas"][1],
    )  # fmt: skip
    ema = EmaConfig(decay=c["ema_decay"], every=c["ema_every"], warmup=False)
    plan = _blueprint_of(config, settings)
    variables = nnx.to_flat_state(nnx.state(nnx.eval_shape(lambda: LINA(config, rngs=nnx.Rngs(0))), nnx.Param))
    decayed = {path: variable.get_metadata().get("decay", True) for path, variable in variables}
    for group in case.manifest["param_groups"]:
        for key in group["params"]:
            path = next(e.path for e in table if e.key == key)
            assert decayed[path] == (group["weight_decay"] > 0), key
    ours, published = {e.key for e in table if e.path in flatten_dict(frozen)}, set(case.manifest["frozen"])
    assert published <= ours
    assert ours - published <= {"text_embed.weight"}  # a buffer, not a parameter: a manifest may omit it
    probe = case.manifest["lr_probe"]
    published = optim.learning_rate(
        OptimConfig(learning_rate=probe["lr_max"], warmup_steps=probe["warmup_steps"]), steps=2_500_000
    )
    np.testing.assert_allclose([published(s) for s in probe["steps"]], probe["values"], rtol=1e-6)
    schedule = optim.learning_rate(settings, c["steps"])
    case.check("outputs.lrs", [schedule(s) for s in range(c["steps"])])

    def objective(params, tokens, condition, draws):
        return loss_of(nnx.merge(graphdef, params, frozen), tokens, condition, draws, sigmas_of(case))

    @jax.jit
    def update(run, tokens, condition, draws):
        loss, grads = jax.value_and_grad(objective)(run.params, tokens, condition, draws)
        return loss, training_step.apply_gradients(ema, plan.optimizer, run, grads)

    run, losses = jax.device_put(state.fresh_state(trained, frozen, plan.optimizer), plan.shardings), []
    prefixes = [f"step{s}." for s in range(c["steps"] + 1)]  # the last recorded loss follows all updates
    capacity = max(case[f"{prefix}prev_ids"].shape[1] for prefix in prefixes)  # one program, as in training
    for s, prefix in enumerate(prefixes):
        tokens = tokens_of(case[f"{prefix}x"], config.patch_size)
        draws = dataclasses.replace(draws_of(case, c["loss_repeat"], prefix), max_visible=capacity)
        loss, updated = update(run, tokens, condition_of(case, config, c["batch"], prefix), draws)
        losses.append(loss)
        if s < c["steps"]:
            run = updated
    case.check("outputs.losses", losses)
    flat_frozen = flatten_dict(frozen)
    for kind, tree in (("params", run.params), ("ema", run.ema)):
        both = unflatten_dict(flatten_dict(tree) | flat_frozen)
        named = by_published_names(table, both)
        for name in [n for n in case.left if n.startswith(f"outputs.{kind}.")]:
            case.check(name, named[name.removeprefix(f"outputs.{kind}.")])


def _blueprint_of(config: ModelConfig, settings: OptimConfig) -> state.Blueprint:
    return state.make_blueprint(Config(model=config, optim=settings), mesh.build(MeshConfig(), jax.devices()[:1]))
