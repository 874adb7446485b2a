"""Measure a model: validation loss by noise level, FID and other image metrics, GenEval's images, the scene score.

python -m lina_jax.evaluate --workdir=DIR [--raw] [--checkpoint=STEP] [--data=DIR] [--seed=0] [--guidance=G] [--out=DIR]
    [--inception=FILE --reference=FILE_OR_DIR [--number=50000] [--metrics=fid,sfid]]   FID, sFID, Inception score,
                                precision and recall of images drawn, decoded and featurised on all devices
    [--npz=FILE]                the images in ADM's format, class-balanced, for ADM's own suite
    [--geneval=FILE]            images of GenEval's prompts, in the folders that its judge reads
    [--scenes=N]                images of N captions of the `shapes` grammar, each checked by rule
    [--report=DIR]              one HTML page with all results
python -m lina_jax.evaluate --samples_from=FOLDER_OR_NPZ --inception=FILE --reference=FILE_OR_DIR --out=DIR
python -m lina_jax.evaluate --study=DIR         tables and plots of the runs of launch/study.sh

Prints one JSON object and writes it to OUT/score.json (default: WORKDIR/evaluation). If it is killed, run the same
command again: finished features and GenEval's images are kept. docs/evaluation.md has the details. Training measures
with the same code.
"""

import contextlib
import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from lina_jax import (
    config_file,
    data,
    drawing,
    entry,
    geneval,
    hosts,
    image_sources,
    integrity,
    output_files,
    pictures,
    preemption,
    quality,
    reference,
    report,
    scene_score,
    shapes,
    study,
)
from lina_jax import mesh as mesh_lib
from lina_jax.checkpoint import Checkpoints
from lina_jax.errors import UserError
from lina_jax.featurise import Network
from lina_jax.quality import Quality
from lina_jax.state import Blueprint, Tree
from lina_jax.validation import Validation
from lina_jax.workdir import kind_of_weights, load_config

# In OUT until the end, in case the process is killed: finished features, and the results so far. score.json is written
# only when it is complete.
_WORK, _UNFINISHED = ".measuring", "score.unfinished.json"
_METRICS_OF_SINGLE_IMAGES = {"precision", "recall"}
_NEEDS = {  # flags that do nothing without one of these
    "metrics": ("inception",), "reference": ("inception",),
    "reference_split": ("reference",), "reference_number": ("reference",),
    "geneval_rewritten": ("geneval",), "geneval_images": ("geneval",),
    "number": ("inception", "npz"), "per_device": ("inception", "npz", "geneval"),
}  # fmt: skip
_MODEL_FLAGS = (  # flags that images made elsewhere have no use for
    "validation", "scenes", "geneval", "npz", "raw", "checkpoint", "data", "seed", "guidance", "steps", "euler_steps",
    "temperature", "autoencoder", "text_encoder",
)  # fmt: skip
_FLAGS_EXCLUDED_BY_STUDY = ("workdir", "samples_from", "out", "report", "inception", "mesh", *_MODEL_FLAGS, *_NEEDS)


def scene_scores(sampler, params: Tree, frozen: Tree, count: int, seed: int) -> tuple[dict, np.ndarray, list[str]]:
    """Draw and judge `count` captions of the `shapes` grammar: (scores by category, images (N, H, W, 3), captions)."""
    captions = [caption for _, caption in shapes.evaluation_prompts(count, seed)]
    images = sampler(params, frozen, captions, seed)
    return scene_score.score(images, captions), images, captions


def main(argv: Sequence[str]) -> None:
    del argv
    preemption.exit_on_sigterm()
    with hosts.distributed_run(config_file.given_flags()):
        _main(flags.FLAGS)


def _main(values: flags.FlagValues) -> None:
    if values.study:
        if wrong := [name for name in _FLAGS_EXCLUDED_BY_STUDY if values[name].present]:
            raise UserError(f"--{wrong[0]} does not apply to --study")
        if jax.process_index() == 0:
            print(study.gather(Path(values.study).expanduser()))
        return
    metrics = _check(values)
    workdir = Path(values.workdir).expanduser() if values.workdir else None
    out = Path(values.out).expanduser() if values.out else workdir / "evaluation"
    output_files.check("out", out)
    if values.report:
        output_files.check("report", Path(values.report).expanduser())
    run = _Run(values, workdir, metrics, out) if workdir else None
    measured = run if values.inception or values.npz else None
    if values.samples_from:
        measured = _Files(values, metrics, out)
    # Features of two evaluations in one OUT would mix.
    keeps = measured and jax.process_index() == 0
    with output_files.lock("out", out / _WORK) if keeps else contextlib.nullcontext():
        _measure(values, workdir, out, run, measured)


