"""Studies: compare variants of the model by many runs with the same budget.

`launch/study.sh` trains and evaluates the runs. `python -m lina_jax.evaluate --study=DIR` then reads them and writes
DIR/runs.csv (one row per run), DIR/effects.csv (what each choice changes, from pairs of runs that differ in it alone),
DIR/loss.png (loss against parameters and FLOPs) and DIR/laws.csv (power laws of variants with three sizes or more).

python -m lina_jax.study --config=FILE.py --variants=VARIANT,... [--flag=FLAG ...]

checks whether runs of these presets, with these training flags, can be compared; study.sh calls it before it trains
anything. If they cannot, it prints the reason in one line and exits with code 2.
"""

import csv
import dataclasses
import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from flax import nnx
from ml_collections import config_flags

from lina_jax import config as config_lib
from lina_jax import config_fields, config_file, entry, output_files, plots
from lina_jax.config import Config, ModelConfig
from lina_jax.errors import UserError
from lina_jax.flops import training_flops
from lina_jax.metrics import read_jsonl
from lina_jax.models.lina import LINA
from lina_jax.workdir import load_config

CHOICES = ("attention", "normalization", "convolution", "gate", "width", "seed")
MEASURES = ("loss", "scene_score", "fid")
# Fields that are a study's choices, and fields that follow from one: equal in all runs with the same choice.
_CHOSEN = {"seed", "model.attention", "model.normalization", "model.depthwise_conv", "model.kv_gate", "model.width"}
_FOLLOWING = {
    "model.heads": "model.width",
    "model.head_width": "model.width",
    "batch_size": "model.width",  # the budget of images is checked separately
    "model.softmax_period": "model.attention",
}
# A run may resume with other values of these, but then its loss is measured on other examples.
_JUDGES = {"data.path", "data.validation_split", "eval.examples"}
_BASE = {"attention": "linear", "normalization": "division", "convolution": "none", "gate": "none"}
MARKERS = "os^D"
_SCORE = Path("evaluation/score.json")  # in a workdir


@dataclasses.dataclass(frozen=True)
class Run:
    """One trained model. A measure that was not taken is NaN."""

    name: str
    attention: str
    normalization: str
    convolution: str
    gate: str
    width: int
    seed: int
    steps: int
    images: int  # seen in training
    parameters: int
    training_flops: float
    images_per_s: float  # median over the log
    loss: float  # on validation examples, of the EMA
    scene_score: float
    fid: float


class Effect(NamedTuple):
    """What changes from one choice to another, all else equal: mean over pairs of runs, and its standard error."""

    choice: str
    before: str
    after: str
    measure: str
    difference: float
    standard_error: float | None  # None for a single pair
    pairs: int


class PowerLaw(NamedTuple):
    """loss = scale * x ** -exponent."""

    scale: float
    exponent: float
    standard_error: float  # of the exponent


def read(directory: Path) -> list[Run]:
    """All evaluated runs in a directory.

    Raises UserError if there are none, if they differ in their budgets or anything else but the study's choices, or if
    two made the same choices.
    """
    workdirs = _workdirs(directory)
    if not workdirs:
        raise UserError(f"--study={directory}: contains no runs (directories with a config.json)")
    runs = [_run(workdir) for workdir in workdirs if (workdir / _SCORE).exists()]
    if not runs:
        raise UserError(f"--study={directory}: none of the {len(workdirs)} runs has been evaluated ({_SCORE})")
    _check_budgets(f"--study={directory}", {run.name: run.images for run in runs})
    configs = {run.name: load_config(directory / run.name) for run in runs}
    _check_recipes(f"--study={directory}", configs, {name: _judged(directory / name) for name in configs})
    seen: dict[tuple, str] = {}
    for run in runs:
        same = seen.setdefault(tuple(getattr(run, name) for name in CHOICES), run.name)
        if same != run.name:
            raise UserError(
                f"--study={directory}: {same} and {run.name} are one variant with one seed; remove one of them"
            )
    return runs


