"""Open published pipeline directories and derive their config.

Facts about a model come from several sources: the shapes of its tensors, config.json, model_index.json and others. All
of them are collected, and every contradiction is reported.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lina_jax import config as config_lib
from lina_jax import config_fields
from lina_jax.config import Config, ModelConfig
from lina_jax.encoders import describe_autoencoder
from lina_jax.errors import UserError
from lina_jax.models.vae import PUBLISHED as AUTOENCODERS
from lina_jax.pipeline import Pipeline
from lina_jax.published_names import HEADS, variant_of

# Number of axes of the tensors that reveal the kind of attention.
ATTENTION_RANKS = {
    **dict.fromkeys(("key_scale", "value_scale", "key_scale_gamma", "key_scale_tau", "dw_conv.weight"), 4),
    "key_gate.weight": 2,
}
NUMBERS_OF_AUTOENCODER = ("kind", "stride", "scaling_factor", "shift_factor")
# Required values of scheduler_config.json, for the fields that it has.
SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "use_dynamic_shifting": False,
}
TEXT_SAMPLING = {"steps": 128, "guidance": 7.0, "guidance_schedule": "constant"}  # of the published evaluation


class Facts:
    """The values that sources give for each field of a config; `get` returns that of the first source."""

    def __init__(self):
        self._said: dict[str, dict[str, Any]] = {}  # field -> source -> value

    def add(self, source: str, fields: Mapping[str, Any], prefix: str = "model.") -> None:
        for name, value in fields.items():
            value = tuple(value) if isinstance(value, list) else value
            self._said.setdefault(prefix + name, {})[source] = value

    def get(self, field: str) -> Any:
        return next(iter(self._said.get(field, {}).values()), None)

    @property
    def values(self) -> dict[str, Any]:
        return {field: self.get(field) for field in self._said}

    def contradictions(self) -> list[str]:
        return [
            f"{field}: {', '.join(f'{value!r} from {source}' for source, value in said.items())}"
            for field, said in self._said.items()
            if any(value != self.get(field) for value in said.values())
        ]


def config_of(pipeline: Pipeline, given: Config | None) -> tuple[Config, list[str]]:
    """The config of a published model, and the assumptions made for it; `given` is the user's config, if any.

    Raises UserError listing every contradiction, or every field that only the user can supply.
    """
    facts = Facts()
    if given:
        fields = {name: value for name, value in config_fields.flatten(given).items() if name.startswith("model.")}
        facts.add("--config", fields, "")
    shapes = pipeline.tensors.shapes
    facts.add("the tensors", _from_shapes(pipeline.source, shapes))
    named = "config.json"
    facts.add(named, _from_transformer(pipeline.transformer, text="text_embed.weight" in shapes))
    facts.add(f"{named} (image_size)", _grid_of_size(pipeline.transformer))
    facts.add("model_index.json", _from_index(pipeline.index, given))
    facts.add("the weights' metadata", _from_metadata(pipeline.metadata.get("model", {}), given))
    assumed = [] if given else _assume(facts, shapes)
    problems = facts.contradictions()
    grids = facts.get("model.image_grid"), facts.get("model.condition_grid")
    length = _gate_length(shapes)
    if length and all(grids) and length != sum(math.prod(grid) for grid in grids):
        problems.append(f"model.image_grid, model.condition_grid: {grids[0]} and {grids[1]}, gates for {length} tokens")
    autoencoder = _autoencoder(pipeline, facts, given, problems)
    shift = _shift(pipeline, given, problems)
    if problems:
        raise UserError(f"{pipeline.source}: its parts contradict each other; " + "; ".join(problems))
    if not given:
        _require(pipeline, facts)
    try:
        return _config(pipeline, facts, given, autoencoder, shift), assumed
    except UserError as error:
        raise UserError(f"{pipeline.source}: {error}") from error


def _from_shapes(source: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Fields of ModelConfig that follow from the names and shapes of published tensors."""

    for key in shapes:
        name = key.rpartition(".attn.")[2]
        if name in ATTENTION_RANKS:
            _shape(source, shapes, key, ATTENTION_RANKS[name])
    shape = functools.partial(_shape, source, shapes)

    width, channels, patch, _ = shape("image_encoder.patch_embed.proj.weight", 4)
    block = "image_encoder.blocks.0"
    depth = _count(shapes, "image_encoder")
    fields = {
        "width": width,
        "latent_channels": channels,
        "patch_size": patch,
        "condition_depth": _count(shapes, "video_encoder"),
        "image_depth": depth,
        "mlp_ratio": shape(f"{block}.mlp.fc1.weight", 2)[0] // width,
        "head_width": shape("image_decoder.patch_embed.proj.weight", 4)[0],
        "head_depth": _count(shapes, "image_decoder"),
        "rotary": not any(key.startswith("video_pos_embed.") for key in shapes),
    }
    if "text_embed.weight" in shapes:
        fields |= {"condition": "text", "text_encoder": "features", "text_dim": shape("text_embed.weight", 2)[1]}
    else:
        fields |= {"condition": "class", "num_classes": shape("label_embed.weight", 2)[0] - 1}
    return fields | _variant(shapes, depth)