def _measure(
    values: flags.FlagValues, workdir: Path | None, out: Path, run: "_Run | None", measured: "_Run | _Files | None"
) -> None:
    """Measure what the flags ask for; process 0 writes and prints the results."""
    result = run.facts() if run else {}
    if run and values.validation:
        result["validation"] = run.validation()
        _keep(out, result)
    rows = run.rows() if run and values.report else []
    shown = []  # (title, pictures, captions)
    if run and values.scenes:
        scores, images, captions = run.scenes()
        result = {**scores, **result}
        shown.append(("Scenes", images[: pictures.SHOWN], captions[: pictures.SHOWN]))
        if jax.process_index() == 0:
            pictures.save(out / "samples.png", pictures.grid(images[: pictures.SHOWN], captions[: pictures.SHOWN]))
        _keep(out, result)
    if run and values.geneval:
        result["geneval"], *found = run.geneval()
        shown.append(("GenEval", *found))
        _keep(out, result)
    if measured:
        found = measured.quality()
        if found:
            result["quality"] = found.as_json()
            captions = run.captions(len(found.images)) if run else [""] * len(found.images)
            shown.append(("Pictures measured", found.images, captions))
    if jax.process_index() != 0:
        return
    score = _as_json(result)
    output_files.write_json(out / "score.json", score)
    (out / _UNFINISHED).unlink(missing_ok=True)
    if values.report:
        report.write(Path(values.report).expanduser(), workdir, result, shown, rows)
    if measured:
        shutil.rmtree(out / _WORK, ignore_errors=True)  # needed only to resume after a kill
    print(json.dumps(score, indent=2))


def _keep(out: Path, result: dict[str, Any]) -> None:
    """Write the results so far."""
    if jax.process_index() == 0:
        output_files.write_json(out / _UNFINISHED, _as_json(result))