def check_variants(path: str, variants: Sequence[str], given: Sequence[str]) -> None:
    """Raise UserError unless runs of these presets of a config file, with these flags, can be compared."""
    chosen = {"config", "workdir", *(f"config.{field}" for field in _CHOSEN)}
    for flag in given:
        if flag.startswith("-") and flag.lstrip("-").removeprefix("no").partition("=")[0] in chosen:
            raise UserError(f"{flag}: a study sets this for each run; choose its values with the study's own flags")
    configs = {variant: _config(f"{path}:{variant}", given) for variant in variants}
    _check_budgets(f"--config={path}", {name: config.steps * config.batch_size for name, config in configs.items()})
    _check_recipes(f"--config={path}", configs, {name: {} for name in configs})


def _config(preset: str, given: Sequence[str]) -> Config:
    """The config that lina_jax.train would read; other flags of train are ignored."""
    config_file.load(preset)  # its error messages are clearer
    values, words = flags.FlagValues(), ["train", f"--config={preset}", *given]
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=words)
    try:
        values(words, known_only=True)
    except Exception as error:  # a field does not exist, or cannot have that value
        raise UserError(f"--config={preset}: {error}") from error
    return config_lib.freeze(values.config)


def _check_budgets(where: str, images: Mapping[str, int]) -> None:
    first = {count: name for name, count in reversed(images.items())}
    if len(first) > 1:
        named = "; ".join(f"{count} images: {first[count]}" for count in sorted(first))
        raise UserError(f"{where}: runs of unequal budgets cannot be compared ({named})")