def _shape(source: Path, shapes: Mapping[str, tuple[int, ...]], key: str, rank: int) -> tuple[int, ...]:
    """The shape of a required tensor. Raises UserError unless it exists, has `rank` axes and is not empty."""
    if key not in shapes:
        raise UserError(f"{source}: not a LINA or NOVA transformer: it has no {key}")
    if len(shapes[key]) != rank or 0 in shapes[key]:
        raise UserError(f"{source}: {key} is {shapes[key]}, expected {rank} axes, none of them empty")
    return shapes[key]


def _count(shapes: Mapping[str, Any], stack: str) -> int:
    """The number of blocks in a stack."""
    numbers = {key.split(".")[2] for key in shapes if key.startswith(f"{stack}.blocks.")}
    return 1 + max((int(number) for number in numbers if number.isdigit()), default=-1)


def _variant(shapes: Mapping[str, tuple[int, ...]], depth: int) -> dict[str, Any]:
    """Fields of attention, by the second half of the image blocks; softmax and plain division have the same tensors."""
    last = range(depth // 2, depth)
    held = [
        {key.split(".attn.")[1] for key in shapes if key.startswith(f"image_encoder.blocks.{i}.attn.")} for i in last
    ]
    names = set().union(*held)
    conv, gate, heads = "dw_conv.weight" in names, "none", None
    kinds = {"key_gate.weight": "dynamic", "key_scale_gamma": "decoupled", "key_scale": "key", "value_scale": "value"}
    for name, kind in kinds.items():
        if name in names:
            gate = kind
            heads = next(s[0 if kind == "dynamic" else 1] for k, s in shapes.items() if k.endswith(f"attn.{name}"))
            break
    fields = {"depthwise_conv": conv}
    if gate == "key" and "value_scale" in names:
        gate = "head"
    if gate == "head" and heads == 1:  # one gate for all heads, or one head
        heads = None
    else:
        fields["kv_gate"] = gate
    if heads:
        fields["heads"] = heads
    if conv:
        key = next(key for key in shapes if key.endswith(".attn.dw_conv.weight"))
        fields["conv_kernel"] = shapes[key][-1]
    special = [bool({"dw_conv.weight", "q.weight"} & keys) or (gate != "none" and len(keys) > 4) for keys in held]
    if any(special):
        fields["attention"] = "linear" if all(special) else "hybrid"
        fields["normalization"] = "subtraction" if "q.weight" in names else "division"
    return fields


def _gate_length(shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """The number of condition and image tokens, by the shape of their gates; None without gates per token."""
    names = tuple(f".attn.{name}" for name in ("key_scale", "value_scale", "key_scale_gamma"))
    return next((shape[2] for key, shape in shapes.items() if key.endswith(names)), None)


def _from_transformer(raw: Mapping[str, Any], text: bool) -> dict[str, Any]:
    """Fields from a published config.json. Raises UserError for invalid values and for video models."""
    if raw.get("video_mixer_rank"):
        raise UserError(f"config.json: video_mixer_rank={raw['video_mixer_rank']}: video models are not supported")

    for name in ("image_dim", "image_stride", "text_token_dim", "text_token_len"):
        if raw.get(name) is not None and (type(raw[name]) is not int or raw[name] < 1):
            raise UserError(f"config.json: {name}={raw[name]!r}: expected a positive whole number")

    def pair(name: str) -> tuple[int, int]:
        value = raw[name]
        if not isinstance(value, list) or len(value) < 2 or not all(type(n) is int for n in value):
            raise UserError(f"config.json: {name}={value!r}: expected a list of whole numbers")
        return tuple(value[-2:])

    fields = {}
    names = {"image_dim": "latent_channels", "rotary_pos_embed": "rotary"}
    names |= {"text_token_dim": "text_dim", "text_token_len": "text_length"} if text else {}
    fields |= {ours: raw[theirs] for theirs, ours in names.items() if raw.get(theirs) is not None}
    if raw.get("image_stride"):
        fields["patch_size"] = 15 // raw["image_stride"] + 1
    if raw.get("image_base_size"):
        fields["image_grid"] = pair("image_base_size")
    if raw.get("video_base_size"):
        fields["condition_grid"] = pair("video_base_size")
    return fields | (_from_arch(raw["arch"]) if raw.get("arch") else {})


def _from_arch(arch: Any) -> dict[str, int]:
    """['vit_d16w768', 'vit_d32w768', 'mlp_d6w768']: depth and width of condition blocks, image blocks, head."""
    arch = arch if isinstance(arch, list) else [arch]
    parts = [
        re.fullmatch(rf"{kind}_d(\d+)w(\d+)", str(name))
        for kind, name in zip(("vit", "vit", "mlp"), arch, strict=False)
    ]
    if len(parts) != 3 or not all(parts):
        raise UserError(f"config.json: arch={arch!r}: expected three names like vit_d16w768, vit_d32w768, mlp_d6w768")
    (conditions, width), (depth, image_width), (head_depth, head_width) = (map(int, part.groups()) for part in parts)
    if width != image_width:
        raise UserError(f"config.json: arch={arch!r}: condition and image blocks of different widths are not supported")
    fields = {"width": width, "condition_depth": conditions, "image_depth": depth}
    fields |= {"head_depth": head_depth, "head_width": head_width}
    return fields | ({"heads": HEADS[width]} if width in HEADS else {})


def _grid_of_size(raw: Mapping[str, Any]) -> dict[str, Any]:
    size, stride = raw.get("image_size"), raw.get("image_stride")
    if not size or not stride:
        return {}
    height, width = size if isinstance(size, list) and len(size) == 2 else (size, size)
    if type(height) is not int or type(width) is not int:
        raise UserError(f"config.json: image_size={size!r}: expected [height, width] or one number")
    patch = 15 // stride + 1
    return {"image_grid": (height // stride // patch, width // stride // patch)}


def _from_index(index: Mapping[str, Any], given: Config | None) -> dict[str, Any]:
    """Attention, normalisation, convolution and gate, by the name of the published module.

    Raises UserError for an unknown module, unless the user gives a config.
    """
    match index.get("transformer"):
        case [str() as module, *_]:
            if not (fields := variant_of(module)) and not given:
                raise UserError(f"model_index.json: {module} is unknown; describe the model with --config")
            return fields
    return {}


def _from_metadata(model: Mapping[str, Any], given: Config | None) -> Mapping[str, Any]:
    """Fields from the metadata of our own exports; with a given config, only those that tensors may leave open."""
    if not given:
        return model
    names = ["heads", "attention", "image_grid", "condition_grid"]
    names += ["text_length", "mask_text_padding"] if model.get("condition") == "text" else []
    names += ["softmax_period"] if model.get("attention") == "hybrid" else []
    return {name: model[name] for name in names if name in model}


def _assume(facts: Facts, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Add what all published models share to `facts`, where no source has it; a line for each assumption to report."""
    assumed, length = [], _gate_length(shapes)
    side = math.isqrt(4 * length // 5) if length else 0
    if facts.get("model.image_grid") is None and length and side % 2 == 0 and 5 * side**2 == 4 * length:
        facts.add("the gates", {"image_grid": (side, side), "condition_grid": (side // 2, side // 2)})
        assumed.append(f"a square image: {side} x {side} tokens, {side // 2} x {side // 2} condition tokens")
    if facts.get("model.condition") == "text" and facts.get("model.text_length") is None:
        facts.add("all published models", {"text_length": ModelConfig.text_length})
        assumed.append(f"model.text_length={ModelConfig.text_length}")
    if facts.get("model.kv_gate") is None:
        facts.add("the tensors", {"kv_gate": "shared"})
    return assumed


def _require(pipeline: Pipeline, facts: Facts) -> None:
    """Raises UserError naming the fields that no source has."""
    unknown = []
    attention = facts.get("model.attention")
    if attention is None:
        unknown.append(
            "model.attention (softmax and division have the same tensors, only model_index.json tells them apart)"
        )
    if attention == "hybrid" and facts.get("model.softmax_period") is None:
        unknown.append("model.softmax_period (for model.attention=hybrid)")
    if facts.get("model.heads") is None:
        unknown.append("model.heads (given by gates, or by a published width in arch of config.json)")
    for name, where in (("image_grid", "image_base_size"), ("condition_grid", "video_base_size")):
        if facts.get(f"model.{name}") is None:
            unknown.append(f"model.{name} ({where} in config.json)")
    if unknown:
        raise UserError(f"{pipeline.source} is incomplete, so --config is needed for: " + "; ".join(unknown))


def _autoencoder(pipeline: Pipeline, facts: Facts, given: Config | None, problems: list[str]) -> dict[str, Any]:
    """Fields of the autoencoder's config; contradictions are appended to `problems`."""
    channels, said = facts.get("model.latent_channels"), Facts()
    ours = dataclasses.asdict(given.autoencoder) if given else {}

    def agreed(source: str, fields: Mapping[str, Any]) -> None:
        if given:
            said.add("--config", {name: ours[name] for name in fields if name in ours}, "autoencoder.")
        said.add(source, fields, "autoencoder.")
        problems.extend(said.contradictions())

    if pipeline.vae:
        there = describe_autoencoder(pipeline.vae)
        fields = {"kind": "mar" if there.last_level_attention else "sdxl", "stride": there.stride}
        fields |= {"scaling_factor": there.scaling_factor, "shift_factor": there.shift_factor}
        said.add("the tensors", {"latent_channels": channels})
        said.add("vae/", {"latent_channels": there.latent_channels})
        agreed("vae/", fields)
        return {**fields, "path": str(pipeline.vae)}
    if saved := pipeline.metadata.get("autoencoder"):
        agreed("the weights' metadata", {name: saved[name] for name in NUMBERS_OF_AUTOENCODER if name in saved})
    if given:
        return ours
    if saved:
        return {**saved, "path": ""}
    for kind, sizes in AUTOENCODERS.items():
        if channels == sizes.latent_channels:
            return {"kind": kind, "stride": sizes.stride, "scaling_factor": sizes.scaling_factor}
    raise UserError(f"{pipeline.source} has {channels} channels and no vae/: --config must specify the autoencoder")


def _shift(pipeline: Pipeline, given: Config | None, problems: list[str]) -> float:
    """The shift of the noise levels; contradictions are appended to `problems`.

    Raises UserError for a scheduler that is not supported.
    """
    said, scheduler = Facts(), pipeline.scheduler
    for name, expected in SCHEDULER.items():
        if (value := scheduler.get(name, expected)) != expected:
            raise UserError(f"scheduler_config.json: {name}={value!r}: expected {expected!r}")
    if given:
        said.add("--config", {"shift": given.loss.shift}, "loss.")
    if "shift" in scheduler:
        said.add("scheduler_config.json", {"shift": scheduler["shift"]}, "loss.")
    match pipeline.metadata.get("loss"):
        case {"shift": shift}:
            said.add("the weights' metadata", {"shift": shift}, "loss.")
    problems += said.contradictions()
    shift = said.get("loss.shift")
    return 1.0 if shift is None else shift


def _config(
    pipeline: Pipeline, facts: Facts, given: Config | None, autoencoder: Mapping[str, Any], shift: float
) -> Config:
    fields = dataclasses.asdict(given or Config())
    if not given:
        fields["model"] |= {name.removeprefix("model."): value for name, value in facts.values.items()}
        if fields["model"]["condition"] == "text":
            fields["sample"] |= TEXT_SAMPLING
        fields["loss"]["shift"] = shift
    path = fields["autoencoder"]["path"]
    fields["autoencoder"] |= autoencoder
    if path:
        fields["autoencoder"]["path"] = path
    if pipeline.text_encoder and fields["model"]["condition"] == "text" and not fields["text_encoder"]["path"]:
        fields["text_encoder"]["path"] = str(pipeline.text_encoder)
    return config_lib.freeze(fields)
