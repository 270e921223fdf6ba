"""What one device computes and sends, read off the text of an optimized executable."""

import math
import re
from collections import Counter

from flaxsplit._compiled import collectives

_DOT = re.compile(r"= \w+\[([\d,]*)\]\S* dot\((?:\w+\[[\d,]*\]\S* )?(%[\w.-]+),.*?lhs_contracting_dims={([\d,]*)}")
_TYPED = re.compile(r"(%[\w.-]+)(?: =|:) \w+\[([\d,]*)\]")


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
        found.update({kind: times * each.bytes for kind, each in collectives(part).items()})
    return found


def _sizes(shape: str) -> list[int]:
    return [int(each) for each in shape.split(",") if each]
