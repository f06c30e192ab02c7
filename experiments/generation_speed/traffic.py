"""Bytes that a compiled program's loop moves in one iteration, read off its text (optimised HLO).

Every operand and every result of an instruction counts once, as if nothing stayed in a cache.
Where an instruction reads a slice of an array, or writes one in place, the slice counts.
"""

import math
import re
from typing import NamedTuple

_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "token": 0}
_FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "partition-id",
    "opt-barrier",
}
_SLICES = {"dynamic-slice", "slice", "gather"}
_SHAPE = re.compile(r"\b(pred|token|bf16|[sufc]\d+)(?:e\d+m\d+\w*)?\[([\d,]*)\]")
_INSTRUCTION = re.compile(r"\s*(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")


class Instruction(NamedTuple):
    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    text: str
    root: bool

    def called(self, kind: str = "calls") -> str | None:
        found = re.search(rf"\b{kind}=%?([\w.\-]+)", self.text)
        return found[1] if found else None


Computation = dict[str, Instruction]


def size(shape: str) -> int:
    """Bytes of a shape as HLO writes it, tuples included."""
    shape = re.sub(r"\{[^{}]*\}", "", shape)
    bits = 0
    for kind, sizes in _SHAPE.findall(shape):
        width = _BITS.get(kind) or (0 if kind == "token" else int(re.sub(r"\D", "", kind)))
        bits += width * math.prod(int(n) for n in sizes.split(",") if n)
    return bits // 8


def parse(text: str) -> dict[str, Computation]:
    """The computations of a program."""
    found: dict[str, Computation] = {}
    current: Computation = {}
    for line in text.splitlines():
        if line.rstrip().endswith("{") and not line.startswith(" "):
            name = re.match(r"(?:ENTRY )?%?([\w.\-]+)", line)
            if name:
                current = found.setdefault(name[1], {})
            continue
        # Comments count the elements of a long tuple.
        match = _INSTRUCTION.match(re.sub(r"/\*.*?\*/", "", line))
        if match:
            root, name_, shape, opcode, rest = match.groups()
            arguments = rest.split(")", 1)[0]
            operands = tuple(re.findall(r"%([\w.\-]+)", arguments))
            current[name_] = Instruction(name_, shape, opcode, operands, rest, bool(root))
    return found


def loop_bytes(text: str) -> int:
    """Bytes of one iteration of the loop that moves most."""
    program = parse(text)
    bodies = {
        instruction.called("body")
        for computation in program.values()
        for instruction in computation.values()
        if instruction.opcode == "while"
    }
    return max(_moved(program[body], program) for body in bodies if body)


def _moved(computation: Computation, program: dict[str, Computation]) -> int:
    return sum(_of(instruction, computation, program) for instruction in computation.values())


def _of(instruction: Instruction, computation: Computation, program: dict[str, Computation]) -> int:
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith("-done"):
        return 0
    if opcode == "while":
        body = instruction.called("body")
        trips = re.search(r'known_trip_count":\{"n":"(\d+)"', instruction.text)
        return (int(trips[1]) if trips else 1) * _moved(program[body or ""], program)
    if opcode == "fusion":
        return _fused(instruction, computation, program)
    called = instruction.called("calls") or instruction.called("to_apply")
    if opcode == "call" or (opcode.endswith("-start") and called):
        return _moved(program[called or ""], program)
    if opcode == "conditional":
        return 0
    read = [size(computation[name].shape) for name in instruction.operands if name in computation]
    if opcode in _SLICES:
        return 2 * size(instruction.shape)
    if opcode == "dynamic-update-slice":
        return 2 * read[1]
    return sum(read) + size(instruction.shape)


def _fused(
    instruction: Instruction, computation: Computation, program: dict[str, Computation]
) -> int:
    inside = program[instruction.called() or ""]
    users: dict[str, list[Instruction]] = {}
    for one in inside.values():
        for operand in one.operands:
            users.setdefault(operand, []).append(one)

    def read(one: Instruction) -> int:
        whole, part = size(one.shape), 0
        for user in users.get(one.name, []):
            if user.opcode in _SLICES and user.operands[0] == one.name:
                part += size(user.shape)
            elif user.opcode == "dynamic-update-slice" and user.operands[0] == one.name:
                part += read(user)  # nothing, unless the updated array is used in here
            elif user.opcode == "bitcast":
                part += read(user)
            elif user.opcode == "tuple":
                continue
            else:
                return whole
        return min(whole, part)

    def written(one: Instruction) -> int:
        if one.opcode == "dynamic-update-slice":
            return size(inside[one.operands[1]].shape)
        if one.opcode == "bitcast":
            return written(inside[one.operands[0]])
        if one.opcode == "tuple":
            return sum(written(inside[name]) for name in one.operands)
        if one.opcode == "parameter":
            return 0  # passed through
        return size(one.shape)

    parameters = [one for one in inside.values() if one.opcode == "parameter"]
    root = next(one for one in inside.values() if one.root)
    return sum(read(one) for one in parameters) + written(root)


def largest(text: str, number: int = 20) -> list[tuple[int, str]]:
    """The instructions of that loop that move most: (bytes, its name and shape)."""
    program = parse(text)
    bodies = [i.called("body") for c in program.values() for i in c.values() if i.opcode == "while"]
    body = max((program[b] for b in bodies if b), key=lambda b: _moved(b, program))
    ranked = sorted((_of(i, body, program), f"{i.name} {i.shape[:60]}") for i in body.values())
    return ranked[::-1][:number]
