"""Turn a raw collection of captioned images into training records.

python -m lina_jax.prepare --source=shapes --out=DIR --resolution=32 --train=20000 --validation=500
python -m lina_jax.prepare --source=parquet --input='RAW/*.parquet' --out=DIR --resolution=32 --validation=1000

`out` becomes a TFDS dataset directory (see `records.py`) with two files more: `prepare.json` (settings and totals) and
`rejects.jsonl` (one line per item left out). The validation split of a parquet collection is `validation` rows drawn
without replacement, a pure function of (number of rows, seed); rejects among them make it smaller.
"""

import collections
import dataclasses
import io
import itertools
import json
import os
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from PIL import Image
from tqdm import tqdm

from lina_jax import errors, records, shapes
from lina_jax.errors import UserError
from lina_jax.sources import Example, ParquetSource, Reject, ShapesSource, Source

_BATCH = 256  # items in flight


def _flag(default: Any, text: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass(frozen=True)
class Settings:
    """All that decides the content of a dataset; each field is a flag."""

    source: str = _flag("shapes", "kind of collection: shapes | parquet")
    resolution: int = _flag(32, "side of the stored images, in pixels")
    validation: int = _flag(500, "images in the validation split")
    seed: int = _flag(0, "chooses the scenes of shapes, the validation rows of parquet")
    train: int = _flag(20_000, "shapes: images in the train split")
    input: str = _flag("", "parquet: files, as a path or a quoted glob")
    image_column: str = _flag("image", "parquet: column of encoded images")
    caption_column: str = _flag("text", "parquet: column of captions; empty = there are none")
    label_column: str = _flag("label", "parquet: column of class indices; empty = there are none")

    def __post_init__(self):
        of_source = {"shapes": ("train",), "parquet": ("input", "image_column", "caption_column", "label_column")}
        if self.source not in of_source:
            raise UserError(f"--source={self.source!r} is unknown, expected one of {', '.join(of_source)}")
        for kind, names in of_source.items():
            for name in names:
                if kind != self.source and getattr(self, name) != getattr(type(self), name):
                    raise UserError(f"--{name}={getattr(self, name)!r} does not apply to --source={self.source}")
        if self.source == "parquet" and not (self.input and self.image_column):
            raise UserError("--source=parquet needs --input='DIR/*.parquet' and an --image_column")
        for name, least in {"resolution": 1, "validation": 0, "seed": 0, "train": 1}.items():
            if getattr(self, name) < least:
                raise UserError(f"--{name}={getattr(self, name)}, expected at least {least}")


def prepare(out: str | Path, settings: Settings, max_reject_fraction: float = 0.05) -> dict[str, Any]:
    """Write the dataset `out` and return its totals: images per split, rejects per reason.

    A finished dataset of the same settings is left as it is. Raises UserError if `out` holds anything else, or if more
    than the given share of the items is rejected; nothing is left behind then.
    """
    out = Path(out).expanduser()
    if done := _finished(out, settings):
        print(f"{out} is already prepared with these settings")
        return done
    parts = _parts(settings)
    total = sum(len(source) for source, _ in parts)
    rejects: collections.Counter[str] = collections.Counter()
    features = records.pixel_features(parts[0][0].label_names)
    with (
        records.create(out, settings.source, features) as writer,
        (writer.directory / "rejects.jsonl").open("w") as reject_file,
        tqdm(total=total, unit=" images", disable=None) as progress,
    ):
        for split, source, item in _encoded(parts, settings.resolution):
            progress.update()
            if isinstance(item, Example):
                writer.write(split, short_caption="", **item._asdict())
                continue
            rejects[item.reason] += 1
            reject_file.write(json.dumps({"source": source, **item._asdict()}) + "\n")
            if rejects.total() > max_reject_fraction * total:
                common = "; ".join(f"{reason} ({count})" for reason, count in rejects.most_common(3))
                raise UserError(
                    f"{rejects.total()} of {total} items rejected, more than --max_reject_fraction="
                    f"{max_reject_fraction}: {common}; last {item.key}"
                )
        totals = {"images": writer.counts(), "rejected": dict(rejects)}
        if "train" not in totals["images"]:
            raise UserError(f"nothing to train on: {rejects.total()} of {total} items rejected")
        summary = {"settings": _recorded(settings), "totals": totals}
        (writer.directory / "prepare.json").write_text(json.dumps(summary, indent=2) + "\n")
    return totals


def resize_and_crop(image: Image.Image, resolution: int) -> Image.Image:
    """Scale the shorter side to `resolution` and crop the center, as in ADM (Dhariwal and Nichol 2021)."""
    while min(image.size) >= 2 * resolution:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = resolution / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - resolution) // 2, (image.height - resolution) // 2
    return image.crop((left, top, left + resolution, top + resolution))


