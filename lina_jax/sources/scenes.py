"""Rendered scenes of `lina_jax.shapes`, a pure function of (split, number, seed)."""

import contextlib
from collections.abc import Iterator

from lina_jax import shapes
from lina_jax.sources import base
from lina_jax.sources.base import Example, Unit


class ShapesSource:
    """`train` and `validation` scenes of the two splits, keyed `SPLIT/NUMBER`."""

    name = "shapes"
    label_names = ()
    contents = ()  # everything follows from the settings

    def __init__(self, train: int, validation: int, resolution: int, seed: int, unit_items: int):
        self._resolution, self._seed = resolution, seed
        counts = {"train": train, "validation": validation}
        self.units = [unit for split, n in counts.items() for unit in base.ranges("shapes", n, unit_items, split)]

    @contextlib.contextmanager
    def open(self, unit: Unit) -> Iterator[tuple[int, Iterator[Example]]]:
        yield unit.count, (self._example(unit.split, i) for i in range(unit.start, unit.stop))

    def _example(self, split: str, i: int) -> Example:
        scene = shapes.scene(split, i, self._seed)
        return Example(f"{split}/{i}", shapes.render(scene, self._resolution), scene.caption, "", -1)
