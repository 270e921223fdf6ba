"""A step needs exactly the memory of the step written by hand, and its donated carry is aliased whole.

Bytes as XLA assigns them, so the numbers are exact. For microbatches see `accumulation`.
"""

from collections.abc import Iterator

import jax
import optax

import flaxsplit as fs

from ._measure import HAND, OURS, Effort, Row, Tell, memory_of
from ._models import DenseNorm, batch_of, by_hand, ours, start


def measure(effort: Effort, tell: Tell) -> Iterator[Row]:
    """Reads XLA's buffer assignment."""
    tx = optax.adam(1e-3)
    for width in effort.of(smoke=[16], quick=[64, 512], full=[64, 512, 2048]):
        model, batch = DenseNorm(width=width), batch_of(256, width)
        carry = start(model, tx, batch[0])
        tell(f"width {width}")
        found = {
            HAND: memory_of(jax.jit(by_hand(model, tx), donate_argnums=0), carry, batch),
            OURS: memory_of(fs.jit_step(ours(model, tx)), carry, batch),
        }
        held = float(sum(leaf.nbytes for leaf in jax.tree.leaves(carry)))
        temporary = {name: [float(each.temp_size_in_bytes)] for name, each in found.items()}
        aliased = {name: [float(each.alias_size_in_bytes)] for name, each in found.items()}
        yield Row(f"temporary, width {width}", "bytes", temporary, bounds={OURS: 1.0}, x=width)
        yield Row(f"aliased, width {width}", "bytes", aliased | {"the carry": [held]}, bounds={OURS: 1.0}, x=width)
