"""Import, export, average and describe weights.

python -m lina_jax.convert --from_torch=DIR_OR_FILE --workdir=DIR [--config=FILE.py[:PRESET]]
    convert a published pipeline directory, its transformer/, or a file of weights to a workdir for train and sample
python -m lina_jax.convert --workdir=DIR --to_torch=DIR [--raw] [--dtype=float32] [--max_shard_gb=5] [--checkpoint=STEP]
    the reverse: a pipeline directory that the published PyTorch code reads
python -m lina_jax.convert --workdir=DIR --to_safetensors=FILE.safetensors [--raw] [--dtype=float32] [--checkpoint=STEP]
    one file of all arrays, under the names that they have here
python -m lina_jax.convert --workdir=DIR --to_stablehlo=DIR [--platforms=cpu,cuda,tpu] [--raw] [--checkpoint=STEP]
        [--autoencoder=DIR] [--text_encoder=DIR]
    the sampling program and its weights; JAX runs them without this package
python -m lina_jax.convert --workdir=DIR --average=K --out=DIR
    a new workdir with the mean of the parameters of the last K checkpoints
python -m lina_jax.convert --workdir=DIR --ema_decay=0.9995 --out=DIR [--checkpoint=STEP]
    a new workdir with an EMA of another decay than the run's, reconstructed from all checkpoints (up to STEP)
python -m lina_jax.convert --describe=PATH [--diff=OTHER]
    what a workdir, a pipeline directory or a file of weights holds, and how OTHER differs from it

docs/checkpoints.md says how each part is converted. Nothing is ever overwritten, and nothing is left half-written.
"""

import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from absl import flags
from flax.traverse_util import flatten_dict, unflatten_dict

from lina_jax import (
    averaging,
    config_file,
    describe,
    drawing,
    encoders,
    entry,
    execution,
    export,
    export_program,
    output_files,
    published,
    state,
    torch_layout,
)
from lina_jax import config as config_lib
from lina_jax import mesh as mesh_lib
from lina_jax.checkpoint import Checkpoints
from lina_jax.config import Config, MeshConfig
from lina_jax.errors import UserError
from lina_jax.pipeline import Pipeline, open_pipeline
from lina_jax.workdir import write_config


