r"""Class to image on ImageNet 256 x 256: the paper's main class-conditional models (arXiv 2601.22630).

Presets:  w768   363 M parameters, batch 2048   (published: 32 GPUs x 64)
          w1024  645 M parameters, batch 1536   (32 x 48)
          w1536  1.45 B parameters, batch 768   (32 x 24)
Latents of the MAR autoencoder (stride 16, 16 channels) are 16 x 16 tokens. The published runs were configured for 2.5 M
steps; published results are from 1.2 M to 1.4 M steps. Training cost by `lina_jax.flops`: 0.45, 0.80, 1.80 TFLOP per
image; 0.92, 1.23, 1.38 PFLOP per step.

Expected (published logs): w768 training loss 2.03 at step 0, about 1.35 at 1k, 0.81 at 10k, 0.70 at 50k; FID of w768
with division and convolution 9.1 at 200k steps, without guidance, with 64 decoding steps; of w1536 in the paper 2.18.
Data:     python -m lina_jax.prepare --source=folder --input=IMAGENET/train --resolution=256 --validation=10000 \
              --autoencoder=VAE --out=data/imagenet256
Command:  python -m lina_jax.train --config=configs/imagenet256_c2i.py:w768 --workdir=runs/w768
"""

from lina_jax.config import default

BATCH = {"w768": 2048, "w1024": 1536, "w1536": 768}
HEADS = {"w768": 12, "w1024": 16, "w1536": 16}


def get_config(preset="w768"):
    if preset not in BATCH:
        raise ValueError(f"unknown preset {preset!r}: expected one of {', '.join(BATCH)}")
    width = int(preset.removeprefix("w"))
    config = default()
    config.batch_size = BATCH[preset]
    config.model.update(width=width, heads=HEADS[preset], head_width=width)
    config.mesh.fsdp = 1 if preset == "w768" else 0
    config.data.path = "data/imagenet256"
    config.data.threads = 16
    config.sample.update(steps=64, euler_steps=25, guidance=2.5, guidance_min=1.0, guidance_schedule="linear")
    config.checkpoint.update(every=5_000, keep_last=3, keep_every=100_000)
    config.eval.examples = 10_000
    return config
