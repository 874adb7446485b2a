"""Read the device groups of a collective, in every notation that XLA uses."""

import math
import re

import numpy as np

from lina_jax import hlo


def of(instruction: hlo.Instruction, devices: int) -> list[list[int]]:
    """Groups of the numbers of devices that take part in a collective together; of a permute, its (from, to) pairs."""
    if pairs := instruction.attribute("source_target_pairs"):
        return [[int(a), int(b)] for a, b in re.findall(r"\{(\d+),(\d+)\}", pairs)]
    text = instruction.attribute("replica_groups")
    if text.startswith("mesh["):
        return _mesh_groups(instruction.attributes)
    if text.startswith("["):
        shape, source = text.split("<=")
        return _counted(source).reshape(_integers(shape)).tolist()
    explicit = [list(map(int, group.split(","))) for group in re.findall(r"\{([\d,]+)\}", text[1:-1])]
    return explicit or [list(range(devices))]


def _integers(text: str) -> list[int]:
    return list(map(int, re.findall(r"\d+", text)))


def _counted(text: str) -> np.ndarray:
    """The device numbers of a notation like [4,16]T(1,0): 0 .. 63 as an array of 4 x 16, transposed."""
    dims, _, order = text.partition("T")
    dims = _integers(dims)
    ids = np.arange(math.prod(dims)).reshape(dims)
    return ids.transpose(_integers(order)) if order else ids


def _mesh_groups(attributes: str) -> list[list[int]]:
    """Groups along axes of a mesh: mesh['a'=4,'b'=2] {'b'}, or along part of an axis, {'a':(2)2}: size 2 after 2."""
    match = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((\[[\d,]+\](?:T\([\d,]+\))?|[\d,]+)\))?\s*\{([^}]*)\}",
        attributes,
    )
    axes, order, members = match.groups()
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    wanted = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", members)
    dims, joined = [], []
    for name, size in sizes.items():
        parts = sorted((int(before or 1), int(part or size)) for n, before, part in wanted if n == name)
        at = 1
        for before, part in parts:
            dims += [before // at, part]
            joined.append(len(dims) - 1)
            at = before * part
        dims.append(size // at)
    ids = _counted(order) if order and order.startswith("[") else np.array(order.split(","), int) if order else None
    ids = (np.arange(math.prod(dims)) if ids is None else ids).reshape(dims)
    apart = [axis for axis in range(len(dims)) if axis not in joined]
    return ids.transpose(apart + joined).reshape(-1, math.prod(dims[axis] for axis in joined)).tolist()
