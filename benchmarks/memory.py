"""A step needs exactly the memory of the step written by hand, and its donated carry is aliased whole.

Bytes as XLA assigns them, so the numbers are exact. For microbatches see `accumulation`.
"""

from collections.abc import Iterator
from typing import Any

import jax

from ._measure import HAND, OURS, Effort, Row, Tell, memory_of
from ._models import batch_of
from ._nets import mlp
from ._peers import Task, build


def measure(effort: Effort, tell: Tell) -> Iterator[Row]:
    """Reads XLA's buffer assignment."""
    for width in effort.of(smoke=[16], quick=[64, 512], full=[64, 512, 2048]):
        if not effort.wants(f"width {width}"):
            continue
        tell(f"width {width}")
        task, batch = Task(mlp(8, width), (width,)), batch_of(256, width)
        peers = {name: build(name, task) for name in (HAND, OURS)}
        found = {name: memory_of(peer.step, peer.fresh(), batch) for name, peer in peers.items()}
        held = float(sum(leaf.nbytes for leaf in jax.tree.leaves(peers[OURS].fresh())))
        peak = {name: [_peak_of(each)] for name, each in found.items()}
        aliased = {name: [float(each.alias_size_in_bytes)] for name, each in found.items()}
        yield Row(f"peak, width {width}", "bytes", peak, bounds={OURS: 1.0}, x=width)
        yield Row(f"aliased, width {width}", "bytes", aliased | {"the carry": [held]}, bounds={OURS: 1.0}, x=width)


def _peak_of(found: Any) -> float:
    """What is held at once: arguments, results that are not one of them, and what comes in between."""
    given, results = found.argument_size_in_bytes, found.output_size_in_bytes - found.alias_size_in_bytes
    return float(given + results + found.temp_size_in_bytes)
