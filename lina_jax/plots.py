"""Plots of a run's metrics, as PNG files."""

import itertools
from pathlib import Path
from types import ModuleType
from typing import BinaryIO

import numpy as np

from lina_jax.metrics import read_jsonl


def matplotlib() -> tuple[ModuleType, ModuleType]:
    """(pyplot, ticker), for drawing into files; imported only here, as the import takes half a second."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    return pyplot, ticker


def losses(metrics: Path, picture: Path | BinaryIO) -> None:
    """Plot the training loss, and validation losses if there are any, against the step, as a PNG."""
    plt, ticker = matplotlib()
    rows = read_jsonl(metrics)
    figure, axes = plt.subplots(figsize=(7, 4), dpi=120)
    for name, style in (("loss", "-"), ("validation/loss_ema", "o-"), ("validation/loss", "s--")):
        points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=name, linewidth=1, markersize=4)
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    low, high = axes.get_ylim()  # within a decade, powers of ten give at most one tick
    axes.yaxis.set_major_locator(ticker.MaxNLocator(8) if high < 10 * low else ticker.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(ticker.NullLocator())
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(picture, format="png")
    plt.close(figure)


def quality(metrics: Path, picture: Path | BinaryIO) -> bool:
    """Plot each metric `quality/*` against the step, in its own axes with its standard error, as a PNG.

    Returns False, and writes nothing, if there are none.
    """
    plt, _ = matplotlib()
    rows, suffix = read_jsonl(metrics), "_standard_error"
    measured = {name: None for row in rows for name, value in row.items() if value is not None}  # in order
    names = [name for name in measured if name.startswith("quality/") and not name.endswith(suffix)]
    if not names:
        return False
    figure, all_axes = plt.subplots(
        -(-len(names) // 2), 2, figsize=(7, 2.4 * -(-len(names) // 2)), dpi=120, squeeze=False, layout="constrained"
    )
    for axes, name in itertools.zip_longest(all_axes.flat, names):
        if name is None:
            axes.set_axis_off()
            continue
        points = [(row["step"], row[name], row.get(name + suffix) or 0) for row in rows if row.get(name) is not None]
        step, value, error = np.array(points).T
        line = axes.plot(step, value, "o-", linewidth=1, markersize=4)[0]
        axes.fill_between(step, value - error, value + error, alpha=0.2, color=line.get_color())
        axes.set(xlabel="step", title=name.removeprefix("quality/").replace("_", " "))
        axes.grid(alpha=0.3)
    figure.savefig(picture, format="png")
    plt.close(figure)
    return True
