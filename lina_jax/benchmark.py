"""Measure parts of the system on this machine: one JSON object per line on stdout for each measurement.

python -m lina_jax.benchmark attention [--tokens=320,5120] [--width=1536] [--heads=16] [--dtype=float32] [--batches=1]
python -m lina_jax.benchmark train --config=configs/NAME.py[:preset] [--batches=16,32] [--config.any.field=value ...]
python -m lina_jax.benchmark sample --config=configs/NAME.py[:preset] [--batches=1,8] [--autoencoder]
python -m lina_jax.benchmark data [--out=DIR] [--parts=latents,jpeg,startup,memory] [--seconds=10] [--batch_size=64]
    [--threads=2] [--prefetch=4] [--memory_batches=10000]

All take --repeats=5, the runs of each measurement (except of memory), whose median is reported, and --compare=FILE,
which adds ratios to the lines of an earlier call. Compilation and first calls are left out. docs/performance.md
explains the fields.

`attention` measures one layer, linear beside softmax. `train` measures the train step and `sample` the sampler, on all
devices in the config's mesh, with a row for each batch size.

`data` compares training batches with the same work done without this code on the same machine. It compares `latents`
with raw reads of the same files by grain (`latents_raw` record by record, `latents_raw_lists` in lists of one batch),
and `jpeg` with the same decoding and resizing in a bare loop (`jpeg_bare`). `cpu_ms` is the CPU time per record, which
other load on the machine affects less than the rate. Datasets of noise are created in OUT and reused (default: a
temporary directory).

When two sides are compared, their runs alternate.
"""

import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
from absl import flags
from ml_collections import config_flags

from lina_jax import benchmark_data, benchmark_model, config_file, entry, hosts, timing
from lina_jax import config as config_lib
from lina_jax.config import Config
from lina_jax.errors import UserError
from lina_jax.timing import Row


def attention(values: flags.FlagValues) -> Iterator[Row]:
    default = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    if not values.tokens:
        raise UserError("--tokens= is empty: expected numbers of tokens such as 320,5120")
    for tokens in _numbers("tokens", values.tokens):
        sizes = benchmark_model.AttentionSizes(
            tokens, values.width, values.heads, values.dtype or default, values.attention_kernel
        )
        for row in benchmark_model.attention(sizes, _numbers("batches", values.batches), values.repeats):
            yield {"config": "default"} | row


def train(values: flags.FlagValues) -> Iterator[Row]:
    batches = _numbers("batches", values.batches)
    if batches and values.config is not None:
        values.config.batch_size = batches[0]  # else mistakes would be told of a batch that is not measured
    config, config_fields = _config(values)
    with hosts.distributed_run(config_file.given_flags()):
        for row in benchmark_model.train(config, batches, values.repeats):
            yield config_fields | row


def sample(values: flags.FlagValues) -> Iterator[Row]:
    config, config_fields = _config(values)
    batches = _numbers("batches", values.batches)
    with hosts.distributed_run(config_file.given_flags()):
        for row in benchmark_model.sample(config, batches, values.repeats, autoencoder=values.autoencoder):
            yield config_fields | row


def data(values: flags.FlagValues) -> Iterator[Row]:
    settings = benchmark_data.Settings(
        values.seconds, values.repeats, values.batch_size, values.threads, values.prefetch, values.memory_batches
    )
    unknown = [part for part in values.parts if part not in benchmark_data.PARTS]
    if unknown or not values.parts:
        raise UserError(f"--parts={','.join(unknown)}: expected one or more of {', '.join(benchmark_data.PARTS)}")
    if not math.isfinite(values.seconds):
        raise UserError(f"--seconds={values.seconds}: must be finite")
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(values.out or temporary).expanduser()
        for part in values.parts:
            for row in benchmark_data.PARTS[part](out, settings):
                yield {"config": "default"} | row


class Command(NamedTuple):
    rows: Callable[[flags.FlagValues], Iterator[Row]]
    flags: tuple[str, ...]  # beside --repeats and --compare


