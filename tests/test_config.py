"""A config is validated once; a mistake gives one line naming the field and its value, and leaves nothing behind."""

import dataclasses
import json
import math
import re
from fractions import Fraction
from pathlib import Path

import pytest

from lina_jax import config_file
from lina_jax.config import Config, default, differences, freeze
from lina_jax.config_fields import check_name, flatten
from lina_jax.errors import UserError

CONFIGS = Path(__file__).parent.parent / "configs"
PRESETS = {
    "shapes_t2i": (),
    "cifar10_c2i": ("tiny", "w384"),
    "imagenet256_c2i": ("w768", "w1024", "w1536"),
    "t2i": ("256", "512", "1024", "2048", "4096"),
    "bench": ("linear", "softmax"),
    "ablation": (
        "division-none-dynamic-64",
        "subtraction-conv-none-768",
        "softmax-1024",
        "hybrid-division-conv-head-1536",
    ),
}


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.py")))
def test_every_experiment_is_valid(name, load_preset):
    for preset in ("", *PRESETS[name]):
        load_preset(f"{name}:{preset}")


@pytest.mark.parametrize("name", [name for name, presets in PRESETS.items() if presets])
def test_unknown_presets_are_refused_by_name(name, load_preset):
    with pytest.raises(ValueError, match="no_such"):
        load_preset(f"{name}:no_such")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("cifar10_c2i.py:huge", "{}/cifar10_c2i.py: unknown preset 'huge': expected one of tiny, w384"),
        ("shapes_t2i.py:tiny", "{}/shapes_t2i.py has no presets"),
        ("nothere.py", "--config={0}/nothere.py: no such file: {0}/nothere.py"),
        ("../README.md", "--config={}/../README.md: expected a .py file"),
        ("", "--config={}/: expected a .py file"),
    ],
)
def test_config_files_that_cannot_be_taken(given, message):
    with pytest.raises(UserError) as error:
        config_file.load(f"{CONFIGS}/{given}")
    assert str(error.value).startswith(message.format(CONFIGS))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", "has no function get_config"),
        ("def get_config(): return 3", "get_config returns int, expected a ConfigDict"),
        ("def get_config(): return missing", "NameError: name 'missing' is not defined"),
        ("def get_config(:", "SyntaxError: invalid syntax"),
    ],
)
def test_config_files_with_mistakes_are_named(tmp_path, text, message):
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(UserError, match=f"^{tmp_path}/mine.py:? {message}"):
        config_file.load(f"{tmp_path}/mine.py")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("modle.width", "unknown config field modle.width (did you mean model?)"),
        ("model.widht", "unknown config field model.widht (did you mean model.width?)"),
        ("steps.number", "unknown config field steps.number (steps is a field, not a group of them)"),
    ],
)
def test_names_of_fields_are_checked_as_a_whole(name, message):
    with pytest.raises(UserError) as error:
        check_name(Config, name)
    assert str(error.value) == message
    check_name(Config, "model.width")


@pytest.fixture
def pixels():
    """The defaults for pixels, as plain dicts."""
    config = default()
    config.model.latent_channels = 3
    config.autoencoder.update(kind="identity", stride=1, scaling_factor=1.0)
    return config.to_dict()


def change(config, **fields):
    for group, changes in fields.items():
        config[group] = config[group] | changes if isinstance(changes, dict) else changes
    return config


def test_a_config_survives_json(pixels):
    """As in a workdir's config.json, where tuples come back as lists."""
    assert freeze(json.loads(json.dumps(pixels))) == freeze(pixels)


def test_what_is_open_can_be_set_to_its_type_alone(pixels):
    open_fields = default().model
    assert open_fields.scan_layers is None
    open_fields.scan_layers = False
    with pytest.raises(TypeError):
        open_fields.scan_layers = "yes"
    for value in (None, True, False):
        assert freeze(change(pixels, model={"scan_layers": value})).model.scan_layers is value


def test_integers_pass_as_floats_and_lists_as_tuples(pixels):
    config = freeze(
        change(pixels, optim={"learning_rate": 1}, model={"image_grid": [4, 6]}, log={"preview_prompts": ["a"]})
    )
    assert isinstance(config.optim.learning_rate, float)
    assert (config.model.image_grid, config.log.preview_prompts) == ((4, 6), ("a",))


def test_datasets_of_a_mixture(pixels):
    def datasets(path):
        return freeze(change(pixels, data={"path": path})).data.datasets

    assert datasets("a/b=c") == (("a/b=c", 1),)
    assert datasets("gs://a/b=0.7, /c=d=1/3") == (("gs://a/b", Fraction(7, 10)), ("/c=d", Fraction(1, 3)))


@pytest.mark.parametrize(
    "path", ["a,b", "a=1,b", "a=1,b=0", "a=1,b=-1", "a=1,=2", "a=1,b=x", "a=1,b=1/0", "a=1,b=1e400000000", "a=1,"]
)
def test_a_mixture_without_weights_is_refused(pixels, path):
    with pytest.raises(UserError, match=re.escape(f"data.path={path!r}: expected PATH, or PATH=WEIGHT,PATH=WEIGHT")):
        freeze(change(pixels, data={"path": path}))


