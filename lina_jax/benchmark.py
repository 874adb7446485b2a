"""Measure parts of the system on this machine: JSON lines, each with a name, its figures and the settings.

python -m lina_jax.benchmark data [--out=DIR] [--parts=latents,jpeg,startup,memory] [--seconds=10] [--repeats=3]
[--batch_size=64] [--threads=2] [--prefetch=4] [--memory_batches=10000]

`data` compares the batches of training with the same machine without this code: `latents` with what grain reads raw
from the same files (`latents_raw` record by record, `latents_raw_lists` in lists of a batch), `jpeg` with the same
decoding and resizing in a bare loop (`jpeg_bare`). The sides take turns; figures are medians; `cpu_ms` is processor
time for one record, which busy neighbours disturb less than the rate. Datasets of noise are made in OUT and used again
(default: a temporary directory).
"""

import dataclasses
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from lina_jax import benchmark_data, errors
from lina_jax.errors import UserError


def data() -> None:
    values = flags.FLAGS
    settings = benchmark_data.Settings(
        **{field.name: values[field.name].value for field in dataclasses.fields(benchmark_data.Settings)}
    )
    unknown = [part for part in values.parts if part not in benchmark_data.PARTS]
    if unknown:
        raise UserError(f"--parts={','.join(unknown)}: allowed are {', '.join(benchmark_data.PARTS)}")
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(values.out or temporary).expanduser()
        for part in values.parts:
            for row in benchmark_data.PARTS[part](out, settings):
                print(json.dumps(row | dataclasses.asdict(settings)), flush=True)


COMMANDS = {"data": data}


def main(argv: Sequence[str]) -> None:
    COMMANDS[argv[1]]()


if __name__ == "__main__":
    flags.DEFINE_list("parts", list(benchmark_data.PARTS), "what to measure")
    flags.DEFINE_string("out", None, "directory of the datasets of noise; default: a temporary one")
    flags.DEFINE_float("seconds", 10.0, "for each measurement", lower_bound=0.0)
    flags.DEFINE_integer("repeats", 3, "of each measurement; the median counts", lower_bound=1)
    flags.DEFINE_integer("batch_size", 64, "records of a batch", lower_bound=1)
    flags.DEFINE_integer("threads", 2, "that read and decode", lower_bound=1)
    flags.DEFINE_integer("prefetch", 4, "batches kept ready", lower_bound=1)
    flags.DEFINE_integer("memory_batches", 10_000, "over which memory is watched", lower_bound=10)
    errors.run(main, commands=tuple(COMMANDS))
