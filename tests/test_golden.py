"""Every fixture in $LINA_GOLDEN_DIR (default: tests/golden): values, gradients, trajectories, whole sampling runs.

What is computed is chosen by the case's name and its manifest; every recorded array is checked.
"""

import golden_encoders
import golden_models
import golden_parts
import pytest
from golden_case import GOLDEN, Case

CASES = sorted(path.stem for path in GOLDEN.glob("*.json"))

# The first prefix that fits; longer names stand before their prefixes.
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
    "transformer_": golden_models.transformer,
    "sample_": golden_models.sample,
    "train_steps": golden_models.train_steps,
    "vae_": golden_encoders.autoencoder,
    "phi": golden_encoders.phi,
}


def test_there_are_fixtures():
    assert CASES, f"no fixtures in {GOLDEN}"


@pytest.mark.parametrize("name", CASES)
def test_golden(name):
    runner = next((run for prefix, run in RUNNERS.items() if name.startswith(prefix)), None)
    assert runner, f"unknown kind of fixture: {name}"
    case = Case(name)
    runner(case)
    assert not case.left, f"recorded but not checked: {sorted(case.left)}"
