"""Estimate the time of a compiled step from its schedule.

The compiled text is a schedule: instructions run in its order. An instruction takes the longest of its matmuls, its
vector operations and its HBM traffic, each at the chip's rate times the share in ATTAINED. A collective takes the time
of its bytes over the links that its devices span. The program goes on between its `-start` and its `-done`, so only the
time left at the `-done` counts; the same holds for copies that a TPU prefetches. Loop bodies are multiplied by their
trip counts. A conditional takes its longest branch, without those that almost never run (`sequence.RARELY`).
docs/planning.md compares the estimate with measurements.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from lina_jax import device_groups, hlo
from lina_jax import mesh as mesh_lib
from lina_jax.chips import Chip
from lina_jax.models import sequence

# Shares of the rates in `chips` that good kernels are assumed to reach; these are not fitted, but docs/planning.md
# compares with measurements. GPU matmuls: power limits bf16 on an H100 or H200 to about 700 of its 989 TFLOP/s.
ATTAINED = {
    "tpu": {"matmul": 0.92, "vector": 0.7, "memory": 0.9, "link": 0.9},
    "cuda": {"matmul": 0.72, "vector": 0.7, "memory": 0.9, "link": 0.8},
}
# Latency of a collective in seconds, whatever its size: per hop around a torus, among the GPUs of a node, and over the
# slow links.
HOP, GPU_LATENCY, SLOW_LATENCY = 1e-6, 20e-6, 50e-6
OVERHEAD = 0.5e-6  # seconds per instruction to fill and drain its pipelines


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of the program, with all of its executions in a step."""

    kind: str
    axes: str  # of the mesh, separated by commas
    bytes: float  # of the whole array, in one execution
    times: float  # executions in a step
    seconds: float  # of one execution on its own
    exposed: float  # seconds that the program waits for it in a step
    source: str
    name: str
    links: tuple[str, ...]  # those it uses: "near" (within slices and nodes), "far" (between them)


@dataclasses.dataclass
class Estimate:
    """The estimate of one step on one device."""

    seconds: float = 0.0
    work: hlo.Work = dataclasses.field(default_factory=hlo.Work)
    bound: dict[str, float] = dataclasses.field(default_factory=dict)  # seconds, by what they are bound by
    collectives: list[Collective] = dataclasses.field(default_factory=list)
    slowest: list[tuple[float, str, str, hlo.Work]] = dataclasses.field(default_factory=list)

    @property
    def collective_bytes(self) -> dict[str, dict[str, float]]:
        """Bytes per step, by mesh axes and kind."""
        total: dict[str, dict[str, float]] = {}
        for c in self.collectives:
            kinds = total.setdefault(c.axes, {})
            kinds[c.kind] = kinds.get(c.kind, 0.0) + c.times * c.bytes
        return total


def count(module: hlo.Module, *, unknown_trips: float = 1.0) -> hlo.Work:
    """The work of one run of the program on one device, whatever its chip; collectives are left out.

    Loops count times their trips (`unknown_trips` if these depend on data); a conditional counts as the branch with
    the most arithmetic.
    """

    def total(computation: str) -> hlo.Work:
        work = hlo.Work()
        for instruction in module.instructions(computation):
            if instruction.opcode == "while":
                trips = module.trips(instruction, computation, unknown_trips)
                work += total(instruction.called[0]).times(trips)
            elif instruction.opcode == "conditional":
                branches = map(total, _branches(module, instruction))
                work += max(branches, key=lambda branch: branch.matmul_flops + branch.vector_ops)
            elif instruction.opcode == "call":
                work += total(instruction.called[0])
            else:
                work += module.work(instruction, computation)
        return work

    return total(module.entry)


def estimate(module: hlo.Module, chip: Chip, mesh: Mesh, *, unknown_trips: float = 1.0) -> Estimate:
    """The estimate of one run of the program; loops whose trips depend on data count `unknown_trips` times."""
    walk = _Walk(module, chip, mesh, unknown_trips)
    walk.result.seconds = walk.run(module.entry, 1.0)
    walk.result.slowest.sort(key=lambda row: -row[0])
    return walk.result


def _branches(module: hlo.Module, conditional: hlo.Instruction) -> Sequence[str]:
    """The branches that are expected to run."""
    usual = [branch for branch in conditional.called if not module.within(branch, sequence.RARELY)]
    return usual or conditional.called


def instruction_seconds(work: hlo.Work, chip: Chip) -> tuple[float, str]:
    """(seconds of one instruction, what bounds it)."""
    share = ATTAINED[chip.platform]
    return max(
        (work.matmul_flops / (share["matmul"] * chip.peak_flops), "matmul"),
        (work.vector_ops / (share["vector"] * chip.vector_ops), "vector"),
        (work.traffic / (share["memory"] * chip.memory_bandwidth), "memory"),
    )


