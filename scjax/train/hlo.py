"""What a partitioned program does on each device, read from its text: collectives and matrix products.

XLA's own cost analysis counts the body of a loop once, whatever its trips, and knows no network. Here
every instruction counts as often as it runs. The text is that of the program right after it was partitioned
(:func:`partitioned`): what a backend does to it later differs between backends, as for instance the CPU's
works bfloat16 out in float32.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import tempfile
from pathlib import Path
from typing import Any

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s64": 8, "u64": 8, "f64": 8}
_ARRAY = re.compile(r"\b([a-z]+[0-9]+[a-z0-9]*|pred)\[([0-9,]*)\]")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|true_computation|false_computation|branch_computations)=(\{[^}]*\}|%[\w.\-]+)"
)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: ``name = type opcode(arguments), rest``."""

    name: str
    type: str
    opcode: str
    arguments: str
    rest: str

    @functools.cached_property
    def operands(self) -> list[str]:
        return _NAME.findall(self.arguments)

    @property
    def shapes(self) -> list[tuple[str, tuple[int, ...]]]:
        """(dtype, shape) of the result, or of each of a tuple."""
        return [(t, tuple(map(int, filter(None, s.split(","))))) for t, s in _ARRAY.findall(self.type)]

    @property
    def bytes(self) -> int:
        return sum(BYTES.get(dtype, 4) * math.prod(shape) for dtype, shape in self.shapes)


@dataclasses.dataclass
class Work:
    """What one device does in a step.

    Attributes:
      collectives: kind -> (how often, bytes that the device sends, as a ring does it).
      operations: of matrix products.
    """

    collectives: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    operations: float = 0.0

    def add(self, other: Work, times: float = 1) -> None:
        for kind, (count, sent) in other.collectives.items():
            before = self.collectives.get(kind, (0.0, 0.0))
            self.collectives[kind] = (before[0] + times * count, before[1] + times * sent)
        self.operations += times * other.operations


def partitioned(lowered: Any) -> tuple[Any, str]:
    """``(compiled, text)`` of a ``jax.stages.Lowered``: text as it is after partitioning, for one device."""
    with tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, "xla_dump_hlo_pass_re": "spmd-partitioning"}
        compiled = lowered.compile(compiler_options=options | {"xla_dump_hlo_as_text": True})
        found = sorted(Path(folder).glob("*after_spmd-partitioning*.txt"))
        # on one device nothing is partitioned
        return compiled, found[-1].read_text() if found else compiled.as_text()


def work(text: str, n_devices: int) -> Work:
    """Collectives and operations of the entry computation and all that it calls, as often as it does.

    A loop whose trips are not written in its condition counts once; of branches, the one with the most
    operations.
    """
    computations, entry = parse(text)

    @functools.cache
    def of(name: str) -> Work:
        total, live = Work(), _live(computations[name])
        users: dict[str, list[Instruction]] = {}
        for instruction in live.values():
            for operand in instruction.operands:
                users.setdefault(operand, []).append(instruction)
        for instruction in live.values():
            kind = instruction.opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                # of what is reduced and then cut, GPUs and TPUs make one operation; here it is still two
                scattered = kind == "all-reduce" and _cut(instruction, users)
                _collective(total, "reduce-scatter" if scattered else kind, instruction, n_devices, scattered)
            elif kind == "dot":
                total.operations += _dot(instruction, live)
            elif kind == "while":
                total.add(of(_called(instruction)[0]), _trips(instruction, computations))
            elif kind == "conditional":
                total.add(max((of(branch) for branch in _called(instruction)), key=lambda w: w.operations))
            elif kind in ("call", "fusion", "async-start"):
                for called in _called(instruction):
                    total.add(of(called))
        return total

    return of(entry)


