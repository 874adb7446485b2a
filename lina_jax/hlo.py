"""Read a compiled XLA program: its scheduled instructions, their arithmetic and their memory traffic.

`cost_analysis` counts loop bodies once and ignores collectives, so the text is read instead. Counts are per device and
per execution of an instruction; `roofline` multiplies them by trip counts.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

import numpy as np

_BITS = {"pred": 8, "token": 0, "opaque": 0, "s4": 4, "u4": 4, "c64": 64, "c128": 128}  # other names contain the number
_SHAPE = re.compile(r"([a-z]+[0-9a-z]*)\[([0-9,<=]*)\](\{[^{}]*\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_STATED_FLOPS = re.compile(r'"cost_estimate":\{"flops":"(\d+)"')  # in a TPU kernel, by its author
_STATED = re.compile(r"\\22(flops|vector_ops|bytes_accessed)\\22: \\22(\d+)\\22")  # GPUs: `tiles.cost_metadata`
_CALLED = re.compile(r"\b(?:calls|to_apply|body|branch_computations|true_computation|false_computation)=")
# Copies that a copy engine makes while the core goes on, and the instructions that wait for them.
PREFETCH_STARTS = frozenset({"copy-start", "slice-start", "dynamic-slice-start"})
PREFETCH_DONES = frozenset({"copy-done", "slice-done", "dynamic-slice-done"})
# Instructions that move no data: they only name or group values.
_FREE = PREFETCH_DONES | frozenset({
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
    "opt-barrier", "partition-id", "replica-id", "async-done", "domain", "add-dependency",
    "call-start", "call-update", "call-done",  # of a TPU's SparseCore
})  # fmt: skip
_SLICING = frozenset({"dynamic-slice", "slice", "gather"})
_MOVING = PREFETCH_STARTS | frozenset({
    "broadcast", "reshape", "transpose", "pad", "concatenate", "reverse", "iota", "copy", "slice", "dynamic-slice",
    "dynamic-update-slice", "gather", "scatter", "fusion", "custom-call", "sort", "dot", "convolution",
    "rng-bit-generator", "bitcast-convert", "async-start",
})  # fmt: skip
_SLOW = frozenset({
    "divide", "sqrt", "rsqrt", "cbrt", "exponential", "exponential-minus-one", "log", "log-plus-one", "tanh",
    "logistic", "erf", "sine", "cosine", "power", "remainder", "atan2",
})  # fmt: skip
_SLOW_OPS = 8  # approximate vector operations of each
EXCHANGES = ("all-to-all", "ragged-all-to-all")
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", *EXCHANGES)


@dataclasses.dataclass(frozen=True)
class Shape:
    dtype: str
    dims: tuple[int, ...]
    near: bool = False  # in the core's own memory (TPU: layouts with S(1)) instead of HBM

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> float:
        bits = _BITS.get(self.dtype)
        return self.size * (int(re.search(r"\d+", self.dtype)[0]) if bits is None else bits) / 8

    @property
    def traffic(self) -> float:
        """Bytes of HBM traffic to read or write it once."""
        return 0.0 if self.near else self.bytes


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    opcode: str
    shapes: tuple[Shape, ...]  # of the result, tuples flattened
    operands: tuple[str, ...]
    literal: str  # the text in the parentheses: a constant's value, a parameter's number
    attributes: str
    root: bool

    @functools.cached_property
    def called(self) -> tuple[str, ...]:
        """The computations that it runs; for a loop, the body."""
        found = []
        for match in _CALLED.finditer(self.attributes):
            rest = self.attributes[match.end() :]
            found += _NAME.findall(rest[: rest.index("}")] if rest.startswith("{") else rest.split(",", 1)[0])
        return tuple(found)

    def attribute(self, name: str) -> str:
        """The text of an attribute, up to the next comma outside brackets; "" if there is no such attribute."""
        match = re.search(rf"\b{name}=", self.attributes)
        return _balanced(self.attributes[match.end() :]) if match else ""

    def numbers(self, name: str) -> tuple[int, ...]:
        return tuple(map(int, re.findall(r"\d+", self.attribute(name))))


@dataclasses.dataclass(frozen=True)
class Work:
    """The cost of one execution on one device."""

    matmul_flops: float = 0.0
    vector_ops: float = 0.0
    traffic: float = 0.0  # bytes to and from HBM

    def __add__(self, other: "Work") -> "Work":
        return Work(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    def times(self, n: float) -> "Work":
        return Work(*(n * a for a in dataclasses.astuple(self)))


class Module:
    """A compiled program, read from `jax.stages.Compiled.as_text()`."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        self._frames: dict[str, dict[int, str]] = {}
        current = table = None
        for line in text.splitlines():
            if line.startswith("  ") and current is not None:
                instruction = _instruction(line)
                current[instruction.name] = instruction
            elif line.startswith(("%", "ENTRY")) and line.endswith("{"):
                name = _NAME.search(line)[1]
                current = self.computations[name] = {}
                self.entry = name if line.startswith("ENTRY") else self.entry
            elif line in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
                table = self._frames[line] = {}
            elif table is not None and line[:1].isdigit():
                number, rest = line.split(" ", 1)
                table[int(number)] = rest
            else:
                current = None
        if not self.entry:
            raise ValueError("the text has no entry computation")

    def instructions(self, computation: str) -> Iterator[Instruction]:
        """The instructions of a computation, in the order of the schedule."""
        yield from self.computations[computation].values()

    def within(self, computation: str, scope: str) -> bool:
        """Whether any instruction of a computation comes from a `jax.named_scope` of this name."""
        return any(
            f"/{scope}/" in instruction.attributes or any(self.within(name, scope) for name in instruction.called)
            for instruction in self.instructions(computation)
        )

    def source(self, instruction: Instruction) -> str:
        """FILE:LINE of the Python source of an instruction; "" if the compiler did not keep it."""
        if match := re.search(r'source_file="([^"]+)" source_line=(\d+)', instruction.attributes):
            return f"{match[1]}:{match[2]}"
        frame = re.search(r"stack_frame_id=(\d+)", instruction.attributes)
        if not frame or "StackFrames" not in self._frames:
            return ""
        place = int(re.search(r"file_location_id=(\d+)", self._frames["StackFrames"][int(frame[1])])[1])
        where = self._frames["FileLocations"][place]
        file = self._frames["FileNames"][int(re.search(r"file_name_id=(\d+)", where)[1])].strip('"')
        return file + ":" + re.search(r"line=(\d+)", where)[1]

    def trips(self, loop: Instruction, computation: str, unknown: float = 1.0) -> float:
        """How often a `while` runs its body; `unknown` if that depends on data."""
        if match := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes):
            return float(match[1])
        comparison, values = self._comparison(_NAME.match(loop.attribute("condition"))[1])
        counter, limit = values if len(values) == 2 else (None, None)
        if comparison.attribute("direction") != "LT" or limit is None or limit.opcode != "constant":
            return unknown
        index = int(counter.attribute("index") or 0)
        start = self.computations[computation].get(loop.operands[0])
        first = _through(self.computations[computation], start.operands[index]) if start.opcode == "tuple" else None
        return float(limit.literal) - (float(first.literal) if first and first.opcode == "constant" else 0.0)

    def _comparison(self, condition: str) -> tuple[Instruction, list[Instruction | None]]:
        """The root of a loop's condition, and its operands; if that is a fusion (GPUs), the root inside it."""
        scope = self.computations[condition]
        root = next(i for i in scope.values() if i.root)
        values = [_through(scope, name) for name in root.operands]
        if root.opcode != "fusion":
            return root, values
        comparison, inside = self._comparison(root.called[0])
        return comparison, [values[int(i.literal)] if i and i.opcode == "parameter" else i for i in inside]

    def work(self, instruction: Instruction, computation: str) -> Work:
        """The work of one instruction outside fusions; none for loops, branches and collectives (see `roofline`)."""
        only_room = '"AllocateBuffer"' in instruction.attributes  # a buffer that a loop will write
        if instruction.opcode in _FREE or collective_kind(instruction) or only_room:
            return Work()
        flops, ops = self._arithmetic(instruction, self.computations[computation])
        return Work(flops, ops, self._traffic(instruction, self.computations[computation]))

    def _arithmetic(self, instruction: Instruction, scope: dict[str, Instruction]) -> tuple[float, float]:
        """(FLOPs of matmuls, vector operations)."""
        opcode, out = instruction.opcode, sum(shape.size for shape in instruction.shapes)
        if opcode == "dot":
            lhs = scope[instruction.operands[0]].shapes[0].dims
            return 2.0 * out * math.prod(lhs[i] for i in instruction.numbers("lhs_contracting_dims")), 0.0
        if opcode == "convolution":
            return _convolution_flops(instruction, *(scope[name].shapes[0].dims for name in instruction.operands)), 0.0
        if opcode == "custom-call" and "gemm_backend_config" in instruction.attributes:
            lhs = scope[instruction.operands[0]].shapes[0].dims
            dims = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', instruction.attributes)[1]
            contracted = math.prod(lhs[int(i)] for i in re.findall(r"\d+", dims))
            return 2.0 * instruction.shapes[0].size * contracted, 0.0
        if opcode == "custom-call" and (stated := _STATED_FLOPS.search(instruction.attributes)):
            return float(stated[1]), 0.0
        if opcode == "custom-call" and (stated := dict(_STATED.findall(instruction.attributes))):
            return float(stated["flops"]), float(stated["vector_ops"])
        if opcode in ("fusion", "call", "async-start"):
            return tuple(map(sum, zip(*map(self._inside, instruction.called), strict=True))) or (0.0, 0.0)
        if opcode in ("reduce", "reduce-window"):
            return 0.0, float(sum(scope[name].shapes[0].size for name in instruction.operands))
        if opcode in _MOVING or opcode in _FREE:
            return 0.0, 0.0
        return 0.0, float(out * (_SLOW_OPS if opcode in _SLOW else 1))

    @functools.cache  # noqa: B019 - programs are few, so it does not matter that the cache keeps them alive
    def _inside(self, computation: str) -> tuple[float, float]:
        scope = self.computations[computation]
        pairs = [self._arithmetic(instruction, scope) for instruction in scope.values()]
        return sum(flops for flops, _ in pairs), sum(ops for _, ops in pairs)

    def _traffic(self, instruction: Instruction, scope: dict[str, Instruction]) -> float:
        results = [shape.traffic for shape in instruction.shapes]
        operands = [
            sum(shape.traffic for shape in scope[name].shapes) for name in instruction.operands if name in scope
        ]
        opcode = instruction.opcode
        if "gemm_backend_config" in instruction.attributes:
            results = results[:1]  # the others are workspace, of which little is used
        if opcode in PREFETCH_STARTS:  # the first two shapes are the two ends of the copy
            moved = min(shape.bytes for shape in instruction.shapes[:2])
            return sum(moved for shape in instruction.shapes[:2] if shape.traffic)
        if opcode in _SLICING:  # reads only as much as it returns
            return 2 * sum(results)
        if opcode == "custom-call" and (stated := dict(_STATED.findall(instruction.attributes))):
            return float(stated["bytes_accessed"])  # it may use only parts of its arrays
        if opcode == "dynamic-update-slice":  # in place
            return 2 * operands[1]
        if opcode == "fusion":
            reads, writes = self._fused_traffic(instruction.called[0])
            reads = [own if whole is None else min(whole, own) for whole, own in zip(reads, operands, strict=False)]
            writes = [own if part is None else min(part, own) for part, own in zip(writes, results, strict=False)]
            return sum(reads) + sum(writes)
        return sum(operands) + sum(results)

    @functools.cache  # noqa: B019
    def _fused_traffic(self, computation: str) -> tuple[list[float | None], list[float | None]]:
        """Bytes that a fusion reads of each parameter and writes of each result; None stands for all of it.

        If only slices of a parameter are used, only these are read. Of an array that is updated in place, only the
        update is written and nothing is read. An array that is only passed on is neither read nor written.
        """
        scope = self.computations[computation]
        users: dict[str, list[Instruction]] = {name: [] for name in scope}
        for instruction in scope.values():
            for name in set(instruction.operands) & scope.keys():
                users[name].append(instruction)

        def used(name: str) -> float | None:
            total = 0.0
            for user in users[name]:
                if user.opcode in _SLICING and user.operands[0] == name:
                    total += sum(shape.bytes for shape in user.shapes)
                elif user.opcode in ("bitcast", "fusion"):
                    inner = used(user.name) if user.opcode == "bitcast" else through(user, name)
                    if inner is None:
                        return None
                    total += inner
                elif user.opcode == "tuple" or collective_kind(user):
                    continue  # passed on; `roofline` counts what collectives move
                elif not (user.opcode == "dynamic-update-slice" and user.operands[0] == name):
                    return None
            return total

        def through(fusion: Instruction, name: str) -> float | None:
            reads, _ = self._fused_traffic(fusion.called[0])
            parts = [part for part, operand in zip(reads, fusion.operands, strict=True) if operand == name]
            return None if None in parts else sum(parts)

        def written(instruction: Instruction) -> float | None:
            while instruction.opcode == "bitcast":
                instruction = scope[instruction.operands[0]]
            if instruction.opcode == "parameter" or collective_kind(instruction):
                return 0.0
            if instruction.opcode == "dynamic-update-slice":
                return sum(shape.bytes for shape in scope[instruction.operands[1]].shapes)
            return None

        parameters = sorted((i for i in scope.values() if i.opcode == "parameter"), key=lambda i: int(i.literal))
        root = next(i for i in scope.values() if i.root)
        results = [scope[name] for name in root.operands] if root.opcode == "tuple" else [root]
        return [used(parameter.name) for parameter in parameters], [written(result) for result in results]


