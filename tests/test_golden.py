"""Every fixture in $LINA_GOLDEN_DIR (default: tests/golden): values, gradients, trajectories, whole sampling runs.

A fixture is `CASE.json` (what, which sizes, which tolerances) and `CASE.safetensors` (inputs, published weights,
outputs, gradients). What is computed is chosen by the case's name and its manifest; every recorded array is checked.
"""

import dataclasses
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file

from lina_jax import generate, mesh, optim, state, torch_layout
from lina_jax.config import Config, EmaConfig, MeshConfig, ModelConfig, OptimConfig, SampleConfig
from lina_jax.models import flow, head, layers
from lina_jax.models.attention import GATE_NAMES, Attention, AttentionConfig
from lina_jax.models.draws import Draws
from lina_jax.models.layers import Frozen
from lina_jax.models.lina import LINA, unconditional
from lina_jax.models.transformer import Block

GOLDEN = Path(os.environ.get("LINA_GOLDEN_DIR") or Path(__file__).parent / "golden")
CASES = sorted(path.stem for path in GOLDEN.glob("*.json"))
LATER = {"vae_": "the autoencoders are not built yet", "phi": "the text encoder is not built yet"}

# Published module suffix -> what it is here.
LINA_VARIANT = {"normalization": "division", "depthwise_conv": True}
PLAIN = {"depthwise_conv": False, "kv_gate": "none"}
VARIANTS = {
    "softmax": {"attention": "softmax", **PLAIN},
    "linear6": {"normalization": "division", **PLAIN},
    "linear9": {"normalization": "subtraction", **PLAIN},
    "decouple1": {**LINA_VARIANT, "kv_gate": "none"},
    "decouple10": {"normalization": "subtraction", "depthwise_conv": True, "kv_gate": "none"},
    "kvscale1": {**LINA_VARIANT, "kv_gate": "head"},
    "kvscale2": {**LINA_VARIANT, "kv_gate": "shared"},
    "kvscale3": {**LINA_VARIANT, "kv_gate": "key"},
    "kvscale4": {**LINA_VARIANT, "kv_gate": "value"},
    "kvscale5": {**LINA_VARIANT, "kv_gate": "decoupled"},
    "kvscale6": {**LINA_VARIANT, "kv_gate": "dynamic"},
}


class Case:
    """One fixture; `check` compares an array with the recording and remembers that it was checked."""

    def __init__(self, name: str):
        self.name = name
        self.manifest = json.loads((GOLDEN / f"{name}.json").read_text())
        self.config = self.manifest["config"]
        self.arrays = load_file(GOLDEN / self.manifest["file"])
        self.weights = self.group("weights.")
        if "weights_file" in self.manifest:
            shared = load_file(GOLDEN / self.manifest["weights_file"])
            ignored = tuple(self.manifest.get("weights_ignore", ()))
            named = {k.removeprefix("weights."): v for k, v in shared.items() if k.startswith("weights.")}
            self.weights |= {k: v for k, v in named.items() if not (ignored and k.startswith(ignored))}
        self.left = {name for name in self.arrays if name.startswith(("outputs.", "grads."))}

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[f"inputs.{name}"]

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    def group(self, prefix: str) -> dict[str, np.ndarray]:
        return {k.removeprefix(prefix): v for k, v in self.arrays.items() if k.startswith(prefix)}

    def check(self, name: str, got) -> None:
        want, got = self.arrays[name], np.asarray(got)
        assert got.shape == want.shape, f"{name}: {got.shape}, recorded {want.shape}"
        self.left.discard(name)
        want, got = want.astype(np.float64), got.astype(np.float64)
        assert np.all(np.isfinite(got)), f"{name}: not finite"
        error = np.max(np.abs(got - want), initial=0.0)
        largest = np.max(np.abs(want), initial=0.0)
        tolerance = self.manifest["tolerance"][name]
        for metric in tolerance.keys() - {"atol"}:
            if metric == "exact":
                value, bound = error, 0.0
            elif metric == "max_abs":
                value, bound = error, tolerance[metric]
            elif metric == "rel_to_max":
                value, bound = error / (largest or 1.0), tolerance[metric]
            elif metric == "rel_l2":
                value, bound = np.linalg.norm(got - want) / np.linalg.norm(want), tolerance[metric]
            elif metric == "elementwise_rel":
                value = np.max(np.abs(got - want) - tolerance["atol"] - tolerance[metric] * np.abs(want))
                bound = 0.0
            else:
                raise AssertionError(f"{name}: unknown metric {metric}")
            assert value <= bound, f"{name}: {metric} {value:.3g} > {bound:.3g}"

    def check_grads(self, table: list[torch_layout.Entry], grads) -> None:
        """Recorded gradients of weights, by their published names."""
        named = torch_layout.to_torch(table, grads)
        for key in [name.removeprefix("grads.") for name in self.left if name.startswith("grads.")]:
            if key.endswith(".weight_rows"):
                self.check(f"grads.{key}", named[key.removesuffix("_rows")][self["label_ids"]])
            elif key in named:
                self.check(f"grads.{key}", named[key])