def test_datasets_may_move_and_their_shares_may_not_change(pixels):
    def config(path):
        return freeze(change(dict(pixels), data={"path": path}))

    assert not differences(config("a=1,b=3"), config("c=2,d=6"))
    (line,) = differences(config("a=1,b=3"), config("a=1,b=4"))
    assert line == "data.path: 'a=1,b=3' -> 'a=1,b=4'"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("model.widht", 1, "unknown config field model.widht (did you mean model.width?)"),
        ("stesp", 1, "unknown config field stesp (did you mean steps?)"),
        ("model", 3, "model: 3 is not a group of fields"),
        ("model.width", "wide", "model.width='wide': expected int, got str"),
        ("model.width", 768.0, "model.width=768.0: expected int, got float"),
        ("model.width", True, "model.width=True: expected int, got bool"),
        ("optim.learning_rate", True, "optim.learning_rate=True: expected float, got bool"),
        ("model.scan_layers", "auto", "model.scan_layers='auto': expected bool, got str"),
        ("model.image_grid", 16, "model.image_grid=16: expected 2 values of type int"),
        ("model.image_grid", (16, 16, 16), "model.image_grid=(16, 16, 16): expected 2 values of type int"),
        ("model.image_grid", (16, 1.5), "model.image_grid=1.5: expected int, got float"),
        ("log.preview_prompts", "a circle", "log.preview_prompts='a circle': expected a list of type str"),
        ("model.kv_gate", "both", "model.kv_gate='both': expected one of none, head, shared, key, value, decoupled, "),
        ("optim.learning_rate", math.nan, "optim.learning_rate=nan: must be finite"),
        ("optim.learning_rate", math.inf, "optim.learning_rate=inf: must be finite"),
        ("optim.learning_rate", 1e39, "optim.learning_rate=1e+39: out of the range of float32"),
        ("optim.eps", 1e-50, "optim.eps=1e-50: out of the range of float32"),
        ("optim.b2", 0.99999999, "optim.b2=0.99999999: must be in [0, 1), also when rounded to float32"),
        ("optim.learning_rate", 0.0, "optim.learning_rate=0.0: must be positive"),
        ("optim.learning_rate", -1e-3, "optim.learning_rate=-0.001: must not be negative"),
        ("batch_size", 0, "batch_size=0: must be positive"),
        ("batch_size", -8, "batch_size=-8: must not be negative"),
        ("steps", 0, "steps=0: must be positive"),
        ("model.image_grid", (0, 16), "model.image_grid=(0, 16): must be positive"),
        ("model.heads", 7, "model.width=768 is not divisible by model.heads=7"),
        ("model.width", 774, "model.width=774 is not divisible by model.heads=12"),
        ("model.image_depth", 1, "model.image_depth=1: must be at least 2, a block for each half"),
        ("model.conv_kernel", 4, "model.conv_kernel=4: must be odd"),
        ("model.image_grid", (1, 1), "model.image_grid=(1, 1): needs more than one token"),
        ("loss.condition_dropout", 1.0, "loss.condition_dropout=1.0: must be in [0, 1)"),
        ("loss.mask_ratio_min", 1.0, "loss.mask_ratio_min=1.0: must be in [0, 1)"),
        ("loss.mask_ratio_mean", 2.1, "loss.mask_ratio_mean=2.1: must be within 4 * loss.mask_ratio_std=0.25 of the"),
        ("loss.mask_ratio_mean", -0.4, "loss.mask_ratio_mean=-0.4: must be within 4 * loss.mask_ratio_std=0.25 of"),
        ("ema.decay", 1.0, "ema.decay=1.0: must be in [0, 1)"),
        ("ema.every", 2**31, "ema.every=2147483648: must be below 2**31"),
        ("optim.b2", 1.5, "optim.b2=1.5: must be in [0, 1)"),
        ("data.read_timeout", 1e10, "data.read_timeout=10000000000.0: must be at most 1e+09 s"),
        ("init_from.rules", "larger", "init_from.rules='larger': expected one of all, nova, resolution, interpolate"),
        ("init_from.checkpoint", -2, "init_from.checkpoint=-2: must be a step, or -1 for the latest"),
        ("eval.images", 1, "eval.images=1: must be at least 2, or 0 for none"),
        ("optim.accumulate", 3, "batch_size=2048 is not divisible by optim.accumulate=3"),
    ],
)
def test_mistakes_name_field_and_value(pixels, name, value, message):
    group, _, field = name.rpartition(".")
    with pytest.raises(UserError) as error:
        freeze(change(pixels, **{group: {field: value}} if group else {field: value}))
    assert str(error.value).startswith(message)


