r"""Text to image at 256, 512 and 1024 px, 1.45 B parameters: the paper's text-conditional models (arXiv 2601.22630).

Presets:  256    16 x 16 tokens, learning rate 2e-4, batch 768  (published: 48 GPUs x 16)
          512    32 x 32 tokens, learning rate 1e-4, batch 192  (48 x 4)
          1024   64 x 64 tokens, learning rate 5e-5, batch 48   (48 x 1)
Latents of the SDXL autoencoder (stride 8, 4 channels) in patches of 2; captions as the last hidden states of Phi-2, 256
tokens. Cost of training, by `lina_jax.flops`: 2.5, 7.9, 29 TFLOP an image; 1.9, 1.5, 1.4 PFLOP a step. Each size
continues from the one before (565k to 600k steps each); the KV gates start anew.

Expected (paper): GenEval 0.74 overall at 1024 px, with 128 decoding steps and guidance 7.
Data:     python -m lina_jax.prepare --source=webdataset --input='SHARDS/*.tar' --resolution=256 --validation=10000 \
              --short_caption_column=json.short --autoencoder=VAE --text_encoder=PHI --out=data/t2i
Command:  python -m lina_jax.train --config=configs/t2i.py:256 --workdir=runs/t2i256
"""

from lina_jax.config import default

GRID = {"256": 16, "512": 32, "1024": 64}
LEARNING_RATE = {"256": 2e-4, "512": 1e-4, "1024": 5e-5}
BATCH = {"256": 768, "512": 192, "1024": 48}


def get_config(preset="256"):
    if preset not in GRID:
        raise ValueError(f"unknown preset {preset!r}: {', '.join(GRID)}")
    side = GRID[preset]
    config = default()
    config.batch_size = BATCH[preset]
    config.model.update(condition="text", text_encoder="features", text_length=256, text_dim=2560)
    config.model.update(latent_channels=4, patch_size=2, image_grid=(side, side), condition_grid=(side // 2, side // 2))
    config.model.update(width=1536, heads=16, head_width=1536, remat="full" if preset == "1024" else "dots")
    config.autoencoder.update(kind="sdxl", stride=8, scaling_factor=0.13025)
    config.optim.learning_rate = LEARNING_RATE[preset]
    config.data.path = "data/t2i"
    config.data.threads = 16
    config.sample.update(steps=128, euler_steps=25, guidance=7.0, guidance_schedule="constant")
    config.checkpoint.update(every=5_000, keep_last=3, keep_every=100_000)
    return config
