"""What one device computes and sends, read off the text of an optimized executable."""

import math
import re
from collections import Counter

_DOT = re.compile(r"= \w+\[([\d,]*)\]\S* dot\((?:\w+\[[\d,]*\]\S* )?(%[\w.-]+),.*?lhs_contracting_dims={([\d,]*)}")
_TYPED = re.compile(r"(%[\w.-]+)(?: =|:) \w+\[([\d,]*)\]")
_SENT = re.compile(r" = (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")
_ARRAY = re.compile(r"[a-z]+(\d+)\[([\d,]*)\]")


def flops(text: str, turns: int = 1) -> int:
    """FLOPs of all products of matrices, which are in a loop of so many turns."""
    total = 0
    for part in text.split("\n\n"):  # one computation, in which a name means one thing
        shapes = {name: _sizes(shape) for name, shape in _TYPED.findall(part)}
        for out, left, axes in _DOT.findall(part):
            total += 2 * math.prod(_sizes(out)) * math.prod(shapes[left][axis] for axis in _sizes(axes))
    return total * turns


def sent(text: str, turns: int = 1) -> Counter[str]:
    """Bytes that come out of the collectives, by kind; outside of the entry they are in a loop of so many turns."""
    found: Counter[str] = Counter()
    loops, _, entry = text.rpartition("\nENTRY ")
    for part, times in ((loops, turns), (entry, 1)):
        for types, kind in _SENT.findall(part):
            sizes = (math.prod(_sizes(shape)) * int(bits) // 8 for bits, shape in _ARRAY.findall(types))
            found[kind] += times * sum(sizes)
    return found


def _sizes(shape: str) -> list[int]:
    return [int(each) for each in shape.split(",") if each]
