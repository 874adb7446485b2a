"""Every fixture in $LINA_GOLDEN_DIR (default: tests/golden): values, gradients, trajectories, whole sampling runs.

The case's name and manifest choose what is computed; every recorded array is checked. Whole models are imported as by
users, from a published directory with `convert`, and exported again to the same bytes.
"""

import golden_encoders
import golden_models
import golden_parts
import pytest
from golden_case import GOLDEN, Case
from pipelines import WEIGHTS, given_config, write_pipeline
from safetensors.numpy import load_file

from lina_jax import convert
from lina_jax.models import tiles

pytestmark = pytest.mark.usefixtures("traced_once")

CASES = sorted(path.stem for path in GOLDEN.glob("*.json"))

# The first matching prefix counts, so longer names come before their prefixes.
RUNNERS = {
    "attn_": golden_parts.attention,
    "block_": golden_parts.block,
    "diffusion_block": golden_parts.diffusion_block,
    "diffusion_mlp": golden_parts.diffusion_mlp,
    "embed_time_cond": golden_parts.embed_time_cond,
    "embed_label": golden_parts.embed_label,
    "embed_text": golden_parts.embed_text,
    "embed_patch": golden_parts.embed_patch,
    "embed_pos": golden_parts.embed_pos,
    "embed_video_pos": golden_parts.embed_video_pos,
    "rope": golden_parts.rope,
    "num_preds": golden_parts.num_preds,
    "scheduler": golden_parts.scheduler,
    "vae_": golden_encoders.autoencoder,
    "phi": golden_encoders.phi,
}


WHOLE_MODELS = {
    "transformer_": golden_models.transformer,
    "sample_": golden_models.sample,
    "train_steps": golden_models.train_steps,
}


def runner_of(name, runners):
    return next((run for prefix, run in runners.items() if name.startswith(prefix)), None)


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """The workdir that `convert` writes for a fixture, once per fixture."""
    made = {}

    def convert_once(case: Case):
        if case.name not in made:
            place = tmp_path_factory.mktemp(case.name)
            convert.from_torch(write_pipeline(case, place / "in"), place / "run", given_config(case))
            made[case.name] = place / "run"
        return made[case.name]

    return convert_once


def test_there_are_fixtures():
    assert CASES, f"no fixtures in {GOLDEN}"


@pytest.mark.parametrize("name", CASES)
def test_golden(name, imported):
    case = Case(name)
    if whole := runner_of(name, WHOLE_MODELS):
        whole(case, golden_models.load(imported(case)))
    else:
        part = runner_of(name, RUNNERS)
        assert part, f"unknown kind of fixture: {name}"
        part(case)
    assert not case.left, f"recorded but not checked: {sorted(case.left)}"


# Other settings under which runs compute the same values, faster or in less memory.
PATHS = [
    ("transformer_c2i", {"scan_layers": False}),
    ("transformer_t2i_hires", {"scan_layers": False, "remat": "full"}),
    ("transformer_t2i", {"remat": "dots"}),
    ("transformer_variant_linear6", {"attention_kernel": "pallas", "remat": "dots"}),
    ("sample_c2i_cfg", {"scan_layers": False, "attention_kernel": "pallas"}),
]


@pytest.mark.parametrize(("name", "changes"), [path for path in PATHS if path[0] in CASES], ids=str)
def test_golden_in_other_paths(name, changes, imported):
    case = Case(name)
    with tiles.interpreted("tpu" if "attention_kernel" in changes else ""):
        runner_of(name, WHOLE_MODELS)(case, golden_models.load(imported(case), **changes))


@pytest.mark.parametrize("name", [name for name in CASES if runner_of(name, WHOLE_MODELS)])
def test_exported_again_every_tensor_has_the_same_bytes(name, imported, tmp_path):
    case = Case(name)
    convert.to_torch(imported(case), tmp_path / "out")
    out = load_file(tmp_path / "out" / WEIGHTS)
    assert out.keys() == case.weights.keys()
    for key, array in out.items():
        assert (array.dtype, array.tobytes()) == (case.weights[key].dtype, case.weights[key].tobytes()), key
