"""What the executable says of itself: instructions, collectives, memory, FLOPs."""

import math
import re
from collections import Counter
from typing import Any, NamedTuple

# The optimized module as an object (`HloModule` of jaxlib has no instructions in Python) would replace both patterns.
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?[\w.-]+ = (\(.*?\)|\S+) ([\w-]+)\(", re.MULTILINE)
_SHAPE = re.compile(r"([a-z]+)(\d+)?\w*\[([\d,]*)\]")
_COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)


class Collective(NamedTuple):
    """All collectives of one kind: how many, and the bytes that they give."""

    times: int
    bytes: int


def instructions(text: str) -> Counter[str]:
    """Counts the instructions of an optimized module by opcode, fused ones too."""
    return Counter(match[2] for match in _INSTRUCTION.finditer(text))


def collectives(text: str) -> dict[str, Collective]:
    """Counts what is sent between devices; of a pair `-start` and `-done` the second, which has the result alone."""
    found: dict[str, Collective] = {}
    for match in _INSTRUCTION.finditer(text):
        name = match[2].removesuffix("-done")
        if name in _COLLECTIVES:
            before = found.get(name, Collective(0, 0))
            found[name] = Collective(before.times + 1, before.bytes + _bytes(match[1]))
    return found


def _bytes(shape: str) -> int:
    parts = _SHAPE.findall(shape)
    sizes = (math.prod(map(int, filter(None, dims.split(",")))) * (int(bits or 8) + 7 >> 3) for _, bits, dims in parts)
    return sum(sizes)


def cost_of(compiled: Any) -> dict[str, float]:
    """XLA's own count for one device; a list of one in older versions, nothing where a backend has none."""
    said: Any = compiled.cost_analysis() or {}
    cost: Any = said[0] if isinstance(said, list) else said
    return {"flops": float(cost.get("flops", 0.0)), "bytes": float(cost.get("bytes accessed", 0.0))} if cost else {}


def memory_of(compiled: Any) -> dict[str, int]:
    """Bytes on one device: of arguments, outputs, what is reused, temporaries, and the peak."""
    stats = compiled.memory_analysis()
    if stats is None:
        return {}
    names = ("argument", "output", "alias", "temp")
    sizes = {name: int(getattr(stats, f"{name}_size_in_bytes", 0)) for name in names}
    whole = sizes["argument"] + sizes["output"] - sizes["alias"] + sizes["temp"]
    said = int(getattr(stats, "peak_memory_in_bytes", -1))
    return {**sizes, "peak": said if said >= sizes["temp"] else whole}  # of a CPU it is said without temporaries
