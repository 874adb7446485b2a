"""One self-contained HTML page that shows how good a model is, for example to send to a colleague."""

import base64
import html
import io
import math
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

import lina_jax
from lina_jax import drawing, generate, output_files, pictures, plots, previews, reading
from lina_jax.config import Config, SampleConfig
from lina_jax.config_fields import flatten
from lina_jax.errors import UserError
from lina_jax.image_sources import place_rows
from lina_jax.quality import METRICS
from lina_jax.state import Blueprint, Tree
from lina_jax.workdir import load_config

_STRIPS, _MOMENTS = 4, 8  # images shown as they are decoded, and views of each (at most)
_CONDITIONS, _EACH = 8, 4  # conditions that every report draws (at most), and images of each
_DEVIATIONS = 1.96  # standard deviations of a normal that enclose 95 % of it

_MEANING = {
    "fid": "FID: Fréchet distance of pooled Inception features; lower is better",
    "sfid": "sFID: Fréchet distance of spatial Inception features; lower is better",
    "inception_score": "Inception score; higher is better",
    "precision": "Precision: share of pictures within the manifold of the reference",
    "recall": "Recall: share of the reference within the manifold of the pictures",
}

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; }
h2 { font-size: 1.15rem; margin-top: 2.2rem; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; } td, th { padding: .2rem .9rem .2rem 0; text-align: left; vertical-align: top; }
td.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
img { max-width: 100%; } .quiet { color: #666; }
details { margin: .5rem 0; } pre { background: #f4f4f2; padding: .6rem; white-space: pre-wrap; word-break: break-word; }
"""


class Rows(NamedTuple):
    """Images (N, M, H, W, 3) uint8 in N rows, and a name for each row."""

    title: str
    about: str
    images: np.ndarray
    names: Sequence[str]


def write(
    directory: Path,
    workdir: Path | None,
    result: Mapping[str, Any],
    shown: Sequence[tuple[str, np.ndarray, Sequence[str]]],
    rows: Sequence[Rows],
) -> None:
    """Write DIRECTORY/index.html with the `result` of `lina_jax.evaluate`.

    `shown` has (title, images (N, H, W, 3) uint8, captions or class names) of each set of images. `rows` come from
    `draw_samples` and `decode_strips`.
    """
    name = workdir.resolve().name if workdir else "Pictures from a file"
    step = f"step {result['step']}, {_WEIGHTS[result['weights']]}" if "step" in result else ""
    parts = [f"<h1>{html.escape(name)}</h1>", f'<p class="quiet">{step}</p>']
    parts += _quality(result.get("quality"))
    parts += _scenes(result)
    parts += _validation(result.get("validation"))
    if workdir and (workdir / "metrics.jsonl").exists():
        curve = io.BytesIO()
        plots.losses(workdir / "metrics.jsonl", curve)
        parts += ["<h2>Loss</h2>", _embedded(curve.getvalue(), "training and validation loss against the step")]
        curve = io.BytesIO()
        if plots.quality(workdir / "metrics.jsonl", curve):
            note = "Of pictures drawn by the EMA during training. Bands: one standard error, from these pictures alone."
            parts += [f"<h2>Quality</h2><p>{note}</p>", _embedded(curve.getvalue(), "quality against the step")]
    for title, images, captions in shown:
        grid = pictures.grid(images, captions if any(captions) else None)
        parts += [f"<h2>{html.escape(title)}</h2>", _picture(grid, title)]
    for each in rows:
        parts += _rows(each)
    parts += _absent(result)
    parts += _origin(workdir, result)
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(name)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>\n'
        + "\n".join(parts)
        + "\n</body></html>\n"
    )
    with output_files.new_file(directory / "index.html") as partial:
        partial.write_text(page, encoding="utf-8")


_WEIGHTS = {"ema": "EMA of the parameters", "raw": "raw parameters"}


def conditions_of(config: Config, count: int) -> tuple[list, list[str]]:
    """(`count` classes or preview prompts, starting over after the last; a name for each).

    Class names come from the dataset if it is at hand and has them.
    """
    model = config.model
    if model.condition == "text":
        given = previews.preview_prompts(config)
        texts = [given[i % len(given)] for i in range(count)]
        return texts, texts
    try:
        names = reading.label_names(config.data.datasets[0][0])
    except (UserError, OSError, RuntimeError):  # whatever the reason, a report can do without names
        names = ()
    labels = [i % model.num_classes for i in range(count)]
    return labels, [f"{label}: {names[label]}" if label < len(names) else f"class {label}" for label in labels]


def draw_samples(blueprint: Blueprint, settings: SampleConfig, params: Tree, frozen: Tree, seed: int) -> Rows:
    """Four images of each of the first conditions, the same as from `lina_jax.sample --num=4` with this seed."""
    config = blueprint.config
    distinct = config.model.num_classes if config.model.condition == "class" else len(config.log.preview_prompts)
    conditions, names = conditions_of(config, min(_CONDITIONS, max(1, distinct)))
    sampler = drawing.Sampler(blueprint, settings, drawing.batch_for(blueprint, len(conditions) * _EACH))
    images = sampler(params, frozen, [condition for condition in conditions for _ in range(_EACH)], seed)
    about = "The first classes or preview prompts. Each picture has its own noise and order; none was hand-picked."
    return Rows("Samples", about, images.reshape(-1, _EACH, *images.shape[1:]), names)


def decode_strips(blueprint: Blueprint, settings: SampleConfig, params: Tree, frozen: Tree, seed: int) -> Rows:
    """Images of the first conditions as they are decoded."""
    config = blueprint.config
    count = drawing.batch_for(blueprint, _STRIPS)
    conditions, names = conditions_of(config, count)

    def rows(numbers: np.ndarray) -> Mapping[str, np.ndarray]:
        chosen = [conditions[number] for number in numbers]
        return {**drawing.encode_conditions(config, chosen, blueprint.encoders.text), "number": numbers}

    placed_rows = place_rows(blueprint.mesh, np.arange(count, dtype=np.int32), rows)
    numbers = placed_rows.pop("number")
    program = generate.make_progress_strips(blueprint, settings, _MOMENTS)
    made = program(params, frozen, placed_rows, numbers, np.int32(seed))
    strips = multihost_utils.process_allgather(made, tiled=True)[:, :_STRIPS].swapaxes(0, 1)
    about = (
        f"Sets of tokens in random order, at {strips.shape[1]} moments from the first set (left) to the last. Tokens "
        "that are not generated yet are shown as zero."
    )
    return Rows("Step by step", about, strips, names[:_STRIPS])


def _quality(quality: Mapping[str, Any] | None) -> list[str]:
    if not quality:
        return []
    rows = [
        (meaning, _with_error(quality[name]["value"], quality[name]["standard_error"]))
        for name, meaning in _MEANING.items()
        if name in quality
    ]
    if not rows:
        return []
    compared = quality.get("reference") or {}
    facts = ", ".join(f"{name} {value}" for name, value in compared.items()) or "none"
    notes = [f"{quality['images']} pictures. Reference: {facts}. ±: one standard error, from these pictures alone."]
    if quality["images"] < 2048:
        notes.append(
            "Fewer pictures than features (2048): the distances are biased upwards. Compare them only with distances "
            "of as many pictures."
        )
    return ["<h2>Against real pictures</h2>", _table(rows), *(f'<p class="quiet">{html.escape(n)}</p>' for n in notes)]


def _scenes(result: Mapping[str, Any]) -> list[str]:
    if "overall" not in result:
        return []
    rows, variance = [], 0.0
    for category, count in result["examples"].items():
        share = result[category]
        low, high = _interval(share, count)
        variance += ((high - low) / (2 * _DEVIATIONS)) ** 2
        rows.append((category.replace("_", " "), f"{share:.2f} of {count} ({low:.2f} to {high:.2f})"))
    error = math.sqrt(variance) / len(rows)
    rows.append(("overall, the mean of the categories", _with_error(result["overall"], error)))
    return [
        "<h2>Scene score</h2>",
        "<p>Share of pictures in which a rule finds everything that the caption states, by GenEval category. In "
        "parentheses: the 95 % confidence interval.</p>",
        _table(rows),
    ]


def _validation(losses: Mapping[str, float] | None) -> list[str]:
    if not losses:
        return []
    errors = {name.replace("_standard_error", ""): value for name, value in losses.items() if "_standard_error" in name}
    rows = [
        (name.replace("_", " "), _with_error(value, errors[name]) if name in errors else f"{value:.4f}")
        for name, value in losses.items()
        if "_standard_error" not in name
    ]
    note = (
        "±: one standard error over the examples. All checkpoints are measured on the same examples, so the "
        "difference between two of them is known more precisely."
    )
    return ["<h2>Validation loss</h2>", _table(rows), f'<p class="quiet">{note}</p>']


def _rows(rows: Rows) -> list[str]:
    count, columns = rows.images.shape[:2]
    captions = [name if i == 0 else "" for name in rows.names for i in range(columns)]
    grid = pictures.grid(rows.images.reshape(count * columns, *rows.images.shape[2:]), captions, columns=columns)
    return [f"<h2>{html.escape(rows.title)}</h2>", f"<p>{html.escape(rows.about)}</p>", _picture(grid, rows.title)]


def _absent(result: Mapping[str, Any]) -> list[str]:
    """What was not measured, and why."""
    quality, missing = result.get("quality") or {}, []
    reasons = quality.get("not_measured", {})
    for name in METRICS:
        if name not in quality:
            missing.append((_MEANING[name].partition(":")[0].partition(";")[0], reasons.get(name, "not requested")))
    if "validation" not in result:
        missing.append(("Validation loss", "not requested"))
    if "overall" not in result:
        missing.append(("Scene score", "not requested (only for models of the shapes data)"))
    if "geneval" in result:
        missing.append(("GenEval", f"pictures are in {result['geneval']['folder']}; its judge is a separate program"))
    else:
        missing.append(("GenEval", "no pictures were requested"))
    return ["<h2>Not measured</h2>", _table(missing)]


def _origin(workdir: Path | None, result: Mapping[str, Any]) -> list[str]:
    versions = f"lina_jax {lina_jax.__version__}, jax {jax.__version__}, Python {platform.python_version()}"
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    parts = [
        "<h2>How this page was made</h2>",
        f"<p>{html.escape(versions)}, on {html.escape(devices)}.</p>",
        f"<pre>{html.escape(shlex.join(['python', '-m', 'lina_jax.evaluate', *sys.argv[1:]]))}</pre>",
    ]
    if "sample" in result:
        rows = [(name, str(value)) for name, value in result["sample"].items()]
        parts += ["<details><summary>Sampling settings</summary>", _table(rows), "</details>"]
    if workdir:
        rows = [(name, str(value)) for name, value in flatten(load_config(workdir)).items()]
        parts += ["<details><summary>Config of the run</summary>", _table(rows), "</details>"]
    return parts


def _interval(share: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share, which is informative even with no hits, or only hits."""
    square = _DEVIATIONS**2 / count
    middle = (share + square / 2) / (1 + square)
    half = math.sqrt(share * (1 - share) * square + square**2 / 4) / (1 + square)
    return middle - half, middle + half


def _with_error(value: float, error: float | None) -> str:
    """The value and its standard error, to two digits of the error."""
    if not error or not math.isfinite(error):
        return f"{value:.3f}"
    digits = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def _table(rows: Sequence[tuple[str, str]]) -> str:
    cells = (f'<tr><td>{html.escape(a)}</td><td class="n">{html.escape(b)}</td></tr>' for a, b in rows)
    return f"<table>{''.join(cells)}</table>"


def _picture(image: np.ndarray, text: str) -> str:
    return _embedded(pictures.png(image), text)


def _embedded(png: bytes, text: str) -> str:
    return f'<img alt="{html.escape(text)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