def collective_seconds(
    kind: str,
    size: float,
    members: Sequence[jax.Device],
    nodes: Sequence[int],
    chip: Chip,
    extent: Sequence[int],
    stated: int = 0,
) -> float:
    """Seconds of one collective over `members` on an array of `size` bytes.

    `nodes` has each member's node (`mesh.nodes`), `extent` the chips along each dimension of the slice's torus,
    `stated` the number of one-way rings in use (`hlo.stated_rings`); without it, each axis of the torus has its own.

    Within a slice or node, data travels around rings. Between them, each device exchanges its part of the array with
    its counterparts.
    """
    if len(members) < 2:
        return 0.0
    share = ATTAINED[chip.platform]["link"]
    domains = len(set(nodes))
    near = len(members) // domains
    exchanged = kind in hlo.EXCHANGES
    rounds = 2.0 if kind == "all-reduce" else 1.0  # a reduce-scatter and an all-gather
    seconds = 0.0
    if near > 1:
        rate, latency = chip.link, GPU_LATENCY
        rings = _rings(members, chip, extent) if chip.torus else []
        if rings:
            # On a line that is not closed, rings of both directions share its links.
            links = sum(links for _, links in rings)
            rate = min(stated or links, links) * chip.link
            latency = HOP * max(1.0, sum(length / links for length, links in rings))
        if kind == "collective-permute":
            return size / (share * chip.link) + (HOP if chip.torus else GPU_LATENCY)
        passing = size * (near - 1) / near
        if exchanged:  # of each device's part; on average it travels a quarter of the way around a ring
            passing /= len(members)
            if rings:
                rate = chip.link
                passing = size / len(members) * max(length / 4 / links for length, links in rings)
        seconds += rounds * (passing / (share * rate) + latency)
    if domains > 1:
        part = size if kind == "collective-permute" else size / near * (domains - 1) / domains
        if exchanged:
            part /= domains
        seconds += rounds * (part / (share * chip.slow_link) + SLOW_LATENCY)
    return seconds


def _rings(members: Sequence[jax.Device], chip: Chip, extent: Sequence[int]) -> list[tuple[int, int]]:
    """(length, links into each member: 2 if closed, else 1) of the ring along each axis that has several members."""
    rings = []
    for axis, full in enumerate(extent):
        length = len({device.coords[axis] for device in members})
        if length > 1:
            rings.append((length, 1 + (length == full and chip.closed(extent, axis))))
    return rings


def _occupy(free: dict[str, float], now: float, collective: Collective) -> float:
    """When a collective ends, in seconds: it starts once its links are `free`, and occupies them until it ends."""
    end = max([now, *(free[link] for link in collective.links)]) + collective.seconds
    free.update(dict.fromkeys(collective.links, end))
    return end