MODEL = ("config", "batches", "coordinator", "processes", "process_id", "connect_timeout", "heartbeat_timeout")
COMMANDS = {
    "attention": Command(attention, ("tokens", "width", "heads", "dtype", "attention_kernel", "batches")),
    "train": Command(train, MODEL),
    "sample": Command(sample, (*MODEL, "autoencoder")),
    "data": Command(data, ("parts", "out", "seconds", "batch_size", "threads", "prefetch", "memory_batches")),
}


def _config(values: flags.FlagValues) -> tuple[Config, Row]:
    """The config, and the fields of a row that describe it."""
    if values.config is None:
        raise UserError("--config=FILE.py[:PRESET] is needed")
    given = flags.FLAGS["config"]
    overrides = {name: str(value) for name, value in config_flags.get_override_values(given).items()}
    return config_lib.freeze(values.config), {
        "config": config_flags.get_config_filename(given),
        **({"overrides": overrides} if overrides else {}),
    }


def _numbers(name: str, given: Sequence[str]) -> list[int]:
    if not all(number.isdecimal() and int(number) for number in given):
        raise UserError(f"--{name}={','.join(given)}: expected positive whole numbers separated by commas")
    return list(map(int, given))


def _refuse_flags_of_others(name: str, values: flags.FlagValues) -> None:
    theirs = {flag for command in COMMANDS.values() for flag in command.flags} - set(COMMANDS[name].flags)
    for flag in sorted(theirs):
        if values[flag].present:
            users = [other for other, command in COMMANDS.items() if flag in command.flags]
            raise UserError(f"--{flag} applies to {', '.join(users)}, not to {name}")


def main(argv: Sequence[str]) -> None:
    values, name = flags.FLAGS, argv[1]
    _refuse_flags_of_others(name, values)
    earlier = timing.Baseline(values.compare) if values.compare else None
    stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries write to stdout, too (Gloo, about its connections)
    for row in COMMANDS[name].rows(values):
        if jax.process_index() != 0:
            continue
        row = {"benchmark": row.pop("benchmark")} | row
        if earlier:
            row["of_earlier"] = earlier.ratios(row)
            shown = {name: round(ratio, 3) for name, ratio in (row["of_earlier"] or {}).items()}
            print(f"{row['benchmark']} relative to {earlier.path}: {shown or 'not measured there'}", file=sys.stderr)
        print(json.dumps(row), file=stdout, flush=True)


if __name__ == "__main__":
    config_file.define_flag()
    flags.declare_key_flag("config")
    flags.DEFINE_integer("repeats", 5, "runs per measurement; the median is reported", lower_bound=1)
    flags.DEFINE_string("compare", None, "output file of an earlier call; ratios to its figures are added")
    flags.DEFINE_list("batches", [], "batch sizes; default: the config's (train), 4 (sample), 1 (attention)")
    flags.DEFINE_bool("autoencoder", False, "decode to pixels, with an autoencoder of the published size")
    flags.DEFINE_list("tokens", ["320", "5120"], "condition and image tokens (1:4): 20, 80, 320, 1280, 5120, ...")
    flags.DEFINE_integer("width", 1536, "width of the attention layer", lower_bound=1)
    flags.DEFINE_integer("heads", 16, "heads of the attention layer", lower_bound=1)
    flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "dtype of the layer; default: bfloat16, on CPUs float32")
    flags.DEFINE_enum("attention_kernel", "xla", ["xla", "pallas"], "kernel of the linear layer; pallas: TPUs, GPUs")
    flags.DEFINE_list("parts", list(benchmark_data.PARTS), "what to measure")
    flags.DEFINE_string("out", None, "directory for the datasets of noise; default: a temporary one")
    flags.DEFINE_float("seconds", 10.0, "seconds per measurement", lower_bound=0.001)
    flags.DEFINE_integer("batch_size", 64, "records per batch", lower_bound=1)
    flags.DEFINE_integer("threads", 2, "threads that read and decode", lower_bound=1)
    flags.DEFINE_integer("prefetch", 4, "batches kept ready", lower_bound=1)
    flags.DEFINE_integer("memory_batches", 10_000, "batches during which memory use is watched", lower_bound=10)
    hosts.define_flags()
    flags.adopt_module_key_flags(hosts)  # listed by --help
    entry.run(main, commands=tuple(COMMANDS))
