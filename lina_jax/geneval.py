"""Images of GenEval's prompts (Ghosh et al. 2023) in the folders that its judge reads.

    OUT/00000/metadata.jsonl      the prompt's line of the benchmark's file, unchanged
    OUT/00000/samples/0000.png    and 0001.png, ...

With K images per prompt, image k of prompt i has number i * K + k of the seed, so that images that exist need not be
drawn again.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from PIL import Image

from lina_jax import drawing, hosts, image_sources, output_files, pictures, progress
from lina_jax import mesh as mesh_lib
from lina_jax.config import Config, SampleConfig
from lina_jax.errors import UserError
from lina_jax.images import cpus
from lina_jax.state import Blueprint, Tree


class Prompt(NamedTuple):
    line: str  # of the benchmark's file
    text: str  # to draw


def read_prompts(path: Path, rewritten: str | None, config: Config) -> list[Prompt]:
    """The prompts of the benchmark's metadata file, in the wording of the file `rewritten` (same order) if given.

    Raises UserError that names file and line, also for a prompt that the model of `config` cannot read.
    """
    lines, texts = _lines(path), []
    for number, line in lines:
        try:
            texts.append(_prompt(line))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f'{path}, line {number}: expected a JSON object with "prompt" ({line[:60]})') from error
    if not lines:
        raise UserError(f"{path}: no prompts")
    drawn, where = lines, path
    if rewritten:
        where = Path(rewritten).expanduser()
        drawn = _lines(where)
        texts = [_rewritten(line) for _, line in drawn]
        if len(texts) != len(lines):
            raise UserError(f"--geneval_rewritten={rewritten}: {len(texts)} prompts, {path} has {len(lines)}")
    for (number, _), text in zip(drawn, texts, strict=True):
        try:
            drawing.check_prompt(config, text)
        except UserError as error:
            raise UserError(f"{where}, line {number}: {error}") from error
    return [Prompt(line, text) for (_, line), text in zip(lines, texts, strict=True)]


def _rewritten(line: str) -> str:
    """The prompt in a line: "prompt" of a JSON object, or the line itself."""
    try:
        return _prompt(line)
    except (ValueError, KeyError, TypeError):
        return line.strip()


def _prompt(line: str) -> str:
    """The text in "prompt" of a JSON object. Raises ValueError, KeyError or TypeError if there is none."""
    text = json.loads(line)["prompt"]
    if not isinstance(text, str):
        raise TypeError(f"the prompt is {text!r}, not text")
    return text


def _lines(path: Path) -> list[tuple[int, str]]:
    """(number, line) of each line that is not blank. Raises UserError if the file cannot be read."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    return [(number, line) for number, line in enumerate(lines, 1) if line.strip()]


class Drawing:
    """Images of prompts in a directory, which may already hold some of them."""

    def __init__(
        self,
        blueprint: Blueprint,
        settings: SampleConfig,
        prompts: Sequence[Prompt],
        out: Path,
        *,
        seed: int,
        images: int,
        facts: Mapping[str, Any],
    ):
        """`images` is the number per prompt; `facts` identify the weights. Nothing is written yet.

        Raises UserError if `out` holds images of other weights or settings, or files of another origin.
        """
        self._blueprint, self._prompts, self._out, self._images = blueprint, prompts, out, images
        self._texts = [prompt.text for prompt in prompts for _ in range(images)]
        conditions = image_sources.prompts(blueprint, self._texts)
        facts = {**facts, "images": images}
        self._source = image_sources.GeneratedImages(blueprint, settings, conditions, len(self._texts), seed, facts)
        content = {**self._source.facts, "prompts": [prompt.text for prompt in prompts]}
        self._facts, self._about = json.loads(json.dumps(content)), out / "settings.json"
        if jax.process_index() == 0:
            self._check_earlier()

    def draw(self, weights: tuple[Tree, Tree], per_device: int) -> tuple[dict[str, Any], np.ndarray, list[str]]:
        """Draw the missing images; returns (what there is now, images (N, H, W, 3) uint8 to show, their prompts).

        Each process writes the images of its devices. The images to show, one for each of the first prompts, are
        returned only in process 0.
        """
        self._source.weights = weights
        leader, count = jax.process_index() == 0, len(self._texts)
        absent = np.ones(count, np.int8)
        if leader:
            self._make_folders()
            absent = np.array([not self._picture(number).exists() for number in range(count)], np.int8)
        # Here the others also wait while process 0 looks for thousands of files.
        hosts.check_shared(str(self._about), lambda: "there" if self._about.exists() else "absent")
        absent = np.flatnonzero(multihost_utils.broadcast_one_to_all(absent))
        size = per_device * mesh_lib.batch_parts(self._blueprint.mesh)
        with (
            progress.bar(count, done=count - len(absent), name="GenEval") as bar,
            ThreadPoolExecutor(cpus()) as pool,
        ):
            for start in range(0, len(absent), size):
                numbers = absent[np.minimum(np.arange(start, start + size), len(absent) - 1)]
                made = self._source.batch(numbers)
                jobs = [pool.submit(pictures.save, self._picture(n), image) for n, image in _ours(made, numbers)]
                for job in jobs:
                    job.result()
                bar.update(min(size, len(absent) - start))
        hosts.barrier("GenEval's pictures are there")
        result = {"folder": str(self._out), "prompts": len(self._prompts), "images_per_prompt": self._images}
        first = list(range(0, count, self._images))[: pictures.SHOWN]
        shown = [np.asarray(Image.open(self._picture(number))) for number in first] if leader else []
        return result, np.array(shown, np.uint8), [self._texts[number] for number in first]

    def _picture(self, number: int) -> Path:
        prompt, image = divmod(number, self._images)
        return self._out / f"{prompt:05d}" / "samples" / f"{image:04d}.png"

    def _check_earlier(self) -> None:
        """Raises UserError if the directory holds images of other facts, or files of another origin."""
        out = self._out
        if self._about.exists():
            try:
                before = json.loads(self._about.read_text())
            except ValueError as error:
                raise UserError(f"{self._about} is damaged: choose another --out, or remove {out}") from error
            differing = [name for name in self._facts | before if self._facts.get(name) != before.get(name)]
            if differing:
                raise UserError(
                    f"{out} holds pictures that differ in {', '.join(differing)}: choose another --out, or remove it"
                )
        elif out.exists() and any(not output_files.is_partial(path) for path in out.iterdir()):
            raise UserError(f"{out} holds files that this command did not write: choose another --out")

    def _make_folders(self) -> None:
        """Make the folders, and write settings.json and the metadata of each prompt."""
        self._out.mkdir(parents=True, exist_ok=True)
        output_files.write_json(self._about, self._facts)
        for number, prompt in enumerate(self._prompts):
            folder = self._out / f"{number:05d}"
            (folder / "samples").mkdir(parents=True, exist_ok=True)
            (folder / "metadata.jsonl").write_text(prompt.line + "\n", encoding="utf-8")


def _ours(made: jax.Array, numbers: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (number, image), each once, for the images on this process' devices that it has to write."""
    written = set()
    for shard in made.addressable_shards:
        if shard.replica_id:
            continue
        for number, image in zip(numbers[shard.index[0]].tolist(), np.asarray(shard.data), strict=True):
            if number not in written:
                written.add(number)
                yield number, image
