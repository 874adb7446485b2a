"""Text to image on rendered scenes of 32 x 32 pixels, on a laptop: the quickstart.

Cost: six to ten minutes on two CPU cores, including environment, data and pictures.
Expected after 2800 steps: scene score (40 captions per category) 0.78 for single objects, 0.98 for colours, close to 0
for counts, pairs and relations.

Data:     python -m lina_jax.prepare --source=shapes --out=data/shapes
Command:  python -m lina_jax.train --config=configs/shapes_t2i.py --workdir=runs/shapes
Then:     python -m lina_jax.sample --workdir=runs/shapes --prompt="a large red circle" --out=runs/shapes/samples
          python -m lina_jax.evaluate --workdir=runs/shapes --scenes=240
"""

from lina_jax.config import default


def get_config():
    config = default()
    config.seed = 0
    config.steps = 2800
    config.batch_size = 24

    config.autoencoder.update(kind="identity", stride=1, scaling_factor=1.0)
    config.model.update(
        condition="text", text_encoder="bytes", text_length=66, text_words=16, text_dim=128,
        mask_text_padding=True,
        latent_channels=3, patch_size=4, image_grid=(8, 8), condition_grid=(2, 2),
        width=128, heads=2, condition_depth=2, image_depth=4, head_width=128, head_depth=2,
        dtype="float32", scan_layers=False,
    )  # fmt: skip
    config.data.path = "data/shapes"
    config.data.threads = 2
    # Captions matter mostly at high noise and with few visible tokens, so most draws go there.
    config.loss.update(repeat=1, mask_ratio_std=0.1, shift=4.0)
    config.optim.update(name="muon", learning_rate=3e-3, schedule="cosine", warmup_steps=50, clip_norm=1.0)
    config.sample.update(steps=16, euler_steps=25, guidance=3.0, guidance_schedule="constant")

    config.checkpoint.every = 400
    config.eval.update(every=0, examples=256)
    config.log.every = 20
    config.log.preview_every = 800
    config.log.preview_prompts = (
        "a large red circle in the center, on white",
        "a small blue square on the left, on black",
        "a green triangle at the bottom, on gray",
        "a large yellow cross at the top, on black",
        "a purple circle on white",
        "a cyan square",
        "three yellow crosses on black",
        "a red circle above a blue square",
    )
    config.log.preview_images = 8
    return config