def collective_kind(instruction: Instruction) -> str | None:
    """The kind of collective (all-gather, all-reduce, ...) that an instruction is or starts, else None."""
    name = instruction.opcode.removesuffix("-start")
    return name if name in COLLECTIVES else None


def stated_rings(instruction: Instruction) -> int:
    """Rings, one way each, that a collective uses at the same time, where the compiler states it; else 0."""
    return instruction.attributes.count('"phase_rings"')


def collective_bytes(instruction: Instruction, scope: dict[str, Instruction]) -> float:
    """Bytes of the whole array that is gathered, reduced or scattered; for exchanges, of one device's part."""
    if instruction.opcode.startswith("reduce-scatter"):
        return sum(shape.bytes for name in instruction.operands for shape in scope[name].shapes)
    arrays = [shape for shape in instruction.shapes if shape.dims or shape.dtype not in ("u32", "s32")]
    # The shapes are (operands, results), but of an all-reduce-start only results.
    if instruction.opcode.endswith("-start") and not instruction.opcode.startswith("all-reduce"):
        arrays = arrays[len(arrays) // 2 :]
    return sum(shape.bytes for shape in arrays)


def _instruction(line: str) -> Instruction:
    text = line.strip()
    root = text.startswith("ROOT ")
    name, rest = text.removeprefix("ROOT ").split(" = ", 1)
    kind, rest = _type_and_rest(rest)
    opcode, rest = rest.split("(", 1)
    inside = _until_closed(rest)
    shapes = tuple(
        Shape(dtype, tuple(int(d.lstrip("<=")) for d in dims.split(",") if d), "S(1)" in (layout or ""))
        for dtype, dims, layout in _SHAPE.findall(kind)
    )
    operands = tuple(_NAME.findall(inside)) if opcode not in ("constant", "parameter") else ()
    return Instruction(name.lstrip("%"), opcode, shapes, operands, inside, rest[len(inside) + 1 :].lstrip(", "), root)


def _type_and_rest(text: str) -> tuple[str, str]:
    if not text.startswith("("):
        return text.split(" ", 1)
    inside = _until_closed(text[1:])
    return inside, text[len(inside) + 2 :].lstrip()


def _until_closed(text: str) -> str:
    """The text up to the parenthesis that closes one opened before the text."""
    depth = 1
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return text[: match.start()]
    raise ValueError(f"a parenthesis is not closed: {text[:80]}")


def _balanced(text: str) -> str:
    depth = 0
    for i, character in enumerate(text):
        if character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
        elif character == "," and depth == 0:
            return text[:i]
        if depth < 0:
            return text[:i]
    return text


def _through(scope: dict[str, Instruction], name: str) -> Instruction | None:
    """The instruction that an operand comes from, looking through copies, bitcasts and converts."""
    instruction = scope.get(name)
    while instruction and instruction.opcode in ("copy", "bitcast", "convert"):
        instruction = scope.get(instruction.operands[0])
    return instruction


def _convolution_flops(instruction: Instruction, lhs: tuple[int, ...], rhs: tuple[int, ...]) -> float:
    """FLOPs that touch data, not padding: TPU compilers write most matmuls as such convolutions."""
    left, rest = instruction.attribute("dim_labels").split("_")
    right, out = rest.split("->")
    window = {key: value.split("x") for key, value in re.findall(r"(\w+)=([\dx_\-]+)", instruction.attribute("window"))}
    result = instruction.shapes[0].dims
    positions = 1
    for i in range(len(left) - 2):
        axis = str(i)

        def of(key, default, i=i):
            return window[key][i] if key in window else default

        taps = rhs[right.index(axis)]
        stride, low = int(of("stride", "1")), int(of("pad", "0_0").split("_")[0])
        base, spread = int(of("lhs_dilate", "1")), int(of("rhs_dilate", "1"))
        places = np.arange(result[out.index(axis)])[:, None] * stride + np.arange(taps)[None] * spread - low
        inside = (places >= 0) & (places % base == 0) & (places // base < lhs[left.index(axis)])
        positions *= int(inside.sum())
    # The kernel's input features are already per group.
    return 2.0 * positions * result[out.index("b")] * result[out.index("f")] * rhs[right.index("i")]
