"""The collective operations of a compiled program and their sizes, parsed from its text."""

import dataclasses
import math
import re

_KINDS = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
_BYTES = {
    "pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2,
    "f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8,
}  # fmt: skip
_CALL = re.compile(rf"= (?P<type>.+?) (?P<kind>{'|'.join(_KINDS)})(?:-start)?\(")
_ARRAY = re.compile(r"(?P<type>[a-z]+\d*)\[(?P<shape>[\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation of a program.

    Attributes:
        kind: the name of the operation, e.g. `all-reduce`.
        shapes: the shapes of its results on one device.
        bytes: the size of its results on one device, in bytes.
    """

    kind: str
    shapes: tuple[tuple[int, ...], ...]
    bytes: int


def collectives(text: str) -> list[Collective]:
    """Return every occurrence of a collective in `compiled.as_text()` (in a loop, only one).

    An asynchronous collective is counted at its start, whose result includes its operands: only the
    second half of the arrays of a start is counted, except for all-reduce, which does not repeat
    them.
    """
    found = []
    for line in text.splitlines():
        if not (call := _CALL.search(line)):
            continue
        arrays = [
            (match["type"], tuple(int(n) for n in match["shape"].split(",") if n))
            for match in _ARRAY.finditer(call["type"])
            if match["type"] in _BYTES
        ]
        if f"{call['kind']}-start(" in line:
            arrays = [a for a in arrays if not (a[0] in ("u32", "s32") and a[1] == ())]
            if call["kind"] != "all-reduce":
                arrays = arrays[len(arrays) // 2 :]
        size = sum(_BYTES[kind] * math.prod(shape) for kind, shape in arrays)
        found.append(Collective(call["kind"], tuple(shape for _, shape in arrays), size))
    return found
