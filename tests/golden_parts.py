"""Checks of the fixtures of single parts: attention, blocks, the head, embeddings, RoPE, time grids."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from golden_case import Case, loaded, module, tokens_of

from lina_jax import decoding_schedule, torch_layout
from lina_jax.models import embeddings, flow, head, layers
from lina_jax.models.attention import GATE_NAMES, Attention, AttentionConfig
from lina_jax.models.transformer import Block


# Which of our gates a published layer has, judging by the names of its weights.
def gate_of(weights: dict, heads: int) -> str:
    if "key_gate.weight" in weights:
        return "dynamic"
    names = {name for name in weights if "scale" in name}
    if not names:
        return "none"
    if names == set(GATE_NAMES["head"].values()):
        return "shared" if weights["key_scale"].shape[1] == 1 and heads > 1 else "head"
    return next(gate for gate, expected in GATE_NAMES.items() if set(expected.values()) == names)


def attention_case(config: dict, weights: dict, softmax: bool) -> tuple[AttentionConfig, dict]:
    """Our config of a published attention layer, and the options of `torch_layout.attention` for its weights."""
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


def attention(case: Case, kernel: str = "xla") -> None:
    ours, options = attention_case(case.config, case.weights, case.config["variant"] == "softmax")
    ours = dataclasses.replace(ours, kernel=kernel)
    table = list(torch_layout.attention("", (), None, **options))
    table = [dataclasses.replace(e, key=e.key.removeprefix(".")) for e in table]
    graphdef, tree = loaded(lambda rngs: Attention(ours, rngs=rngs), table, case.weights)
    angles = None
    if case.config["rope"] and not options["split_q"]:  # published subtraction attention ignores them
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
    embed = module(lambda rngs: embeddings.LabelEmbed(c["num_classes"], c["dim"], rngs=rngs), table, case.weights)
    case.check("outputs.eval", embed(jnp.asarray(case["ids"])))
    kept = case["train_u"][:, 0] > c["dropout_train"]
    case.check("outputs.train", embed(jnp.where(kept, case["train_ids"], c["num_classes"])))


def embed_text(case: Case) -> None:
    c = case.config

    def make(rngs):
        return embeddings.TextEmbed(c["token_dim"], c["dim"], rngs=rngs, dtype=jnp.float32)

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
        lambda rngs: embeddings.TimeEmbed(c["dim"], rngs=rngs), list(torch_layout.time_embed("", ())), case.weights
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
            rotated = jax.jit(lambda q, at, dim=dim: layers.rotate(q, layers.rotary_angles(at, dim)))(q, where)
            case.check(f"outputs.{name}.{kind}.q", rearrange(rotated, "b n h d -> b h n d"))


def num_preds(case: Case) -> None:
    for tokens, steps in case.config["combos"]:
        predicted = decoding_schedule.tokens_per_step(tokens, steps)
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