class Finite(Mapping[str, np.ndarray]):
    """Tensors; as they are read, the names of those with values that are not finite are added to `bad`."""

    def __init__(self, tensors):
        self._tensors, self.shapes, self.bad = tensors, tensors.shapes, []

    def __getitem__(self, name: str) -> np.ndarray:
        tensor = self._tensors[name]
        if not np.all(np.isfinite(tensor)):
            self.bad.append(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def from_torch(source: Path, workdir: Path, given: Config | None = None) -> Config:
    """Convert published weights to a workdir of parameters and frozen arrays; return its config.

    Each array is placed in its sharding as soon as it is complete. Raises UserError with everything that is wrong,
    before anything is written.
    """
    check_new("workdir", workdir)
    pipeline = open_pipeline(source)
    check_dtypes(pipeline)
    config, assumed = published.config_of(pipeline, given)
    for assumption in assumed:
        print(f"assumed, as no file states it: {assumption}", file=sys.stderr)
    blueprint = state.make_blueprint(config, mesh_lib.mesh_for_weights(config.model))
    params, frozen = flatten_dict(blueprint.shapes.params), flatten_dict(blueprint.shapes.frozen)
    shapes = params | frozen

    def place(path, array):
        return jax.device_put(array, shapes[path].sharding)

    tensors, table = Finite(pipeline.tensors), list(torch_layout.entries(config.model))
    try:
        tree = flatten_dict(torch_layout.from_torch(table, tensors, unflatten_dict(shapes), place))
    except UserError as error:
        raise UserError(f"{pipeline.source}: {error}") from error
    if tensors.bad:
        raise UserError(f"{pipeline.source}: non-finite values in {', '.join(tensors.bad)}")
    with output_files.new_directory(workdir) as partial:
        _write_workdir(
            partial, config, *(unflatten_dict({path: tree[path] for path in part}) for part in (params, frozen))
        )
    return config


def to_torch(
    workdir: Path,
    directory: Path,
    *,
    ema: bool = True,
    step: int | None = None,
    dtype: str = "float32",
    max_shard_gb: float = 5.0,
) -> export.Weights:
    """Write a workdir's weights in the published layout (docs/checkpoints.md) and return them.

    Raises UserError if `directory` is taken, the layout has no such model, or `dtype` cannot hold a value.
    """
    if not max_shard_gb > 0:
        raise UserError(f"--max_shard_gb={max_shard_gb}: must be positive")
    check_new("to_torch", directory)
    export.check_publishable(workdir)
    weights = export.load(workdir, ema=ema, step=step)
    with output_files.new_directory(directory) as partial:
        export.write_torch(weights, partial, dtype, max_shard_gb * 1e9)
    return weights


def to_safetensors(
    workdir: Path, file: Path, *, ema: bool = True, step: int | None = None, dtype: str = "float32"
) -> export.Weights:
    """Write a workdir's weights to one file and return them.

    Raises UserError if the file exists, its name does not end in .safetensors, by which readers know the format, or
    `dtype` cannot hold a value.
    """
    if file.suffix != ".safetensors" or file.is_dir():
        raise UserError(f"--to_safetensors={file}: expected the name of a file that ends in .safetensors")
    check_new("to_safetensors", file)
    weights = export.load(workdir, ema=ema, step=step)
    with output_files.new_file(file) as partial:
        export.write_safetensors(weights, partial, dtype)
    return weights


def check_dtypes(pipeline: Pipeline) -> None:
    """Raises UserError if tensors have different dtypes.

    The text buffer is exempt: beside the float32 parameters of the published EMA it has the dtype that was loaded.
    """
    dtypes = {name: dtype for name, dtype in pipeline.tensors.dtypes.items() if name != "text_embed.weight"}
    counts = {dtype: list(dtypes.values()).count(dtype) for dtype in sorted(set(dtypes.values()))}
    if len(counts) > 1:
        rare = min(counts, key=counts.get)
        first = next(name for name, dtype in dtypes.items() if dtype == rare)
        summary = ", ".join(f"{count} in {dtype}" for dtype, count in counts.items())
        raise UserError(f"{pipeline.source}: tensors of several dtypes ({summary}; first in {rare}: {first})")


def check_new(flag: str, path: Path) -> None:
    """Raises UserError unless `path` is absent or an empty directory, and can be created."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"--{flag}={path}: already exists, choose another path")
    output_files.check(flag, path.parent)


def to_stablehlo(
    workdir: Path,
    directory: Path,
    *,
    ema: bool = True,
    step: int | None = None,
    platforms: Sequence[str] = export_program.PLATFORMS,
    autoencoder: str = "",
    text_encoder: str = "",
) -> tuple[int, str]:
    """Export the sampling program with a workdir's weights and its encoders; return their (step, kind).

    `autoencoder` and `text_encoder` are directories that replace those of the config.

    Raises UserError if `directory` is taken, a platform is unknown, or an encoder is missing.
    """
    if not platforms or not set(platforms) <= set(export_program.PLATFORMS):
        raise UserError(f"--platforms={','.join(platforms)}: expected some of {', '.join(export_program.PLATFORMS)}")
    check_new("to_stablehlo", directory)
    config = drawing.drawable_config(workdir, autoencoder, text_encoder)
    one = mesh_lib.build(MeshConfig(), jax.local_devices()[:1])
    blueprint = state.make_blueprint(execution.for_all_platforms(config), one, encoders.load_encoders(config, one))
    checkpoints = Checkpoints(workdir, config.checkpoint, create=False)
    params, frozen, step = checkpoints.restore_weights(blueprint, ema=ema, step=step)
    kind = checkpoints.kind(step, ema=ema)
    with output_files.new_directory(directory) as partial:
        metadata = export.metadata_of(config, step, kind)
        export_program.write_program(partial, blueprint, params, frozen, metadata, platforms)
    return step, kind


def average(workdir: Path, out: Path, last: int) -> list[int]:
    """Make a workdir of the mean of the last checkpoints' parameters; return their steps.

    Raises UserError if `out` is taken, and as `averaging.mean` does.
    """
    check_new("out", out)
    made = averaging.mean(workdir, last)
    _write_average(out, made)
    return made.steps


def reconstruct_ema(workdir: Path, out: Path, decay: float, step: int | None = None) -> tuple[list[int], averaging.Fit]:
    """Make a workdir of the EMA of another decay, estimated from checkpoints; return their steps and the fit.

    Raises UserError if `out` is taken, and as `averaging.ema` does.
    """
    check_new("out", out)
    made, fit = averaging.ema(workdir, decay, step)
    _write_average(out, made)
    return made.steps, fit


def _write_average(out: Path, made: averaging.Average) -> None:
    with output_files.new_directory(out) as partial:
        _write_workdir(partial, made.config, made.params, made.frozen)


def _write_workdir(workdir: Path, config: Config, params: state.Tree, frozen: state.Tree) -> None:
    write_config(workdir, config)
    checkpoints = Checkpoints(workdir, config.checkpoint)
    checkpoints.save_weights(params, frozen)
    checkpoints.close()


def _report(target: Path, step: int, kind: str) -> None:
    print(f"{target} holds step {step}, the {'EMA' if kind == 'ema' else 'raw parameters'}")


OPERATIONS = ("from_torch", "to_torch", "to_safetensors", "to_stablehlo", "average", "ema_decay", "describe")
EXPORTS = ("to_torch", "to_safetensors", "to_stablehlo")
OPTIONS = {
    "workdir": OPERATIONS[:-1],
    "config": ("from_torch",),
    "raw": EXPORTS,
    "checkpoint": (*EXPORTS, "ema_decay"),
    "dtype": ("to_torch", "to_safetensors"),
    "max_shard_gb": ("to_torch",),
    "platforms": ("to_stablehlo",),
    "autoencoder": ("to_stablehlo",),
    "text_encoder": ("to_stablehlo",),
    "out": ("average", "ema_decay"),
    "diff": ("describe",),
}


def _operation(values: flags.FlagValues) -> str:
    """The requested operation. Raises UserError unless it is one, with all flags that it needs and none it ignores."""
    chosen = [name for name in OPERATIONS if values[name].value is not None]
    if len(chosen) != 1:
        raise UserError(f"exactly one of --{', --'.join(OPERATIONS)} is needed")
    (operation,) = chosen
    for option, takers in OPTIONS.items():
        if values[option].present and operation not in takers:
            raise UserError(f"--{option} goes with --{', --'.join(takers)}, not with --{operation}")
    for option in ("workdir", "out"):
        if operation in OPTIONS[option] and not values[option].value:
            raise UserError(f"--{operation} needs --{option}=DIR")
    for name in (operation, "diff"):
        if values[name].value == "":  # from an unset shell variable; as a path, this is the current directory
            raise UserError(f"--{name}= is empty, expected a path")
    return operation


def main(argv: Sequence[str]) -> None:
    del argv
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # cleans up, like Ctrl-C
    values = flags.FLAGS
    operation = _operation(values)
    workdir = Path(values.workdir).expanduser() if values.workdir else None
    target = Path(values.out or values[operation].value).expanduser()
    which = {"ema": not values.raw, "step": values.checkpoint}
    match operation:
        case "from_torch":
            given = config_lib.freeze(values.config) if values.config is not None else None
            config = from_torch(target, workdir, given)
            missing = drawing.missing_encoder(config)
            print(f"{workdir} holds the weights of {target}" + (f"; it cannot draw yet: {missing}" if missing else ""))
        case "to_torch":
            weights = to_torch(workdir, target, **which, dtype=values.dtype, max_shard_gb=values.max_shard_gb)
            _report(target, weights.step, weights.kind)
        case "to_safetensors":
            weights = to_safetensors(workdir, target, **which, dtype=values.dtype)
            _report(target, weights.step, weights.kind)
        case "to_stablehlo":
            step, kind = to_stablehlo(
                workdir,
                target,
                **which,
                platforms=values.platforms,
                autoencoder=values.autoencoder,
                text_encoder=values.text_encoder,
            )
            _report(target, step, kind)
        case "average":
            print(f"{target} holds the mean of steps {average(workdir, target, values.average)}")
        case "ema_decay":
            steps, fit = reconstruct_ema(workdir, target, values.ema_decay, values.checkpoint)
            print(
                f"{target} holds the EMA of decay {values.ema_decay} at step {steps[-1]}, from {len(steps)} "
                f"checkpoints; its error is at most {fit.bound:.3g} times the largest change of one update or, if "
                f"updates are independent, about {fit.share:.2%} of the distance to the last parameters"
            )
        case "describe":
            other = Path(values.diff).expanduser() if values.diff else None
            print(describe.difference(target, other) if other else describe.describe(target))


if __name__ == "__main__":
    config_file.define_flag()
    flags.declare_key_flag("config")
    flags.DEFINE_string("workdir", None, "training directory; --from_torch creates it, the other operations read it")
    flags.DEFINE_string("from_torch", None, "import a published pipeline directory, its transformer/ or a weights file")
    flags.DEFINE_string("to_torch", None, "export to this new directory, in the published layout")
    flags.DEFINE_string("to_safetensors", None, "export to this new .safetensors file, with lina_jax's own names")
    flags.DEFINE_string("to_stablehlo", None, "export the sampling program to this new directory")
    flags.DEFINE_list("platforms", list(export_program.PLATFORMS), "platforms for which --to_stablehlo exports")
    flags.DEFINE_string("autoencoder", "", "directory for --to_stablehlo; default: the config's autoencoder.path")
    flags.DEFINE_string("text_encoder", "", "directory for --to_stablehlo; default: the config's text_encoder.path")
    flags.DEFINE_integer("average", None, "average the parameters of this many last checkpoints")
    flags.DEFINE_float("ema_decay", None, "reconstruct the EMA of this decay, otherwise as in the run's config.ema")
    flags.DEFINE_string("out", None, "new workdir for --average or --ema_decay")
    flags.DEFINE_string("describe", None, "describe this workdir, pipeline directory or weights file")
    flags.DEFINE_string("diff", None, "with --describe: another one to compare it with")
    flags.DEFINE_bool("raw", False, "export the raw parameters instead of the EMA")
    flags.DEFINE_integer("checkpoint", None, "step to export, or of the EMA; default: the latest")
    flags.DEFINE_enum("dtype", "float32", sorted(export.DTYPES), "dtype of exported weights")
    flags.DEFINE_float("max_shard_gb", 5.0, "maximum size of a --to_torch file, in 10^9 bytes")
    entry.run(main)