def parts(module: nnx.Module):
    """(graphdef, trained, frozen) as plain dicts."""
    graphdef, trained, frozen = nnx.split(module, nnx.Param, Frozen)
    return graphdef, nnx.to_pure_dict(trained), nnx.to_pure_dict(frozen)


def loaded(make, table, weights):
    """The module that make(rngs) builds, with published weights: (graphdef, tree of all arrays)."""
    graphdef, trained, frozen = parts(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    shapes = flatten_dict(trained) | flatten_dict(frozen)
    return graphdef, torch_layout.from_torch(table, weights, unflatten_dict(shapes))


def module(make, table, weights):
    graphdef, tree = loaded(make, table, weights)
    return nnx.merge(graphdef, jax.tree.map(jnp.asarray, tree))


def model_config(c: dict) -> ModelConfig:
    text = "text_token_dim" in c
    return ModelConfig(
        condition="text" if text else "class",
        num_classes=1000,
        text_length=c.get("text_token_len", 256),
        text_dim=c.get("text_token_dim", 2560),
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
        **VARIANTS[c["variant"].removesuffix("_high_res")],
    )


def lina(case: Case):
    """(config, table, graphdef, trained, frozen) of a whole-model case."""
    config = model_config(case.config)
    if config.condition == "class":
        config = ModelConfig(**{**vars(config), "num_classes": case.weights["label_embed.weight"].shape[0] - 1})
    table = list(torch_layout.entries(config))
    graphdef, tree = loaded(lambda rngs: LINA(config, rngs=rngs), table, case.weights)
    flat = flatten_dict(jax.tree.map(jnp.asarray, tree))
    _, trained, _ = parts(nnx.eval_shape(lambda: LINA(config, rngs=nnx.Rngs(0))))
    names = flatten_dict(trained).keys()
    trained = unflatten_dict({k: v for k, v in flat.items() if k in names})
    frozen = unflatten_dict({k: v for k, v in flat.items() if k not in names})
    return config, table, graphdef, trained, frozen


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


def tokens_of(latents: np.ndarray, patch: int) -> jax.Array:
    return layers.patchify(jnp.asarray(rearrange(latents, "b c h w -> b h w c")), patch)


def latents_of(tokens: jax.Array, config: ModelConfig) -> np.ndarray:
    return rearrange(np.asarray(layers.unpatchify(tokens, config.image_grid, config.patch_size)), "b h w c -> b c h w")


def draws_of(case: Case, repeat: int, prefix: str = "") -> Draws:
    ids, mask = case[f"{prefix}prev_ids"][..., 0], case[f"{prefix}mask"][..., 0] > 0
    return Draws(
        drop=jnp.zeros(len(ids), bool),
        visible_ids=jnp.asarray(ids),
        visible=jnp.ones(ids.shape, bool),
        mask=jnp.asarray(mask),
        timestep=jnp.asarray(rearrange(case[f"{prefix}timestep_idx"], "(r b) n -> r b n", r=repeat)),
        noise=jnp.asarray(rearrange(case[f"{prefix}noise"], "(r b) n c -> r b n c", r=repeat)),
    )


def loss_of(model: LINA, tokens, condition, draws: Draws):
    losses = model.token_losses(tokens, condition, draws, flow.training_sigmas())
    return jnp.sum(losses * draws.mask) / (draws.timestep.shape[0] * jnp.sum(draws.mask) + 1e-5)


# Which of our gates a published layer has, by the names of its weights.
def gate_of(weights: dict, heads: int) -> str:
    if "key_gate.weight" in weights:
        return "dynamic"
    names = {name for name in weights if "scale" in name}
    if not names:
        return "none"
    if names == set(GATE_NAMES["head"]):
        return "shared" if weights["key_scale"].shape[1] == 1 and heads > 1 else "head"
    return next(gate for gate, expected in GATE_NAMES.items() if set(expected) == names)


def attention_case(config: dict, weights: dict, softmax: bool) -> tuple[AttentionConfig, dict]:
    """Our configuration of a published attention layer, and the options of its table."""
    kernel = weights["dw_conv.weight"].shape[-1] if "dw_conv.weight" in weights else 0
    split_q = "q.weight" in weights
    gate = gate_of(weights, config["num_heads"])
    grid = config.get("grid") or (0, 0)
    grid = (grid, grid) if isinstance(grid, int) else tuple(grid)
    condition_tokens = config.get("cond_tokens") or 0
    if gate not in ("none", "dynamic") and not kernel:
        condition_tokens, grid = weights[GATE_NAMES[gate][0]].shape[2], (0, 0)
    ours = AttentionConfig(
        width=config["dim"],
        heads=config["num_heads"],
        kind="softmax" if softmax else "linear",
        normalization="subtraction" if split_q else "division",
        conv_kernel=kernel,
        gate=gate,
        condition_tokens=condition_tokens,
        grid=grid,
    )
    return ours, {"split_q": split_q, "conv": bool(kernel), "gate": gate}


def attention(case: Case) -> None:
    ours, options = attention_case(case.config, case.weights, case.config["variant"] == "softmax")
    table = list(torch_layout.attention("", (), None, **options))
    table = [dataclasses.replace(e, key=e.key.removeprefix(".")) for e in table]
    graphdef, tree = loaded(lambda rngs: Attention(ours, rngs=rngs), table, case.weights)
    angles = None
    if case.config["rope"]:
        angles = layers.rotary_angles(jnp.asarray(case["pos"]), ours.width // ours.heads)

    @jax.jit
    def run(tree, x):
        return nnx.merge(graphdef, tree)(x, angles=angles)

    def objective(tree, x):
        return jnp.sum(run(tree, x) * case["cotangent"])

    case.check("outputs.y", run(tree, case["x"]))
    if "inputs.x_short" in case:
        case.check("outputs.y_short", run(tree, case["x_short"]))
    grads, grad_x = jax.grad(objective, argnums=(0, 1))(tree, jnp.asarray(case["x"]))
    case.check("grads.x", grad_x)
    case.check_grads(table, grads)


def block(case: Case) -> None:
    weights = {k.removeprefix("attn."): v for k, v in case.weights.items() if k.startswith("attn.")}
    ours, options = attention_case(case.config, weights, "softmax" in case.name)
    table = [dataclasses.replace(e, key=e.key.removeprefix(".")) for e in torch_layout.block("", (), None, **options)]
    layer = module(lambda rngs: Block(ours, case.config["mlp_ratio"], rngs=rngs), table, case.weights)
    case.check("outputs.y", layer(case["x"]))
    case.check("outputs.mlp", layer.mlp(case["x"]))


def diffusion_block(case: Case) -> None:
    width, x, small = case.config["dim"], jnp.asarray(case["x"]), jnp.asarray(case["x_small"])
    z = jax.nn.silu(jnp.asarray(case["z"]))

    def adaptive(name, outputs):
        table = list(torch_layout.linear(f"{name}.proj", ("proj",)))
        weights = {k: v for k, v in case.weights.items() if k.startswith(name)}
        return module(lambda rngs: head.AdaptiveNorm(width, outputs, rngs=rngs, dtype=jnp.float32), table, weights)

    h3, gate3 = adaptive("ada3", 3)(x, z)
    case.check("outputs.h3", h3)
    case.check("outputs.gate3", gate3)
    case.check("outputs.h3_small", adaptive("ada3", 3)(small, z)[0])
    case.check("outputs.h2", adaptive("ada2", 2)(x, z)[0])
    weights = {k: v for k, v in case.weights.items() if k.startswith("block.")}
    table = list(torch_layout.diffusion_block("block", ()))
    layer = module(lambda rngs: head.DiffusionBlock(width, rngs=rngs, dtype=jnp.float32), table, weights)
    case.check("outputs.block", layer(x, z))
    case.check("outputs.block_small", layer(small, z))


def diffusion_mlp(case: Case) -> None:
    c = case.config
    table = list(torch_layout.diffusion_head("", (), c["depth"], c["patch_size"]))
    dim = c["patch_size"] ** 2 * c["image_dim"]

    def make(rngs):
        return head.DiffusionHead(dim, c["cond_dim"], c["embed_dim"], c["depth"], rngs=rngs, dtype=jnp.float32)

    net = module(make, table, case.weights)
    x, condition = tokens_of(case["x"], c["patch_size"]), net.embed.condition(jnp.asarray(case["z"]))
    per_image = net.embed.time(jnp.asarray(case["t_per_sample"]))[:, None]
    case.check("outputs.train", net(x, net.embed.time(jnp.asarray(case["t_per_token"])), condition))
    case.check("outputs.all_per_sample_t", net(x, per_image, condition))
    ids = jnp.asarray(case["pred_ids"])
    made = net(jnp.take_along_axis(x, ids, 1), per_image, jnp.take_along_axis(condition, ids, 1))
    case.check("outputs.pred", x.at[jnp.arange(len(x))[:, None], ids[..., 0]].set(made))


def embed_time_cond(case: Case) -> None:
    c = case.config

    def make(rngs):
        return head.TimeCondition(c["cond_dim"], c["embed_dim"], rngs=rngs, dtype=jnp.float32)

    embed = module(make, list(torch_layout.time_condition("", ())), case.weights)
    condition, times = embed.condition(jnp.asarray(case["z"])), jnp.asarray(case["t_per_sample"])
    case.check("outputs.freq_per_sample", head.time_features(times))
    case.check("outputs.per_sample", condition + embed.time(times)[:, None])
    case.check("outputs.per_token", condition + embed.time(jnp.asarray(case["t_per_token"])))


def embed_label(case: Case) -> None:
    c = case.config
    table = list(torch_layout.label_embed("", ()))
    embed = module(lambda rngs: layers.LabelEmbed(c["num_classes"], c["dim"], rngs=rngs), table, case.weights)
    case.check("outputs.eval", embed(jnp.asarray(case["ids"])))
    kept = case["train_u"][:, 0] > c["dropout_train"]
    case.check("outputs.train", embed(jnp.where(kept, case["train_ids"], c["num_classes"])))


def embed_text(case: Case) -> None:
    c = case.config

    def make(rngs):
        return layers.TextEmbed(c["token_dim"], c["dim"], rngs=rngs, dtype=jnp.float32)

    embed = module(make, list(torch_layout.text_embed("", ())), case.weights)
    features = np.zeros((len(c["lens"]), c["num_tokens"], c["token_dim"]), np.float32)
    for i, length in enumerate(c["lens"]):
        if length:
            features[i, :length] = case[f"prompt{i}"]
    lengths = jnp.asarray(c["lens"])
    case.check("outputs.encode_prompts", embed.pad(jnp.asarray(features), lengths))
    case.check("outputs.text", embed(jnp.asarray(features), lengths))
    given = jnp.asarray(case["tensor"])
    case.check("outputs.tensor", embed(given, jnp.full(len(given), given.shape[1])))


def embed_patch(case: Case) -> None:
    c = case.config
    table = list(torch_layout.linear("proj", (), layout="patches", patch=c["patch_size"]))
    dim = c["patch_size"] ** 2 * c["image_dim"]
    proj = module(
        lambda rngs: layers.Linear(dim, c["dim"], (None, None), rngs=rngs, dtype=jnp.float32), table, case.weights
    )
    case.check("outputs.patchify", tokens_of(case["image"], c["patch_size"]))
    case.check("outputs.proj", proj(tokens_of(case["image"], c["patch_size"])))
    video = case["video"]
    frames = tokens_of(rearrange(video, "b c t h w -> (b t) c h w"), c["patch_size"])
    case.check("outputs.proj_video", rearrange(proj(frames), "(b t) n d -> b t n d", b=len(video)))
    grid = tuple(size // c["patch_size"] for size in c["hw"]) if "grid" not in c else tuple(c["grid"])
    if grid[0] * grid[1] != case["tokens"].shape[1]:  # hw already counts tokens
        grid = tuple(c["hw"])
    image = layers.unpatchify(jnp.asarray(case["tokens"]), grid, c["patch_size"])
    case.check("outputs.unpatchify", rearrange(np.asarray(image), "b h w c -> b c h w"))


def embed_pos(case: Case) -> None:
    table = layers.position_table(tuple(case.config["base_size"]), case.config["dim"])
    case.check("outputs.pos_table", table)
    case.check("outputs.pos_embed", case["x"] + table)


def embed_video_pos(case: Case) -> None:
    c = case.config
    embed = module(
        lambda rngs: layers.TimeEmbed(c["dim"], rngs=rngs), list(torch_layout.time_embed("", ())), case.weights
    )
    table = layers.position_table(tuple(c["base_size"]), c["dim"])
    case.check("outputs.time_embed_t1", embed()[:, None])
    case.check("outputs.time_embed_t4_base4", embed(frames=4)[:, None])
    case.check("outputs.x3", case["x3"] + table)
    case.check("outputs.x4", case["x4"] + embed()[:, None] + table)


def rope(case: Case) -> None:
    grid, pad = tuple(case.config["hw"]), case.config["pad"]
    for dim in case.config["dims"]:
        name = f"d{dim}"
        positions = layers.grid_positions(grid)
        batch = case[f"{name}.ids"].shape[0]
        case.check(f"outputs.{name}.pos", np.broadcast_to(positions, (batch, *positions.shape)))
        case.check(f"outputs.{name}.pos_t2", layers.grid_positions(grid, frames=2)[None])
        gathered = positions[case[f"{name}.ids"][..., 0]]
        front = np.zeros((pad, 3), int)
        for kind, where in {
            "plain": positions[None],
            "ids": gathered,
            "pad": np.concatenate([front, positions])[None],
            "ids_pad": np.concatenate([np.broadcast_to(front, (batch, pad, 3)), gathered], axis=1),
        }.items():
            q = jnp.asarray(rearrange(case[f"{name}.{kind}.q"], "b h n d -> b n h d"))
            rotated = layers.rotate(q, layers.rotary_angles(jnp.asarray(where), dim))
            case.check(f"outputs.{name}.{kind}.q", rearrange(rotated, "b n h d -> b h n d"))


def num_preds(case: Case) -> None:
    for tokens, steps in case.config["combos"]:
        predicted = flow.cosine_schedule(tokens, steps)
        case.check(f"outputs.n{tokens}_k{steps}", predicted)
        case.check(f"outputs.n{tokens}_k{steps}.positive", predicted[predicted > 0])


def scheduler(case: Case) -> None:
    for shift in case.config["shifts"]:
        name = f"shift{shift:g}"
        sigmas = flow.training_sigmas(shift)
        case.check(f"outputs.{name}.train_sigmas", sigmas)
        case.check(f"outputs.{name}.train_timesteps", flow.TRAIN_TIMESTEPS * sigmas)
        case.check(f"outputs.{name}.sampled_idx", flow.timestep_index(jnp.asarray(case[f"{name}.normal"])))
        sigma = sigmas[case[f"{name}.idx"]]
        case.check(f"outputs.{name}.timestep", flow.TRAIN_TIMESTEPS * sigma)
        case.check(f"outputs.{name}.x_t", flow.interpolate(case[f"{name}.x"], case[f"{name}.noise"], sigma))
        for steps in case.config["steps"]:
            run, grid = f"{name}.steps{steps}", flow.euler_sigmas(steps, shift)
            case.check(f"outputs.{run}.sigmas", grid)
            case.check(f"outputs.{run}.timesteps", flow.TRAIN_TIMESTEPS * grid[:-1])
            x, path = jnp.asarray(case[f"{run}.sample"]), []
            for j, velocity in enumerate(case[f"{run}.model_outputs"]):
                x = flow.euler_step(x, velocity, grid[j], grid[j + 1])
                path.append(x)
            case.check(f"outputs.{run}.trajectory", jnp.stack(path))


def transformer(case: Case) -> None:
    config, table, graphdef, trained, frozen = lina(case)
    repeat, batch = case.config["loss_repeat"], case.config["batch"]
    tokens, condition = tokens_of(case["x"], config.patch_size), condition_of(case, config, batch)
    draws, sigmas = draws_of(case, repeat), flow.training_sigmas()

    @jax.jit
    def forward(trained, frozen):
        model = nnx.merge(graphdef, trained, frozen)
        c = model.encode_condition(condition)
        return {
            "outputs.cond_tokens": model.embed_condition(condition)[0],
            "outputs.c": c,
            "outputs.masked": model.mask_image(tokens, draws.mask),
            "outputs.z": model.encode_image(tokens, draws.mask, draws.visible_ids, draws.visible, c),
            "outputs.model_pred": rearrange(model.velocities(tokens, condition, draws, sigmas), "r b n c -> (r b) n c"),
            "outputs.per_token_loss": rearrange(
                model.token_losses(tokens, condition, draws, sigmas), "r b n -> (r b) n 1"
            ),
        }

    @jax.jit
    def loss_and_grads(trained, frozen):
        return jax.value_and_grad(lambda t, f: loss_of(nnx.merge(graphdef, t, f), tokens, condition, draws), (0, 1))(
            trained, frozen
        )

    for name, value in forward(trained, frozen).items():
        if name in case:
            case.check(name, value)
    loss, (trained_grads, frozen_grads) = loss_and_grads(trained, frozen)
    case.check("outputs.loss", loss[None])
    flat = flatten_dict(trained_grads) | flatten_dict(frozen_grads)
    grads = unflatten_dict(flat)
    case.check_grads(table, grads)
    named = torch_layout.to_torch(table, grads)
    case.check("outputs.all_grad_norms", [np.linalg.norm(named[key]) for key in case.manifest["param_order"]])


def sample(case: Case) -> None:
    config, _, graphdef, trained, frozen = lina(case)
    c, batch = case.config, case.config["batch"]
    low = c["guidance_scale"] if c["min_guidance_scale"] is None else c["min_guidance_scale"]
    plan = generate.schedule(
        SampleConfig(
            steps=c["num_inference_steps"],
            euler_steps=c["num_diffusion_steps"],
            guidance=c["guidance_scale"],
            guidance_min=low,
            stages=2,
        ),
        config.image_tokens,
        c["shift"],
    )
    case.check("outputs.num_preds", plan.predicted)
    case.check("outputs.guidance", plan.guidance)
    model = nnx.merge(graphdef, trained, frozen)
    condition, order = condition_of(case, config, batch), jnp.asarray(case["pred_order"][..., 0])
    # Each token is made once: of the noise drawn at every step, only that of its own step matters.
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
    copies = 2 if plan.guided else 1
    encoded = model.encode_condition(condition)
    case.check("outputs.c", encoded)
    order, all_rank = jnp.tile(order, (copies, 1)), np.tile(rank, (copies, 1))
    for i in range(len(plan.predicted)):
        if f"outputs.z_step{i}" not in case:
            continue
        count, before = plan.visible[i], jnp.tile(after(i - 1) if i else jnp.zeros_like(tokens), (copies, 1, 1))
        visible = jnp.ones((len(order), count), bool)
        case.check(
            f"outputs.z_step{i}", model.encode_image(before, all_rank >= count, order[:, :count], visible, encoded)
        )


def train_steps(case: Case) -> None:
    config, table, graphdef, trained, frozen = lina(case)
    c = case.config
    settings = OptimConfig(
        learning_rate=c["lr"], warmup_steps=c["warmup_steps"], warmup_factor=c["warmup_factor"], eps=c["adam_eps"],
        weight_decay=c["weight_decay"], b1=c["betas"][0], b2=c["betas"][1],
    )  # fmt: skip
    ema = EmaConfig(decay=c["ema_decay"], every=c["ema_every"], warmup=False)
    plan = _blueprint_of(config, settings)
    for group in case.manifest["param_groups"]:
        decayed = flatten_dict(plan.decayed)
        for key in group["params"]:
            path = next(e.path for e in table if e.key == key)
            assert decayed[path] == (group["weight_decay"] > 0), key
    assert {e.key for e in table if e.path in flatten_dict(frozen)} == set(case.manifest["frozen"])
    probe = case.manifest["lr_probe"]
    published = optim.learning_rate(
        OptimConfig(learning_rate=probe["lr_max"], warmup_steps=probe["warmup_steps"]), steps=2_500_000
    )
    np.testing.assert_allclose([published(s) for s in probe["steps"]], probe["values"], rtol=1e-6)
    schedule = optim.learning_rate(settings, c["steps"])
    case.check("outputs.lrs", [schedule(s) for s in range(c["steps"])])

    def objective(params, tokens, condition, draws):
        return loss_of(nnx.merge(graphdef, params, frozen), tokens, condition, draws)

    @jax.jit
    def update(run, tokens, condition, draws):
        loss, grads = jax.value_and_grad(objective)(run.params, tokens, condition, draws)
        return loss, state.apply_gradients(ema, plan.optimizer, run, grads)

    run, losses = state.fresh_state(trained, frozen, plan.optimizer), []
    for s in range(c["steps"] + 1):  # the last recorded loss is that after all updates
        prefix = f"step{s}."
        tokens = tokens_of(case[f"{prefix}x"], config.patch_size)
        inputs = tokens, condition_of(case, config, c["batch"], prefix), draws_of(case, c["loss_repeat"], prefix)
        if s < c["steps"]:
            loss, run = update(run, *inputs)
        else:
            loss = jax.jit(objective)(run.params, *inputs)
        losses.append(loss)
    case.check("outputs.losses", losses)
    flat_frozen = flatten_dict(frozen)
    for kind, tree in (("params", run.params), ("ema", run.ema)):
        both = unflatten_dict(flatten_dict(tree) | flat_frozen)
        named = torch_layout.to_torch(table, both)
        for name in [n for n in case.left if n.startswith(f"outputs.{kind}.")]:
            case.check(name, named[name.removeprefix(f"outputs.{kind}.")])


def _blueprint_of(config: ModelConfig, settings: OptimConfig) -> state.Blueprint:
    return state.blueprint(Config(model=config, optim=settings), mesh.build(MeshConfig(), jax.devices()[:1]))


# The first prefix that fits; longer names stand before their prefixes.
RUNNERS = {
    "attn_": attention,
    "block_": block,
    "diffusion_block": diffusion_block,
    "diffusion_mlp": diffusion_mlp,
    "embed_time_cond": embed_time_cond,
    "embed_label": embed_label,
    "embed_text": embed_text,
    "embed_patch": embed_patch,
    "embed_pos": embed_pos,
    "embed_video_pos": embed_video_pos,
    "rope": rope,
    "num_preds": num_preds,
    "scheduler": scheduler,
    "transformer_": transformer,
    "sample_": sample,
    "train_steps": train_steps,
}


def test_there_are_fixtures():
    assert CASES, f"no fixtures in {GOLDEN}"


@pytest.mark.parametrize("name", CASES)
def test_golden(name):
    for prefix, reason in LATER.items():
        if name.startswith(prefix):
            pytest.skip(reason)
    runner = next((run for prefix, run in RUNNERS.items() if name.startswith(prefix)), None)
    assert runner, f"unknown kind of fixture: {name}"
    case = Case(name)
    runner(case)
    assert not case.left, f"recorded but not checked: {sorted(case.left)}"
