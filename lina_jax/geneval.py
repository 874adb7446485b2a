"""Pictures of GenEval's prompts (Ghosh et al. 2023) in the folders that its judge reads.

    OUT/00000/metadata.jsonl      the prompt's line of the benchmark's file, as it is
    OUT/00000/samples/0000.png    and 0001.png, ...

Picture k of prompt i is number i * K + k of the seed, so that what exists already need not be drawn again.
"""

import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from PIL import Image

from lina_jax import image_sources, pictures, places, progress, sample
from lina_jax import mesh as mesh_lib
from lina_jax.config import SampleConfig
from lina_jax.errors import UserError
from lina_jax.state import Blueprint, Tree

_SHOWN = 36


class Prompt(NamedTuple):
    line: str  # of the benchmark's file
    text: str  # that is drawn


def read_prompts(path: Path, rewritten: str | None) -> list[Prompt]:
    """Of the benchmark's metadata, each with the line of the same number of a file of rewritten prompts, if given.

    Raises UserError naming the file and the line.
    """
    lines, texts = [], []
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        lines.append(line)
        try:
            texts.append(str(json.loads(line)["prompt"]))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f'{path}, line {number}: expected a JSON object with "prompt" ({line[:60]})') from error
    if not lines:
        raise UserError(f"{path}: no prompts")
    if rewritten:
        texts = [_rewritten(line) for line in _lines(Path(rewritten).expanduser()) if line.strip()]
        if len(texts) != len(lines):
            raise UserError(f"--geneval_rewritten={rewritten}: {len(texts)} prompts, {path} has {len(lines)}")
    return [Prompt(*pair) for pair in zip(lines, texts, strict=True)]


def _rewritten(line: str) -> str:
    """A prompt, as it stands or as "prompt" of a JSON object."""
    try:
        return str(json.loads(line)["prompt"])
    except (ValueError, KeyError, TypeError):
        return line.strip()


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def draw(
    plan: Blueprint,
    settings: SampleConfig,
    weights: tuple[Tree, Tree],
    prompts: Sequence[Prompt],
    out: Path,
    *,
    seed: int,
    images: int,
    per_device: int,
    facts: dict[str, Any],
) -> tuple[dict[str, Any], np.ndarray, list[str]]:
    """Draw what `out` lacks; (what there is now, the first pictures (N, H, W, 3), their prompts).

    `facts` name the weights. Each process writes what its devices made. Raises UserError where `out` holds pictures of
    other weights or settings.
    """
    for prompt in prompts:
        sample.check_prompt(plan.config, prompt.text)
    texts = [prompt.text for prompt in prompts for _ in range(images)]
    source = image_sources.Drawn(
        plan, settings, image_sources.prompts(plan, texts), len(texts), seed, {**facts, "images": images}
    )
    source.weights = weights
    absent = np.ones(len(texts), np.int8)
    if jax.process_index() == 0:
        _prepare(out, prompts, {**source.facts, "prompts": [prompt.text for prompt in prompts]})
        absent = np.array([not _picture(out, number, images).exists() for number in range(len(texts))], np.int8)
    absent = np.flatnonzero(multihost_utils.broadcast_one_to_all(absent))
    size = per_device * mesh_lib.batch_parts(plan.mesh)
    with (
        progress.bar(len(texts), done=len(texts) - len(absent), name="GenEval") as bar,
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        for start in range(0, len(absent), size):
            numbers = absent[np.minimum(np.arange(start, start + size), len(absent) - 1)]
            made = source.batch(numbers)
            jobs = [pool.submit(pictures.save, _picture(out, n, images), image) for n, image in _ours(made, numbers)]
            for job in jobs:
                job.result()
            bar.update(min(size, len(absent) - start))
    multihost_utils.sync_global_devices("geneval")  # all pictures are there
    result = {"folder": str(out), "prompts": len(prompts), "images_per_prompt": images}
    first = list(range(0, len(texts), images))[:_SHOWN]
    leader = jax.process_index() == 0
    shown = [np.asarray(Image.open(_picture(out, number, images))) for number in first] if leader else []
    return result, np.array(shown, np.uint8), [texts[number] for number in first]


def _ours(made: jax.Array, numbers: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Each picture on this process's devices, once, with its number."""
    written = set()
    for shard in made.addressable_shards:
        if shard.replica_id:
            continue
        for number, image in zip(numbers[shard.index[0]].tolist(), np.asarray(shard.data), strict=True):
            if number not in written:
                written.add(number)
                yield number, image


def _picture(out: Path, number: int, images: int) -> Path:
    prompt, image = divmod(number, images)
    return out / f"{prompt:05d}" / "samples" / f"{image:04d}.png"


def _prepare(out: Path, prompts: Sequence[Prompt], facts: dict[str, Any]) -> None:
    """Folders and what the pictures are of."""
    about, facts = out / "settings.json", json.loads(json.dumps(facts))
    if about.exists():
        try:
            before = json.loads(about.read_text())
        except ValueError as error:
            raise UserError(f"{about} is damaged: choose another place, or remove {out}") from error
        differing = [name for name in facts | before if facts.get(name) != before.get(name)]
        if differing:
            raise UserError(f"{out} holds pictures of other {', '.join(differing)}: choose another --out, or remove it")
    elif out.exists() and any(out.iterdir()):
        raise UserError(f"{out} holds files that are not of this command: choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    places.write_json(about, facts)
    for number, prompt in enumerate(prompts):
        folder = out / f"{number:05d}"
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        (folder / "metadata.jsonl").write_text(prompt.line + "\n", encoding="utf-8")