class _Walk:
    def __init__(self, module: hlo.Module, chip: Chip, mesh: Mesh, unknown_trips: float):
        self._module, self._chip, self._mesh, self._unknown = module, chip, mesh, unknown_trips
        self._devices = list(mesh.devices.flat)
        self._nodes = mesh_lib.nodes(self._devices)
        self._extent = ()
        if chip.torus:
            self._extent = tuple(
                1 + max(d.coords[k] for d in self._devices) for k in range(len(self._devices[0].coords))
            )
        self.result = Estimate()

    def run(self, computation: str, times: float) -> float:
        """Seconds of one execution; work, bounds and collectives are counted `times` times."""
        clock = copier = 0.0  # now, and when the copy engine is free
        free = {"near": 0.0, "far": 0.0}  # when links are free
        flying: dict[str, tuple[float, Collective]] = {}
        copied: dict[str, float] = {}
        scope = self._module.computations[computation]
        for instruction in self._module.instructions(computation):
            opcode = instruction.opcode
            if opcode == "while":
                trips = self._module.trips(instruction, computation, self._unknown)
                clock += trips * self.run(instruction.called[0], times * trips)
            elif opcode == "conditional":
                clock += self._longest(_branches(self._module, instruction), times)
            elif opcode == "call":
                clock += self.run(instruction.called[0], times)
            elif opcode in hlo.PREFETCH_STARTS:
                copier = max(clock, copier) + self._copy(instruction, computation, times)
                copied[instruction.name] = copier
            elif opcode in hlo.PREFETCH_DONES:
                wait = max(0.0, copied.pop(instruction.operands[0], 0.0) - clock)
                clock += wait
                self._bound("memory", times * wait)
            elif (found := self._collective(instruction, scope, times)) is not None:
                phase, key, collective = found
                if phase == "start":
                    flying[key] = _occupy(free, clock, collective), collective
                elif phase == "done" and key in flying:
                    finish, collective = flying.pop(key)
                    wait = max(0.0, finish - clock)
                    clock += wait
                    self._count(collective, wait, times)
                elif phase == "at once":
                    # Computation that is fused with it overlaps with it.
                    compute = self._compute(instruction, computation, times)
                    wait = max(0.0, _occupy(free, clock, collective) - clock - compute)
                    clock += compute + wait
                    self._count(collective, wait, times)
                else:
                    clock += self._compute(instruction, computation, times)
            else:
                clock += self._compute(instruction, computation, times)
        return clock

    def _longest(self, branches: Sequence[str], times: float) -> float:
        """Seconds of the branch that takes longest, which alone is counted."""
        before = self.result
        results = []
        for branch in branches:
            self.result = Estimate()
            results.append((self.run(branch, times), self.result))
        seconds, taken = max(results, key=lambda pair: pair[0])
        self.result = before
        before.work += taken.work
        for name, value in taken.bound.items():
            before.bound[name] = before.bound.get(name, 0.0) + value
        before.collectives += taken.collectives
        before.slowest += taken.slowest
        return seconds

    def _compute(self, instruction: hlo.Instruction, computation: str, times: float) -> float:
        work = self._module.work(instruction, computation)
        seconds, bound = instruction_seconds(work, self._chip)
        if not seconds:
            return 0.0
        seconds += OVERHEAD
        self.result.work += work.times(times)
        self._bound(bound, times * seconds)
        self.result.slowest.append(
            (times * seconds, instruction.name, self._module.source(instruction), work.times(times))
        )
        return seconds

    def _copy(self, instruction: hlo.Instruction, computation: str, times: float) -> float:
        """Seconds of a copy on the copy engine, which overlaps with the core."""
        work = self._module.work(instruction, computation)
        self.result.work += work.times(times)
        return instruction_seconds(work, self._chip)[0]

    def _bound(self, by: str, seconds: float) -> None:
        self.result.bound[by] = self.result.bound.get(by, 0.0) + seconds

    def _collective(
        self, instruction: hlo.Instruction, scope: Mapping[str, hlo.Instruction], times: float
    ) -> tuple[str, str, Collective | None] | None:
        """(phase, key, collective) if the instruction is, contains, starts or ends a collective, else None.

        Phases: "at once" (synchronous); "start" and "done", which share a key; "between", a TPU's fusion of computation
        with a step of a collective that was started before.
        """
        opcode, inner = instruction.opcode, instruction
        if opcode.endswith("-done") and opcode.removesuffix("-done") in ("async", "call", *hlo.COLLECTIVES):
            return "done", instruction.operands[0], None
        begun = instruction
        if opcode == "call-update":  # brings a SparseCore the operands of what a call-start has prepared
            begun = scope[instruction.operands[0]]
        elif opcode == "call-start" and not instruction.operands:
            return None
        if opcode in ("fusion", "async-start", "call-start", "call-update"):
            for name in begun.called:
                scope = self._module.computations[name]
                inner = next((i for i in scope.values() if hlo.collective_kind(i)), None)
        kind = inner and hlo.collective_kind(inner)
        if not kind:
            return None
        starts = opcode == "call-update" or opcode.endswith("-start")
        phase, key = "start" if starts else "at once", instruction.name
        if opcode == "fusion" and "async_collective_fusion_config" in inner.attributes:
            key = inner.attribute("channel_id")
            phase = {"start": "start", "done": "done"}.get(instruction.name.split(".")[0].split("-")[-1], "between")
        if any("all-reduce-scatter" in name for name in begun.called):  # an all-reduce, sliced per device
            kind = "reduce-scatter"
        size, groups = hlo.collective_bytes(inner, scope), device_groups.of(inner, len(self._devices))
        if kind in hlo.EXCHANGES:  # the result is one device's part
            size *= len(groups[0])
        rings = hlo.stated_rings(inner)
        seconds = max(self._seconds(kind, size, group, rings) for group in groups)  # all groups wait for the slowest
        axes, source, name = self._axes(groups), self._module.source(inner), instruction.name
        return phase, key, Collective(kind, axes, size, times, seconds, 0.0, source, name, self._links(groups))

    def _seconds(self, kind: str, size: float, group: Sequence[int], rings: int) -> float:
        members, nodes = [self._devices[i] for i in group], [self._nodes[i] for i in group]
        return collective_seconds(kind, size, members, nodes, self._chip, self._extent, rings)

    def _links(self, groups: Sequence[Sequence[int]]) -> tuple[str, ...]:
        spanned = [(len(group), len({self._nodes[i] for i in group})) for group in groups]
        near, far = any(members > nodes for members, nodes in spanned), any(nodes > 1 for _, nodes in spanned)
        return ("near",) * near + ("far",) * far

    def _axes(self, groups: Sequence[Sequence[int]]) -> str:
        """The mesh axes along which the members of a group differ, separated by commas."""
        shape = self._mesh.devices.shape
        moved = set()
        for group in groups[: 1 if len(groups[0]) > 2 else None]:
            at = [np.unravel_index(i, shape) for i in group]
            moved |= {axis for axis in range(len(shape)) if len({place[axis] for place in at}) > 1}
        return ",".join(self._mesh.axis_names[axis] for axis in sorted(moved))

    def _count(self, collective: Collective, wait: float, times: float) -> None:
        self.result.collectives.append(dataclasses.replace(collective, exposed=times * wait))
        self._bound("collectives", times * wait)