def _check_recipes(where: str, configs: Mapping[str, Config], judged: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise UserError if runs differ in anything that is not a choice of the study and does not follow from one."""
    seen: dict[tuple, tuple] = {}
    for run, config in configs.items():
        fields = config_fields.flatten(config)
        for name, value in (_recipe(config) | judged[run]).items():
            choice = fields[_FOLLOWING[name]] if name in _FOLLOWING else None
            known, other = seen.setdefault((name, choice), (value, run))
            if value != known:
                raise UserError(
                    f"{where}: runs that differ in more than the study's choices cannot be compared "
                    f"({name}: {known!r} in {other}, {value!r} in {run})"
                )


def unfinished(directory: Path) -> list[str]:
    """Runs that were started and are not evaluated yet."""
    return [workdir.name for workdir in _workdirs(directory) if not (workdir / _SCORE).exists()]


def _workdirs(directory: Path) -> list[Path]:
    return sorted(path.parent for path in directory.glob("*/config.json"))


def _run(workdir: Path) -> Run:
    config = load_config(workdir)
    try:
        score = json.loads((workdir / _SCORE).read_text())
    except ValueError as error:
        raise UserError(f"{workdir / _SCORE} is damaged: {error}") from error
    if not isinstance(score, dict) or not isinstance(score.get("step"), int):
        raise UserError(f"{workdir / _SCORE} has no step: it is not a measurement of this run")
    try:
        loss, fid = score.get("validation", {}).get("loss_ema"), score.get("quality", {}).get("fid", {}).get("value")
        loss, scene_score, fid = _number(loss), _number(score.get("overall")), _number(fid)
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{workdir / _SCORE} is damaged: {error}") from error
    rates = [row["images_per_s"] for row in read_jsonl(workdir / "metrics.jsonl") if row.get("images_per_s")]
    return Run(
        name=workdir.name,
        attention=config.model.attention,
        normalization=config.model.normalization,
        convolution="conv" if config.model.depthwise_conv else "none",
        gate=config.model.kv_gate,
        width=config.model.width,
        seed=config.seed,
        steps=score["step"],
        images=score["step"] * config.batch_size,
        parameters=_parameters(config.model),
        training_flops=training_flops(config.model, config.loss) * score["step"] * config.batch_size,
        images_per_s=float(np.median(rates)) if rates else math.nan,
        loss=loss,
        scene_score=scene_score,
        fid=fid,
    )


def _number(value: float | None) -> float:
    """A number from JSON, where null means that it was not measured, or was not finite."""
    return math.nan if value is None else float(value)


def _recipe(config: Config) -> dict[str, Any]:
    """What must be the same in all runs: how they are trained, and on which examples they are evaluated."""
    judges = _JUDGES | ({"steps"} if config.optim.schedule == "cosine" else set())  # the schedule ends there
    return {
        name: value
        for name, value in config_fields.flatten(config).items()
        if name in judges or not (name in _CHOSEN or config_lib.free_on_resume(name))
    }


def _judged(workdir: Path) -> dict[str, Any]:
    """How a run was evaluated, which must be the same in all runs, too."""
    score = json.loads((workdir / _SCORE).read_text())
    quality = score.get("quality", {})
    names = ("weights", "sample", "seed", "data", "autoencoder", "text_encoder")
    settings = {name: score[name] for name in names if name in score}
    settings |= {f"quality.{name}": quality[name] for name in ("images", "reference") if name in quality}
    return {f"evaluation: {name}": value for name, value in settings.items()}


def _parameters(model: ModelConfig) -> int:
    """Number of trained parameters."""
    params = nnx.state(nnx.eval_shape(lambda: LINA(model, rngs=nnx.Rngs(0))), nnx.Param)
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def effects(runs: Sequence[Run]) -> list[Effect]:
    """Effects of every choice but width and seed, on each measure that was taken."""
    found = []
    for choice in ("attention", "normalization", "convolution", "gate"):
        first = _BASE[choice]
        others = sorted({getattr(run, choice) for run in runs} - {first})
        for other, measure in itertools.product(others, MEASURES):
            pairs = list(_pairs(runs, choice, first, other, measure))
            if pairs:
                error = float(np.std(pairs, ddof=1) / math.sqrt(len(pairs))) if len(pairs) > 1 else None
                found.append(Effect(choice, first, other, measure, float(np.mean(pairs)), error, len(pairs)))
    return found


def _pairs(runs: Sequence[Run], choice: str, before: str, after: str, measure: str) -> Iterable[float]:
    """Differences of a measure between runs that differ in one choice alone."""

    def others(run: Run) -> tuple:
        return tuple(getattr(run, name) for name in CHOICES if name != choice)

    by_others = {others(run): getattr(run, measure) for run in runs if getattr(run, choice) == before}
    for run in runs:
        difference = getattr(run, measure) - by_others.get(others(run), math.nan)
        if getattr(run, choice) == after and math.isfinite(difference):
            yield difference


def power_law(x: Sequence[float], loss: Sequence[float]) -> PowerLaw | None:
    """Least-squares fit of the logarithms; None for fewer than three sizes, where the uncertainty is unknown."""
    if len(set(x)) < 3:
        return None
    log_x, log_y = np.log(np.asarray(x, float)), np.log(np.asarray(loss, float))
    centred = log_x - log_x.mean()
    slope = float(centred @ log_y / (centred @ centred))
    rest = log_y - log_y.mean() - slope * centred
    error = math.sqrt(float(rest @ rest) / (len(log_x) - 2) / float(centred @ centred))
    return PowerLaw(math.exp(log_y.mean() - slope * log_x.mean()), -slope, error)


def _variant(run: Run) -> str:
    linear = f"{run.normalization}, {run.convolution}, {run.gate}" if run.attention != "softmax" else ""
    return {"linear": linear, "softmax": "softmax"}.get(run.attention, f"hybrid, {linear}")


def plot(runs: Sequence[Run], picture: Path) -> dict[str, PowerLaw]:
    """Plot loss against parameters and FLOPs, one line per variant; returns {'VARIANT against X': its power law}."""
    plt, ticker = plots.matplotlib()
    variants = sorted({_variant(run) for run in runs})
    figure, both = plt.subplots(
        1, 2, figsize=(11, 4.5 + 0.17 * len(variants)), dpi=120, sharey=True, layout="constrained"
    )
    laws = {}
    for axes, (name, title) in zip(
        both, (("parameters", "parameters"), ("training_flops", "training FLOPs")), strict=True
    ):
        for number, variant in enumerate(variants):
            ours = [run for run in runs if _variant(run) == variant and math.isfinite(run.loss)]
            x, y = [getattr(run, name) for run in ours], [run.loss for run in ours]
            if not ours:
                continue
            label, law = variant, power_law(x, y)
            line = axes.plot(x, y, MARKERS[number // 10 % len(MARKERS)], markersize=4)[0]  # there are ten colours
            if law:
                laws[f"{variant} against {title}"] = law
                label += f": exponent {law.exponent:.3f} ± {law.standard_error:.3f}"
                ends = np.geomspace(min(x), max(x), 50)
                axes.plot(ends, law.scale * ends**-law.exponent, "-", linewidth=1, color=line.get_color())
            line.set_label(label)
        axes.set(xscale="log", yscale="log", xlabel=title)
        axes.grid(alpha=0.3, which="both")
        if axes.lines:  # else no run has a validation loss
            axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.12))
        for which in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            which(ticker.StrMethodFormatter("{x:.3g}"))
    both[0].set_ylabel("validation loss (EMA)")
    with output_files.new_file(picture) as partial:
        figure.savefig(partial, format="png")
    plt.close(figure)
    return laws


def gather(directory: Path) -> str:
    """Write the files of a study, and return the text to print. Raises UserError as `read` does."""
    runs = read(directory)
    _write(directory / "runs.csv", [field.name for field in dataclasses.fields(Run)], map(dataclasses.astuple, runs))
    changes = effects(runs)
    _write(directory / "effects.csv", Effect._fields, changes)
    laws = plot(runs, directory / "loss.png")
    _write(directory / "laws.csv", ["law", *PowerLaw._fields], [(name, *law) for name, law in laws.items()])
    lines = [
        f"{len(runs)} runs of {runs[0].images:,} images",
        "",
        "| variant | width | runs | validation loss | scene score | FID | parameters | training FLOPs | images/s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for key, group in itertools.groupby(sorted(runs, key=_size), key=_size):
        ours = list(group)
        measures = " | ".join(_mean_with_error([getattr(run, name) for run in ours]) for name in MEASURES)
        rates = [run.images_per_s for run in ours if math.isfinite(run.images_per_s)]
        rate = f"{np.median(rates):.1f}" if rates else "-"
        lines.append(
            f"| {key[0]} | {key[1]} | {len(ours)} | {measures} | {ours[0].parameters:,} | "
            f"{ours[0].training_flops:.3g} | {rate} |"
        )
    lines += ["", "| change | measure | difference | pairs |", "|---|---|---|---|"]
    for change in changes:
        error = f" ± {change.standard_error:.4f}" if change.standard_error is not None else ""
        named = f"{change.choice}: {change.before} to {change.after}"
        lines.append(f"| {named} | {change.measure} | {change.difference:+.4f}{error} | {change.pairs} |")
    lines += [""] + [f"{n}: exponent {law.exponent:.4f} ± {law.standard_error:.4f}" for n, law in laws.items()]
    if waiting := unfinished(directory):
        lines += [f"not finished: {', '.join(waiting)}"]
    return "\n".join(lines)


def _size(run: Run) -> tuple[str, int]:
    return _variant(run), run.width


def _mean_with_error(values: Sequence[float]) -> str:
    """Mean and, for several seeds, standard error."""
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return "-"
    error = f" ± {np.std(known, ddof=1) / math.sqrt(len(known)):.4f}" if len(known) > 1 else ""
    return f"{np.mean(known):.4f}{error}"


def _write(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    with output_files.new_file(path) as partial, partial.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


def main(argv: Sequence[str]) -> None:
    del argv
    values = flags.FLAGS
    check_variants(values.config, values.variants, values.flag)


if __name__ == "__main__":
    flags.DEFINE_string("config", None, "file whose presets are the variants", required=True)
    flags.DEFINE_list("variants", None, "presets to compare", required=True)
    flags.DEFINE_multi_string("flag", [], "a training flag that all runs share")
    entry.run(main)