PLAIN = {"depthwise_conv": False, "kv_gate": "none"}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"attention": "softmax", "kv_gate": "none"}, "model.attention=softmax takes neither"),
        ({"attention": "softmax", "depthwise_conv": False}, "model.attention=softmax takes neither"),
        ({"rotary": True, "normalization": "subtraction"}, "model.rotary=True with model.normalization=subtraction"),
        (
            {"rotary": True, "width": 48, "heads": 1},
            "model.rotary=True: head width 48 (= width / heads) must be a multiple",
        ),
        ({"condition": "text", "text_length": 513}, "model.text_length=513: the padding table has only 512 rows"),
        (
            {"condition": "text", "text_encoder": "bytes", "text_words": 513},
            "model.text_words=513: the padding table has only 512 rows",
        ),
        ({"latent_channels": 4}, "model.latent_channels=4, autoencoder.stride=1: pixels"),
        (
            {"attention": "hybrid", "condition_depth": 2, "image_depth": 4},
            "model.attention=hybrid with model.softmax_period=8: no stack has that many blocks (at most 4)",
        ),
    ],
)
def test_combinations_that_do_not_exist_are_refused(pixels, model, message):
    with pytest.raises(UserError) as error:
        freeze(change(pixels, model=model))
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    "model",
    [
        {"attention": "softmax", **PLAIN},
        {"attention": "softmax", "rotary": True, "normalization": "subtraction", **PLAIN},
        {"attention": "hybrid"},
        {"rotary": True, "width": 96, "heads": 3},
        {"image_grid": (2, 6)},
        {"condition": "text", "text_encoder": "bytes", "text_length": 600},
    ],
)
def test_combinations_that_exist_are_accepted(pixels, model):
    freeze(change(pixels, model=model))


def test_a_cosine_schedule_must_outlast_its_warmup(pixels):
    with pytest.raises(
        UserError, match=re.escape("steps=100: a cosine schedule must be longer than optim.warmup_steps=100")
    ):
        freeze(change(pixels, steps=100, optim={"schedule": "cosine", "warmup_steps": 100}))


def test_only_one_mesh_axis_is_inferred(pixels):
    with pytest.raises(UserError, match=r"mesh.data and mesh.fsdp are -1: only one axis can be inferred"):
        freeze(change(pixels, mesh={"data": -1, "fsdp": -1}))


def test_differences_lists_what_changes_the_function_the_optimizer_or_the_data_order(pixels):
    old = freeze(pixels)
    for name, value in (
        ("seed", 4), ("batch_size", 8), ("model.width", 96), ("model.dtype", "float32"), ("loss.repeat", 1),
        ("optim.learning_rate", 1.0), ("ema.decay", 0.5), ("data.train_split", "other"),
    ):  # fmt: skip
        group, _, field = name.rpartition(".")
        was = flatten(old)[name]
        new = freeze(change(dict(pixels), **{group: {field: value}} if group else {field: value}))
        assert differences(old, new) == [f"{name}: {was!r} -> {value!r}"]


def test_differences_leaves_out_what_a_resumed_run_may_change(pixels):
    old = freeze(pixels)
    new = change(
        pixels, steps=7, mesh={"fsdp": 2}, checkpoint={"every": 7}, eval={"every": 7}, log={"every": 7},
        sample={"steps": 7}, data={"path": "elsewhere", "threads": 7}, model={"remat": "full", "scan_layers": False},
        optim={"max_skipped": 7, "accumulate": 2}, init_from={"path": "moved"},
    )  # fmt: skip
    assert differences(old, freeze(new)) == []


def test_the_number_of_steps_belongs_to_a_cosine_schedule(pixels):
    old = freeze(change(pixels, steps=100_000, optim={"schedule": "cosine"}))
    assert differences(old, dataclasses.replace(old, steps=200_000)) == ["steps: 100000 -> 200000"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--config.=1"], "unknown config field (known fields: seed, "),
        (["--config.modle.width=1"], "unknown config field modle.width (did you mean model?)"),
        (["--config.model.width=wide"], "--config.model.width=wide: expected a whole number"),
        (["--config.model.width=32", "--config.model.scan_layers=some"], "expected true or false"),
        (["--config.data.path=no/such/place"], "no/such/place"),
    ],
    ids=["no field", "unknown field", "bad type", "bad type of an open field", "missing data"],
)
def test_the_command_line_says_what_is_wrong_in_one_line(run_module, tmp_path, overrides, message):
    workdir = tmp_path / "run"
    result = run_module("train", "--config=configs/shapes_t2i.py", f"--workdir={workdir}", *overrides)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error:")
    assert message in line
    assert not workdir.exists()


def test_an_override_without_a_config_file_says_what_is_missing(run_module, tmp_path):
    result = run_module("train", f"--workdir={tmp_path / 'run'}", "--config.steps=5")
    assert result.returncode == 2
    assert result.stderr == "error: --config.steps needs --config=configs/NAME.py[:preset]\n"
