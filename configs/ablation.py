r"""The paper's study of linear attention: normalisation x convolution x gate x width, with one recipe.

Argument: NORMALISATION-CONVOLUTION-GATE-WIDTH, such as division-conv-head-768, or softmax-WIDTH, or
hybrid-NORMALISATION-CONVOLUTION-GATE-WIDTH (every 8th layer is softmax, at WIDTH up to 128 every 2nd).

NORMALISATION  division, subtraction
CONVOLUTION    conv, none
GATE           none, head, shared, key, value, decoupled, dynamic
WIDTH          32, 64, 96, 128:  `cifar10_c2i.py:tiny` at that width, with heads of 32 channels
               768, 1024, 1536:  `imagenet256_c2i.py` with batches of 768 (published: 2048, 1536, 768), so that equal
                                 numbers of steps are equal budgets at all three widths

Expected (published FID on ImageNet 256, w768, after 200k steps of 2048 images, without guidance): division 13.1,
subtraction 15.8, division + conv 9.1, subtraction + conv 9.0. As many images take 533k steps here.
Command:  python -m lina_jax.train --config=configs/ablation.py:subtraction-conv-none-128 \
              --workdir=runs/subtraction-conv
"""

import importlib.util
from pathlib import Path

SMALL = ("32", "64", "96", "128")
WIDTHS = dict.fromkeys(SMALL, ("cifar10_c2i", "tiny")) | {
    w: ("imagenet256_c2i", f"w{w}") for w in ("768", "1024", "1536")
}
LARGE_BATCH = 768
CONVOLUTION = {"conv": True, "none": False}


def get_config(argument="division-conv-head-128"):
    *variant, width = argument.split("-")
    if width not in WIDTHS:
        raise ValueError(f"unknown width {width!r} in {argument!r}: expected one of {', '.join(WIDTHS)}")
    config = _sibling(*WIDTHS[width])
    if width in SMALL:
        config.model.update(width=int(width), heads=int(width) // 32, head_width=int(width))
    else:
        config.batch_size = LARGE_BATCH
    attention = variant.pop(0) if variant and variant[0] in ("softmax", "hybrid") else "linear"
    config.model.attention = attention
    if attention == "hybrid" and width in SMALL:
        config.model.softmax_period = 2  # its stacks have only two and four layers
    if attention == "softmax":
        variant = ["division", "none", "none", *variant]
    if len(variant) != 3 or variant[1] not in CONVOLUTION:
        raise ValueError(f"{argument!r}: expected NORMALISATION-(conv|none)-GATE-WIDTH, softmax-WIDTH or hybrid-...")
    normalization, convolution, gate = variant
    config.model.update(normalization=normalization, depthwise_conv=CONVOLUTION[convolution], kv_gate=gate)
    return config


def _sibling(name, preset):
    """The config of another file here, loaded by path because configs are not a package."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(preset)
