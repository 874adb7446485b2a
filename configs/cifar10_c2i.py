"""Class to image on CIFAR-10, in pixels: the published recipe at a size that a CPU can train.

Presets:  tiny   width 128, 2 + 2 + 2 blocks, batch 32, float32; about one step per second on two CPU cores
          w384   width 384, 4 + 4 + 4 blocks, batch 256, bfloat16; for one accelerator
32 x 32 pixels in patches of 2 x 2 are 256 tokens, as many as ImageNet 256 has in latent space. As published: learning
rate schedule (constant after warm-up), AdamW (0.9, 0.95), weight decay 0.02 and its parameter groups, frozen parts,
mask draw, loss repeat 4, label dropout 0.1, initialisation. Training cost by `lina_jax.flops`: 3 and 37 GFLOP per
image.

Expected: training loss of `tiny` 0.80, 0.40, 0.33, 0.31, 0.30, 0.27 (means of 100 steps each, the first 600 steps, with
--config.seed=0); `w384` has not been measured yet.

Data:     hf download uoft-cs/cifar10 --repo-type dataset --local-dir CIFAR
          python -m lina_jax.prepare --source=parquet --input='CIFAR/plain_text/train-*.parquet' --image_column=img \
              --caption_column= --out=data/cifar10 --validation=1000
Command:  python -m lina_jax.train --config=configs/cifar10_c2i.py:tiny --workdir=runs/cifar10
"""

from lina_jax.config import default


def get_config(preset="tiny"):
    config = default()
    config.autoencoder.update(kind="identity", stride=1, scaling_factor=1.0)
    config.model.update(condition="class", num_classes=10, latent_channels=3, patch_size=2)
    config.model.update(image_grid=(16, 16), condition_grid=(8, 8))
    config.data.path = "data/cifar10"
    config.data.threads = 2
    config.sample.update(steps=32, guidance=2.5)
    config.eval.examples = 1_000
    config.log.preview_images = 10
    if preset == "tiny":
        config.steps = 20_000
        config.batch_size = 32
        config.model.update(width=128, heads=2, condition_depth=2, image_depth=4, head_width=128, head_depth=3)
        config.model.update(dtype="float32", scan_layers=False)
        config.loss.mask_ratio_per = "step"
        config.optim.update(learning_rate=5e-4, warmup_steps=100)
        config.eval.every = config.checkpoint.every = config.log.preview_every = 1_000
    elif preset == "w384":
        config.steps = 200_000
        config.batch_size = 256
        config.model.update(width=384, heads=6, condition_depth=4, image_depth=8, head_width=384, head_depth=3)
        config.optim.update(learning_rate=5e-4, warmup_steps=1_000)
    else:
        raise ValueError(f"unknown preset {preset!r}: expected one of tiny, w384")
    return config