def _as_json(value: Any) -> Any:
    """Replace numbers that are not finite, which JSON lacks, by None."""
    if isinstance(value, dict):
        return {name: _as_json(part) for name, part in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _check(values: flags.FlagValues) -> list[str]:
    """Check the flags and return the metrics to measure. Raises UserError for wrong flags and combinations."""
    metrics = [name.strip() for name in values.metrics.split(",")]
    quality.check_metrics(metrics)
    if not values.workdir and not values.samples_from:
        raise UserError("--workdir=DIR (a training directory) or --samples_from=FOLDER_OR_NPZ is needed")
    if values.samples_from and values.workdir:
        raise UserError(f"--samples_from={values.samples_from} --workdir={values.workdir}: give only one of them")
    if values.samples_from and not (values.inception and values.out):
        raise UserError("--samples_from needs --inception=FILE (weights of Inception v3) and --out=DIR")
    wrong = [name for name in _MODEL_FLAGS if values[name].present and values[name].value is not False]
    if values.samples_from and wrong:
        raise UserError(f"--{wrong[0]} needs a model that draws: give --workdir instead of --samples_from")
    for name, others in _NEEDS.items():
        if values[name].present and values[name].value and not any(values[other].value for other in others):
            raise UserError(f"--{name}={values[name].value} needs {' or '.join(f'--{other}=FILE' for other in others)}")
    least_values = {"scenes": 0, "number": 2, "per_device": 1, "reference_number": 0, "geneval_images": 1}
    for name, least in least_values.items():
        if values[name].value < least:
            raise UserError(f"--{name}={values[name].value}: must be at least {least}")
    for name in ("inception", "reference", "samples_from"):
        if values[name].value and not Path(values[name].value).expanduser().exists():
            raise UserError(f"--{name}={values[name].value}: no such file or directory")
    if values.reference and _METRICS_OF_SINGLE_IMAGES & set(metrics):
        reference.check_count(f"--number={values.number}", values.number, Path(values.reference).expanduser())
    if values["metrics"].present:  # by default, those are measured for which there is a reference
        path = Path(values.reference).expanduser() if values.reference else None
        for name, reason in reference.unavailable(path, metrics).items():
            raise UserError(f"--metrics={values.metrics}: {name} cannot be measured: {reason}")
    if values.npz:
        npz = Path(values.npz).expanduser()
        if npz.is_dir():
            raise UserError(f"--npz={npz}: is a directory, expected a file name")
        if npz.suffix != ".npz":
            raise UserError(f"--npz={npz}: expected a name that ends in .npz")
        if values.reference and npz.resolve() == Path(values.reference).expanduser().resolve():
            raise UserError(f"--npz={npz}: is the reference, which it would overwrite")
        output_files.check("npz", npz.parent)
    drawing.check_seed(values.seed)
    return metrics


class _Run:
    """A training directory to measure."""

    def __init__(self, values: flags.FlagValues, workdir: Path, metrics: list[str], out: Path):
        """Load and check everything, so that mistakes raise UserError before hours are spent on measuring."""
        self._values, self._workdir, self._metrics, self._out = values, workdir, metrics, out
        loaded = load_config(workdir)
        self._settings = drawing.settings_of_flags(loaded, values)
        draws = values.scenes or values.geneval or values.npz or values.inception or values.report
        loaded = drawing.with_encoders(loaded, values.autoencoder, values.text_encoder)
        missing = drawing.missing_encoder(loaded)
        if missing and draws:
            raise UserError(missing)
        if values.scenes and (loaded.model.condition != "text" or len(set(loaded.model.image_grid)) > 1):
            raise UserError("--scenes: the judge needs a model that draws square pictures from captions")
        if values.geneval and loaded.model.condition != "text":
            raise UserError(f"--geneval={values.geneval}: the model draws classes, not prompts")
        prompts = []
        if values.geneval:
            prompts = geneval.read_prompts(Path(values.geneval).expanduser(), values.geneval_rewritten, loaded)
        blueprint, self._drawing, self._frozen, self.step = drawing.load(
            workdir, loaded, ema=not values.raw, step=values.checkpoint, mesh_config=mesh_lib.parse(values.mesh)
        )
        checkpoint = workdir / "checkpoints" / str(self.step)
        self._weights = kind_of_weights(checkpoint, ema=not values.raw)
        self._origin = {  # identifies images drawn with these weights
            "step": self.step,
            "weights": self._weights,
            "workdir": str(workdir.resolve()),
            "checkpoint": integrity.fingerprint(checkpoint),
        }
        config = blueprint.config
        if values.data:
            config = dataclasses.replace(config, data=dataclasses.replace(config.data, path=values.data))
        self._blueprint = dataclasses.replace(blueprint, config=config)
        self._geneval = None
        if values.geneval:
            counts = {"seed": values.seed, "images": values.geneval_images}
            self._geneval = geneval.Drawing(
                self._blueprint, self._settings, prompts, out / "geneval", **counts, facts=self._origin
            )
        captioned = config.model.condition == "text" and (values.npz or values.inception)
        self._network = Network(Path(values.inception).expanduser(), self._blueprint.mesh) if values.inception else None
        self._reference = _opened_reference(values, self._network, metrics, out, self._blueprint)
        self._records = None
        if values.validation or captioned:
            self._records = data.open_records(config, config.data.validation_split, self._blueprint.encoders.text)

    def facts(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "weights": self._weights,
            "sample": dataclasses.asdict(self._settings),
            "seed": self._values.seed,
            "data": self._blueprint.config.data.path,
            "autoencoder": dataclasses.asdict(self._blueprint.config.autoencoder),
            "text_encoder": dataclasses.asdict(self._blueprint.config.text_encoder),
        }

    def validation(self) -> dict[str, float]:
        checkpoints = Checkpoints(self._workdir, self._blueprint.config.checkpoint, create=False)
        # Only here must the parameters and their EMA both be in memory.
        other, _, _ = checkpoints.restore_weights(self._blueprint, ema=self._values.raw, step=self.step)
        raw, ema = (self._drawing, other) if self._values.raw else (other, self._drawing)
        return Validation(self._blueprint, self._records).both(raw, ema, self._frozen)

    def scenes(self) -> tuple[dict, np.ndarray, list[str]]:
        count = self._values.scenes
        sampler = drawing.Sampler(self._blueprint, self._settings, drawing.batch_for(self._blueprint, count))
        return scene_scores(sampler, self._drawing, self._frozen, count, self._values.seed)

    def geneval(self) -> tuple[dict[str, Any], np.ndarray, list[str]]:
        return self._geneval.draw((self._drawing, self._frozen), self._values.per_device)

    def quality(self) -> Quality | None:
        """The quality of images that the model draws; None in processes other than 0."""
        values = self._values
        compared = self._reference() if self._reference else None
        source = image_sources.generated_images(
            self._blueprint, self._settings, self._records, values.number, seed=values.seed, facts=self._origin
        )
        source.weights = self._drawing, self._frozen
        classes = self._blueprint.config.model.condition == "class"
        return quality.measure(
            source,
            self._network,
            compared,
            self._blueprint.mesh,
            count=values.number,
            per_device=values.per_device,
            wanted=self._metrics,
            work=self._out / _WORK / "samples",
            npz=Path(values.npz).expanduser() if values.npz else None,
            labels=np.arange(values.number) % self._blueprint.config.model.num_classes if classes else None,
        )

    def captions(self, count: int) -> list[str]:
        """Captions or class names of the first `count` images measured; empty if the model reads features."""
        if self._blueprint.config.model.condition == "class":
            return report.conditions_of(self._blueprint.config, count)[1]
        if self._blueprint.config.model.text_encoder != "bytes":
            return [""] * count
        rows = image_sources.captions_of(self._records, self._values.number)(np.arange(count))
        pairs = zip(rows["text"], rows["text_length"], strict=True)
        return [bytes(text[:length]).decode(errors="replace") for text, length in pairs]

    def rows(self) -> list[report.Rows]:
        """The images that every report shows."""
        drawing = self._blueprint, self._settings, self._drawing, self._frozen, self._values.seed
        return [report.draw_samples(*drawing), report.decode_strips(*drawing)]


def _opened_reference(
    values: flags.FlagValues, network: Network | None, metrics: list[str], out: Path, blueprint: Blueprint | None
) -> Callable[[], reference.Reference] | None:
    """`reference.opened` for --reference, with its errors; None without that flag."""
    if not values.reference:
        return None
    return reference.opened(
        Path(values.reference).expanduser(),
        network,
        per_device=values.per_device,
        work=out / _WORK / "reference",
        images=bool(_METRICS_OF_SINGLE_IMAGES & set(metrics)),
        split=values.reference_split,
        count=values.reference_number,
        out=out / "reference.npz",
        blueprint=blueprint,
    )


class _Files:
    """Images of --samples_from to measure."""

    def __init__(self, values: flags.FlagValues, metrics: list[str], out: Path):
        """Raises UserError if there are fewer images than --number, or the weights or the reference cannot be used."""
        self._values, self._metrics, self._out = values, metrics, out
        self._mesh = mesh_lib.build(mesh_lib.parse(values.mesh))
        self._source = image_sources.open_images(Path(values.samples_from).expanduser(), self._mesh)
        self._network = Network(Path(values.inception).expanduser(), self._mesh)
        count = values.number if values["number"].present else min(values.number, self._source.count)
        if count > self._source.count:
            raise UserError(f"--number={count}: {values.samples_from} has {self._source.count} images")
        if count < 2:
            raise UserError(f"--samples_from={values.samples_from}: {count} images; at least 2 are needed")
        if values.reference and _METRICS_OF_SINGLE_IMAGES & set(metrics):
            named = f"--samples_from={values.samples_from}: {count} images"
            reference.check_count(named, count, Path(values.reference).expanduser())
        self._count = count
        self._reference = _opened_reference(values, self._network, metrics, out, blueprint=None)

    def quality(self) -> Quality | None:
        """The quality of the images; None in processes other than 0."""
        compared = self._reference() if self._reference else None
        return quality.measure(
            self._source, self._network, compared, self._mesh, count=self._count, per_device=self._values.per_device,
            wanted=self._metrics, work=self._out / _WORK / "samples",
        )  # fmt: skip


if __name__ == "__main__":
    drawing.define_weights_flags()
    drawing.define_settings_flags()
    flags.adopt_module_key_flags(drawing)  # listed by --help
    flags.DEFINE_string("data", None, "dataset whose validation split is used; default: the config's")
    flags.DEFINE_bool("validation", True, "measure the validation loss, which needs the dataset")
    flags.DEFINE_integer("scenes", 0, "number of captions of the shapes grammar to draw and judge")
    flags.DEFINE_string("inception", None, "FID weights of Inception v3, .safetensors or .pth")
    flags.DEFINE_string("reference", None, "an .npz file in ADM's format, a folder of pictures, or a prepared dataset")
    flags.DEFINE_string("reference_split", "train", "split of --reference, if it is a prepared dataset")
    flags.DEFINE_integer("reference_number", 0, "images to use of --reference, if it is a folder or dataset; 0: all")
    flags.DEFINE_string("metrics", ",".join(quality.METRICS), "metrics to measure with --inception")
    flags.DEFINE_integer("number", 50_000, "number of pictures to measure")
    flags.DEFINE_integer("per_device", 16, "pictures that each device works on at once")
    flags.DEFINE_string("samples_from", None, "folder of pictures or .npz file to measure instead of a model")
    flags.DEFINE_string("npz", None, "write the measured pictures to this file, in ADM's format")
    flags.DEFINE_string("geneval", None, "GenEval's metadata file (evaluation_metadata.jsonl)")
    flags.DEFINE_string("geneval_rewritten", None, "file with one prompt per line, to draw instead of GenEval's")
    flags.DEFINE_integer("geneval_images", 4, "pictures per GenEval prompt")
    flags.DEFINE_string("study", None, "directory of runs to compare, made by launch/study.sh")
    flags.DEFINE_string("report", None, "directory for an HTML page of all results")
    flags.DEFINE_integer("seed", 0, "seed of captions, decoding order and noise")
    flags.DEFINE_string("out", None, "directory for the results; default: WORKDIR/evaluation")
    hosts.define_flags()
    flags.adopt_module_key_flags(hosts)  # listed by --help
    entry.run(main)
