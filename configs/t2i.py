r"""Text to image, 1.45 B parameters: the paper's text-conditional models (arXiv 2601.22630), and two larger sizes.

Presets:  256    16 x 16 tokens, learning rate 2e-4, batch 768  (published: 48 GPUs x 16)
          512    32 x 32 tokens, learning rate 1e-4, batch 192  (48 x 4)
          1024   64 x 64 tokens, learning rate 5e-5, batch 48   (48 x 1)
          2048   128 x 128 tokens, learning rate 5e-5, batch 16  (not published, never trained: a starting point)
          4096   256 x 256 tokens, learning rate 5e-5, batch 4   (likewise)
Latents of the SDXL autoencoder (stride 8, 4 channels) in patches of 2 x 2; captions as the last hidden states of Phi-2,
256 tokens. Training cost by `lina_jax.flops`: 2.5, 7.9, 29, 116, 461 TFLOP per image; 1.9, 1.5, 1.4, 1.9, 1.8 PFLOP per
step.

As published, each size starts from the EMA of the size before, at step 565k of 256 px and step 600k of 512 px, with new
KV gates. How long 1024 px was trained is not published. --config.init_from.rules=interpolate interpolates the gates
from the smaller grid instead. 256 px was started from NOVA (softmax attention, 1024 px), except for attention; here it
starts from random weights unless you import NOVA (last command). Where the batch is too small for the devices, the
tokens of an image are sharded over several of them (docs/sharding.md).

Expected (paper): GenEval 0.74 overall at 1024 px, with 128 decoding steps and guidance 7.
Data:     python -m lina_jax.prepare --source=webdataset --input='SHARDS/*.tar' --resolution=256 --validation=10000 \
              --short_caption_column=json.short --autoencoder=VAE --text_encoder=PHI --out=data/t2i256
          (likewise for 512 and 1024)
Command:  python -m lina_jax.train --config=configs/t2i.py:256 --workdir=runs/t2i256
          python -m lina_jax.train --config=configs/t2i.py:512 --workdir=runs/t2i512
          python -m lina_jax.train --config=configs/t2i.py:1024 --workdir=runs/t2i1024
To start from NOVA, run this first, and add --config.init_from.path=runs/nova to the command for 256:
          python -m lina_jax.convert --from_torch=NOVA --workdir=runs/nova
"""

from lina_jax.config import default

GRID = {"256": 16, "512": 32, "1024": 64, "2048": 128, "4096": 256}
LEARNING_RATE = {"256": 2e-4, "512": 1e-4, "1024": 5e-5, "2048": 5e-5, "4096": 5e-5}
BATCH = {"256": 768, "512": 192, "1024": 48, "2048": 16, "4096": 4}
STEPS = {"256": 565_000, "512": 600_000, "1024": 600_000, "2048": 600_000, "4096": 600_000}
BEFORE = {"256": "", "512": "runs/t2i256", "1024": "runs/t2i512", "2048": "runs/t2i1024", "4096": "runs/t2i2048"}


def get_config(preset="256"):
    if preset not in GRID:
        raise ValueError(f"unknown preset {preset!r}: expected one of {', '.join(GRID)}")
    side = GRID[preset]
    config = default()
    config.steps = STEPS[preset]
    config.batch_size = BATCH[preset]
    config.model.update(condition="text", text_encoder="features", text_length=256, text_dim=2560)
    config.model.update(latent_channels=4, patch_size=2, image_grid=(side, side), condition_grid=(side // 2, side // 2))
    config.model.update(width=1536, heads=16, head_width=1536)
    config.autoencoder.update(kind="sdxl", stride=8, scaling_factor=0.13025)
    config.optim.learning_rate = LEARNING_RATE[preset]
    config.init_from.update(path=BEFORE[preset], rules="nova" if preset == "256" else "resolution")
    config.mesh.update(fsdp=0, sequence=0)
    config.data.path = f"data/t2i{preset}"
    config.data.threads = 16
    config.sample.update(steps=128, euler_steps=25, guidance=7.0, guidance_schedule="constant")
    config.checkpoint.update(every=5_000, keep_last=3, keep_every=100_000)
    return config
