r"""A small class-to-image model in float32, whose speed is compared with PyTorch's (tests/beside_pytorch.py).

Presets:  linear   LINA: division, depthwise convolution, head-wise gates
          softmax  the same model with softmax attention, without convolution and gates
Width 384, 6 heads, 4 condition + 4 encoder + 4 decoder blocks, a head of 3 blocks, latents of 16 x 16 x 16, loss repeat
4, AdamW, batch 16; 16 decoding steps of 25 Euler steps, guidance rising from 1 to 3. docs/performance.md has results.

Command:  python -m lina_jax.benchmark train --config=configs/bench.py
          python -m lina_jax.benchmark sample --config=configs/bench.py:softmax
"""

from lina_jax.config import default


def get_config(preset="linear"):
    if preset not in ("linear", "softmax"):
        raise ValueError(f"unknown preset {preset!r}: expected one of linear, softmax")
    config = default()
    config.batch_size = 16
    config.model.update(width=384, heads=6, condition_depth=4, image_depth=8, head_width=384, head_depth=3)
    config.model.update(dtype="float32", scan_layers=False)
    if preset == "softmax":
        config.model.update(attention="softmax", depthwise_conv=False, kv_gate="none")
    config.sample.update(steps=16, euler_steps=25, guidance=3.0, guidance_min=1.0, guidance_schedule="linear")
    return config