def _recorded(settings: Settings) -> dict[str, Any]:
    """What a dataset is known by: its settings and, of rendered scenes, what the code makes of them."""
    scenes = {"scenes": shapes.fingerprint()} if settings.source == "shapes" else {}
    return dataclasses.asdict(settings) | scenes


def _finished(out: Path, settings: Settings) -> dict[str, Any] | None:
    """Totals of the dataset in `out`, None if there is nothing yet."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / "prepare.json").is_file():
        raise UserError(
            f"--out={out} exists and is not a dataset made by lina_jax.prepare: choose another or remove it"
        )
    summary = json.loads((out / "prepare.json").read_text())
    there, wanted = summary["settings"], _recorded(settings)
    differences = [
        f"{name}={there.get(name)!r}, asked {wanted[name]!r}" for name in wanted if there.get(name) != wanted[name]
    ]
    if differences:
        raise UserError(f"--out={out} holds a dataset with other settings: {'; '.join(differences)}")
    return summary["totals"]


def _parts(settings: Settings) -> list[tuple[Source, Callable[[int], str]]]:
    """The sources to read, each with the function from an item's position to its split."""
    if settings.source == "shapes":
        counts = {"train": settings.train, "validation": settings.validation}
        return [
            (ShapesSource(split, count, settings.resolution, settings.seed), lambda _, split=split: split)
            for split, count in counts.items()
        ]
    columns = settings.image_column, settings.caption_column, settings.label_column
    source = ParquetSource(settings.input, *columns)
    if settings.validation >= len(source):
        raise UserError(f"--validation={settings.validation} leaves nothing of the {len(source)} rows to train on")
    chosen = set(random.Random(settings.seed).sample(range(len(source)), settings.validation))
    return [(source, lambda row: "validation" if row in chosen else "train")]


def _encoded(
    parts: Sequence[tuple[Source, Callable[[int], str]]], resolution: int
) -> Iterator[tuple[str, str, Example | Reject]]:
    """Yield (split, name of the source, item) in order, the images as PNG of the final size."""
    # Threads are enough: Pillow decodes and scales without the interpreter lock.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for source, split_of in parts:
            items = enumerate(source)
            while batch := list(itertools.islice(items, _BATCH)):
                done = pool.map(lambda pair: _encode(pair[1], resolution), batch)
                for (position, _), item in zip(batch, done, strict=True):
                    yield split_of(position), source.name, item


def _encode(item: Example | Reject, resolution: int) -> Example | Reject:
    if isinstance(item, Reject):
        return item
    try:
        raw = Image.fromarray(item.image) if isinstance(item.image, np.ndarray) else Image.open(io.BytesIO(item.image))
        image = resize_and_crop(raw.convert("RGB"), resolution)
    except Exception as error:  # Pillow raises nearly anything on corrupt bytes
        return Reject(item.key, f"undecodable image: {type(error).__name__}")
    png = io.BytesIO()
    image.save(png, "PNG", compress_level=1)  # the default takes 15 % longer for 2 % less, at 256 px
    return item._replace(image=png.getvalue())


def define_flags() -> None:
    """Define the flags of the entry point; not at import, where those of other entry points would clash."""
    for field in dataclasses.fields(Settings):
        define = flags.DEFINE_integer if field.type is int else flags.DEFINE_string
        define(field.name, field.default, field.metadata["help"])
    flags.DEFINE_string("out", None, "directory of the dataset to make")
    flags.DEFINE_float("max_reject_fraction", 0.05, "end with an error if more of the items than this is rejected")


def main(argv: Sequence[str]) -> None:
    del argv
    values = flags.FLAGS
    if not values.out:
        raise UserError("--out=DIR is missing: the directory of the dataset to make")
    settings = Settings(**{field.name: values[field.name].value for field in dataclasses.fields(Settings)})
    totals = prepare(values.out, settings, values.max_reject_fraction)
    print(f"{values.out}: " + ", ".join(f"{count} {split} images" for split, count in totals["images"].items()))
    for reason, count in totals["rejected"].items():
        print(f"rejected {count}: {reason}", file=sys.stderr)


if __name__ == "__main__":
    define_flags()
    errors.run(main)