def parse(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """``(computation -> name -> instruction, entry)``; the root of each comes last."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current, root = "", None, None
    for line in text.splitlines():
        if line.endswith("{") and (head := re.match(r"(ENTRY )?%?([\w.\-]+) \(", line)):
            current = computations[head[2]] = {}
            entry = head[2] if head[1] else entry
        elif line.startswith("}"):
            if current is not None and root is not None:
                current[root.name] = current.pop(root.name)
            current = root = None
        elif current is not None and (found := re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)):
            kind, rest = _type(line[found.end() :])
            opcode, _, rest = rest.partition("(")
            inside, _, rest = _inside(rest)
            made = Instruction(found[2], kind, opcode.strip(), inside, rest)
            current[made.name] = made
            root = made if found[1] else root
    return computations, entry


def _type(text: str) -> tuple[str, str]:
    """A type, and what comes after it."""
    if not text.startswith("("):
        kind, _, rest = text.partition(" ")
        return kind, rest
    inside, _, rest = _inside(text[1:])
    return inside, rest


def _inside(text: str) -> tuple[str, str, str]:
    """Up to the bracket that closes one opened before ``text``."""
    depth = 1
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return text[:i], ")", text[i + 1 :]
    return text, "", ""


def _live(computation: dict[str, Instruction]) -> dict[str, Instruction]:
    """The instructions that the root, the last one, needs."""
    needed: set[str] = set()
    waiting = list(computation)[-1:]
    while waiting:
        name = waiting.pop()
        if name in needed or name not in computation:
            continue
        needed.add(name)
        waiting.extend(computation[name].operands)
    return {name: instruction for name, instruction in computation.items() if name in needed}


def _cut(instruction: Instruction, users: dict[str, list[Instruction]]) -> bool:
    """Whether nothing is made of a result but a slice of it."""
    while True:
        following = users.get(instruction.name, [])
        if len(following) != 1:
            return False
        (instruction,) = following
        if instruction.opcode not in ("copy", "convert", "reshape", "bitcast", "transpose"):
            return instruction.opcode == "dynamic-slice"


def _called(instruction: Instruction) -> list[str]:
    return [name for group in _CALLED.findall(instruction.rest) for name in _NAME.findall(group)]


def _trips(loop: Instruction, computations: dict[str, dict[str, Instruction]]) -> int:
    """How often a loop runs: annotated, or the constant that its counter is compared with."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
        return int(known[1])
    name = re.search(r"condition=%([\w.\-]+)", loop.rest)
    condition = computations[name[1]] if name else {}
    compared = [i for i in condition.values() if i.opcode == "compare"]
    limits = [int(i.arguments) for i in condition.values() if i.opcode == "constant" and i.type == "s32[]"]
    return limits[0] if len(compared) == len(limits) == 1 else 1


def _dot(dot: Instruction, computation: dict[str, Instruction]) -> float:
    """2 for each number of the result and each one that it sums over."""
    ((_, shape),) = dot.shapes
    contracted = re.search(r"lhs_contracting_dims=\{([0-9,]*)\}", dot.rest)
    # newer texts name an element of a tuple by "%name#index"
    ((name, index),) = re.findall(r"^\s*%([\w.\-]+)(?:#(\d+))?", dot.arguments)
    left = computation[name].shapes[int(index or 0)][1]
    sums = math.prod(left[int(i)] for i in contracted[1].split(",") if i) if contracted else 1
    return 2.0 * math.prod(shape) * sums


def _collective(total: Work, kind: str, instruction: Instruction, n_devices: int, whole: bool) -> None:
    size, group = instruction.bytes, _group(instruction.rest, n_devices)
    if group == 1:
        return
    share = (group - 1) / group
    if kind == "reduce-scatter" and not whole:
        size *= group  # its result is a piece of what is reduced
    sent = {"all-reduce": 2 * share, "collective-permute": 1}.get(kind, share) * size
    total.add(Work({kind: (1.0, sent)}))


def _group(rest: str, n_devices: int) -> int:
    """Devices that take part together in a collective."""
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", rest):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
        used = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part) if part else sizes[name] for name, part in used)
    if tiled := re.search(r"replica_groups=\[(\d+),(\d+)\]", rest):
        return int(tiled[2])
    if listed := re.search(r"replica_groups=\{\{([0-9,]+)\}", rest):
        return listed[1].count(",") + 1
    return n_devices
